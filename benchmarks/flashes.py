"""What readers without memory tell of pairs of flashes: the shape, and not which came first, unless
they know the time.

Command:  spiketrain write events flashes --slices 16 --gap 4 --size 24 --samples 8000
              --val-samples 4000 --out data/flashes-16-4
          python -m benchmarks.flashes --slices 16 --gap 4, likewise 8 and 2, 32 and 8
Result:   top-1 of the four views on 8-2, 16-4 and 32-8: one slice .499, .500, .499; gap slices
          .502, .497, .495; gap + 1 slices .996, .994, .990; slice and time .997, .999, .997; commit
          9398500b0cc0, one core of an AMD EPYC, other work beside it

The convolutional network of moving_events.py, trained anew on four views of the same recordings,
its logits averaged over the looks of a view:

    one slice       each slice alone
    gap slices      each window of as many slices as lie between the flashes, one upon another as
                    channels; windows go on from the last slice to the first
    gap + 1 slices  the same with one slice more, which sees both flashes at once
    slice and time  each slice alone, with its time as one more channel

Recordings 2 m and 2 m + 1 are exact reversals of each other, so the first view tells 0.50 at best.
Each slice has every place in some window, and no window of `gap` slices holds both flashes, so the
windows of both recordings have one distribution, but for noise that two windows share; 0.53 leaves
room for the error of 4,000 recordings in 2,000 pairs. The third view shows that the order is there
to be seen, and the fourth that times tell it. Exits with 1 when one of the first two tells more
than `BOUND`, or the third less than `SEEN`.
"""

import argparse
import sys

import torch
from torch import Tensor

from benchmarks.moving_events import BOUND, SEEN, View, read
from pipeline.data.datasets.events import Events


def windows(length: int) -> View:
    def view(counts_BTCHW: Tensor) -> Tensor:
        return torch.cat([counts_BTCHW.roll(-slice_, 1) for slice_ in range(length)], 2)

    return view


def timed(counts_BTCHW: Tensor) -> Tensor:
    time_T = torch.linspace(-1, 1, counts_BTCHW.shape[1])
    time_BT1HW = time_T[:, None, None, None].expand_as(counts_BTCHW[:, :, :1])
    return torch.cat([counts_BTCHW, time_BT1HW], 2)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slices", type=int, required=True)
    parser.add_argument("--gap", type=int, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    asked = parser.parse_args()
    folder = f"data/flashes-{asked.slices}-{asked.gap}"
    data = Events(folder, classes=8, steps=asked.slices, size=24, std=(0.2, 0.2))
    lengths = {"one slice": 1, "gap slices": asked.gap, "gap + 1 slices": asked.gap + 1}
    views = {name: windows(length) for name, length in lengths.items()}
    found = read(data, {**views, "slice and time": timed}, epochs=asked.epochs, seed=0)
    del found["slice and time"]
    seen = found.pop("gap + 1 slices")
    return int(max(found.values()) > BOUND or seen < SEEN)


if __name__ == "__main__":
    sys.exit(main())
