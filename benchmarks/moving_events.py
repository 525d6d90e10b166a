"""What readers without memory tell of moving shapes: half of the direction, and no more.

Command:  spiketrain write events moving --out data/moving
          python -m benchmarks.moving_events [--folder data/moving] [--epochs 8] [--held-out 0.1]
Result:   of the 1,600 test recordings: sum 0.4869, last slice 0.5063, late slices 0.4856, ten
          slices 0.9981; commit d4cd31c488fa, one core of an AMD EPYC, other work beside it, torch
          2.13

One convolutional network, trained anew by backpropagation on four views of the same recordings:

    sum          the counts summed over time
    last slice   what is seen in the last tenth of the time
    late slices  each slice of the later half alone, logits averaged: read late, with nothing
                 carried across steps
    ten slices   all of them, laid one upon another as channels

Opposite directions are exact reversals of each other, and a shape is anywhere at any time, so the
first three tell the direction 0.50 of the time at best; 0.53 leaves room for the error of 1600
recordings (standard error 0.0125). The fourth shows that the directions are there to be seen. Exits
with 1 when one of the three tells more than `BOUND`, or the fourth less than `SEEN`."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.code_version import commit
from pipeline.data.base import Loader
from pipeline.data.datasets.events import Events
from pipeline.measure.memory import device_here, hardware

BOUND, SEEN = 0.53, 0.90  # top-1
CLASSES, SIZE, STEPS, BATCH = 16, 34, 10, 64

# What a reader is given of a batch [B,T,C,H,W]: [B,V,C,H,W], V looks, the logits of which are
# averaged.
View = Callable[[Tensor], Tensor]
VIEWS: dict[str, View] = {
    "sum": lambda counts_BTCHW: counts_BTCHW.sum(1, keepdim=True),
    "last slice": lambda counts_BTCHW: counts_BTCHW[:, -1:],
    "late slices": lambda counts_BTCHW: counts_BTCHW[:, STEPS // 2 :],
    "ten slices": lambda counts_BTCHW: counts_BTCHW.flatten(1, 2).unsqueeze(1),
}


def network(channels: int, classes: int) -> nn.Module:
    """Three convolutions with batch norm; 112,192 weights for two channels and 16 classes."""
    layers: list[nn.Module] = []
    for before, width, kernel, stride in ((channels, 32, 5, 2), (32, 64, 3, 2), (64, 128, 3, 2)):
        layers += [
            nn.Conv2d(before, width, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(0.2), nn.Linear(9 * 128, classes)
    )


def top1(data: Events, view: View, *, epochs: int, seed: int) -> float:
    """Train on one view of the recordings, and evaluate once, at the end."""
    torch.manual_seed(seed)
    train, val = (
        data.train(seed=seed, batch_size=BATCH, micro_batch=BATCH),
        data.val(micro_batch=BATCH),
    )
    channels = view(torch.zeros(1, *data.shape)).shape[2]
    model = network(channels, data.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * train.steps_per_epoch)
    for epoch in range(epochs):
        with train.epoch(epoch) as batches:
            for batch in batches:
                loss = F.cross_entropy(_logits(model, batch.x, view), batch.target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return _accuracy(model.eval(), val, view)


def _logits(model: nn.Module, counts_BTCHW: Tensor, view: View) -> Tensor:
    looks_BVCHW = view(counts_BTCHW)
    return model(looks_BVCHW.flatten(0, 1)).unflatten(0, looks_BVCHW.shape[:2]).mean(1)


@torch.no_grad()
def _accuracy(model: nn.Module, loader: Loader, view: View) -> float:
    hits: list[Tensor] = []
    with loader.epoch(0) as batches:
        hits += [_logits(model, batch.x, view).argmax(1) == batch.target for batch in batches]
    return float(torch.cat(hits).float().mean())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="data/moving")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        help="evaluate on this share of the training set instead",
    )
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    data = Events(asked.folder, classes=CLASSES, steps=STEPS, size=SIZE, held_out=asked.held_out)
    found = read(data, VIEWS, epochs=asked.epochs, seed=asked.seed)
    seen = found.pop("ten slices")
    return int(max(found.values()) > BOUND or seen < SEEN)


def read(data: Events, views: Mapping[str, View], *, epochs: int, seed: int) -> dict[str, float]:
    """Print and return the top-1 of a reader of each view."""
    torch.set_num_threads(1)
    found = {}
    for name, view in views.items():
        began = time.monotonic()
        found[name] = top1(data, view, epochs=epochs, seed=seed)
        print(f"{name:<11}  top-1 {found[name]:.4f}   {time.monotonic() - began:.0f} s", flush=True)
    print(f"commit {commit()}, {hardware(device_here())}")
    return found


if __name__ == "__main__":
    sys.exit(main())
