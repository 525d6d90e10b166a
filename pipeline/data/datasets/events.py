"""The event files of a folder as a `Data`: what a recipe names. Constructing one opens no file.

Recordings of event cameras. A recipe reads them with `Events`:

    from pipeline.data.datasets.events import Events

    data=spec(Events, folder="data/moving", classes=16, steps=10, size=34)      # Batch.x: counts,
    float32 [B, T, 2, 34, 34] time_steps=10
    # the same T; a rule then gets [T, B, 2, 34, 34]

`spiketrain write events SET --out FOLDER` has written the folder: an event file holds, for each
recording, `slices` frames of counts by polarity, which `Events` sums to any number of `steps` that
divides it. Tests and `tiny()` need no file: they take `Synthetic(shape=(T, C, H, W))`, counts of
the same shape (pipeline/data/datasets/synthetic.py).

    data.py       Events: what a recipe names          read.py     from the bytes of a file to
    float32 [B, T, C, H, W] frames.py     events to frames of counts           sources.py  N-MNIST,
    CIFAR10-DVS, DVS-Gesture, N-Caltech101, through tonic moving.py     generated: moving shapes,
    which      saccades.py generated: three saccades over a still image
                  only memory can tell apart           write.py    any of them to train.beton and
                  val.beton
"""

from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import DataError
from pipeline.data.ffcv.files import FileData, Name, check_views
from pipeline.data.ffcv.format import Arrays, layout

# T time, B batch, C polarities, H W pixels


class Events(FileData):
    """Recordings as `steps` frames of `channels` x `size` x `size` counts: a sample's `shape` is
    (steps, channels, size, size).

    `steps`: T; it divides the slices of the file, and as many slices as make one step are summed.
    `channels`: 2 (off, on) or 1 (their sum).
    `crop` of training recordings: "shift" moves the window by up to `reach` pixels (4), the same
    for all of a recording, and nothing comes in; "none" leaves it. `flip`: "random" mirrors every
    second training recording, all of it; "never" none (a flip makes another class of a direction or
    a digit).
    `mean`, `std`: a value a channel, of the counts of one step; without them counts stay counts.
    `held_out`: as of Beton.

    Raises: DataError for options that contradict each other or have no effect.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        classes: int,
        steps: int,
        size: int,
        channels: int = 2,
        crop: Literal["shift", "none"] = "none",
        flip: Literal["random", "never"] = "never",
        reach: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        held_out: float = 0.0,
    ) -> None:
        super().__init__(
            folder, classes=classes, shape=(steps, channels, size, size), held_out=held_out
        )
        self.crop, self.flip = crop, flip
        self.mean = (0.0,) * channels if mean is None else tuple(mean)
        self.std = (1.0,) * channels if std is None else tuple(std)
        if min(classes, steps, size) < 1 or channels not in (1, 2):
            raise DataError(
                "Events: classes, steps and size must be 1 or more, channels 1 or 2; "
                f"got classes={classes}, steps={steps}, size={size}, channels={channels}"
            )
        check_views(self, channels, size, crops=("shift", "none"), reach=reach)
        self.reach = 4 if reach is None else reach

    def _decoder(self, use: Name, path: Path, *, parallel: bool) -> Any:
        from pipeline.data.ffcv.event_frames import DecodeEvents

        train = use == "train"
        return DecodeEvents(
            _stored(path, self.shape),
            shape=self.shape,
            reach=self.reach if train and self.crop == "shift" else 0,
            flip=train and self.flip == "random",
            mean=self.mean,
            std=self.std,
            parallel=parallel,
        )


def _stored(path: Path, shape: tuple[int, ...]) -> Arrays:
    """What the file holds of a recording, if `shape` can be made of it.

    Raises: DataError for images, for frames of another size, and for a number of steps that does
    not divide their slices."""
    stored = layout(path).kind
    steps, _, size, _ = shape
    if not isinstance(stored, Arrays) or len(stored.shape) != 4 or stored.shape[1] != 2:
        raise DataError(
            f"Events: {path} must hold frames [slices, 2, H, W]; got {stored}; images are read by"
            " Beton"
        )
    slices, _, *sides = stored.shape
    if sides != [size, size]:
        raise DataError(
            f"Events: size must be the file's, {sides[0]}x{sides[1]} in {path}; got {size}"
        )
    if slices % steps:
        near = [str(each) for each in range(1, slices + 1) if slices % each == 0]
        raise DataError(
            f"Events: steps must divide the {slices} slices of {path}: {', '.join(near)}; got"
            f" {steps}"
        )
    return stored


__all__ = ["Events"]
