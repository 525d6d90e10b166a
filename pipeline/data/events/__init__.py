"""Recordings of event cameras. A recipe reads them with `Events`:

    from pipeline.data.events import Events

    data=spec(Events, folder="data/moving", classes=16, steps=10, size=34)      # Batch.x: counts,
    float32 [B, T, 2, 34, 34] time_steps=10
    # the same T; a rule then gets [T, B, 2, 34, 34]

`spiketrain write events SET --out FOLDER` has written the folder: an event file holds, for each
recording, `slices` frames of counts by polarity, which `Events` sums to any number of `steps` that
divides it. Tests and `tiny()` need no file: they take `Synthetic(shape=(T, C, H, W))`, counts of
the same shape (pipeline/data/synthetic.py).

    data.py       Events: what a recipe names          read.py     from the bytes of a file to
    float32 [B, T, C, H, W] frames.py     events to frames of counts           sources.py  N-MNIST,
    CIFAR10-DVS, DVS-Gesture, N-Caltech101, through tonic moving.py     generated: moving shapes,
    which      saccades.py generated: three saccades over a still image
                  only memory can tell apart           write.py    any of them to train.beton and
                  val.beton
"""

from pipeline.data.events.data import Events

__all__ = ["Events"]
