"""The frozen teacher of the stamps study: how often it is right about objects that it has not seen,
and how sure it is.

Command:  python -m benchmarks.stamps_teacher [--split 3] [--size 160] [--l2 0.03 0.1 0.3]
          [--threads 1]
Result:   at 160 pixels, l2 0.1, splits 0, 1, 2: top-1 on unseen objects .5933, .6702, .6962; in
          training .9737, .9725, .9656, and entropy .6244, .6362, .6912, as of label smoothing
          .1202, .1231, .1364; commit eb0a1203d0de, one thread of 2 cores of an AMD EPYC, torch 2.13

`size` is what the teacher resizes the study's views to, without it their own. The seed is the
split, as in the study. Probes are fitted on the views of the first epoch; what the teacher answers
in training, how often it is right and how uncertain in the mean, in nats, is taken from those of
the second, which it was not fitted on as hardly any view of a run is. Label smoothing whose targets
are as uncertain stands beside it.
"""

import argparse
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.code_version import commit
from pipeline.measure.memory import device_here, hardware
from pipeline.models.teachers.probe import Probe
from pipeline.models.teachers.timm import TimmTeacher
from recipes.compare.sei_fashion_temperature import mean_entropy, smoothing_of
from recipes.stamps.base import CLASSES, SIZE, pictures, teacher

TOGETHER = 52  # divides both parts, so that no tail is left out of training's epoch


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("split", 3), ("size", SIZE), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--l2", type=float, nargs="+", default=[0.03, 0.1, 0.3])
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    data: Any = pictures(str(chosen.split)).build()
    network: TimmTeacher = teacher().with_(size=chosen.size, cache=None).build(data)
    train = partial(data.train, seed=chosen.split, batch_size=TOGETHER, micro_batch=TOGETHER)
    fitted_ND, fitted_N = features(network, train())
    train_ND, train_N = features(network, train(), epoch=1)
    val_MD, val_M = features(network, data.val(micro_batch=TOGETHER))
    print(
        f"split {chosen.split}, teacher at {chosen.size} pixels; {commit()};"
        f" {hardware(device_here())['cpu']}"
    )
    for l2 in chosen.l2:
        head = Probe(l2=l2).fit(fitted_ND, fitted_N, CLASSES)
        val_MK, train_NK = head(val_MD), head(train_ND)
        entropy = mean_entropy(train_NK)
        print(
            f"l2 {l2:g}: top-1 {top1(val_MK, val_M):.4f}, cross-entropy"
            f" {F.cross_entropy(val_MK, val_M).item():.3f} on {len(val_M)} pictures; in training,"
            f" on {len(train_N)} views, top-1 {top1(train_NK, train_N):.4f}, entropy {entropy:.4f},"
            f" as of label smoothing {smoothing_of(entropy, classes=CLASSES):.4f}"
        )


@torch.no_grad()
def features(network: TimmTeacher, loader: Any, *, epoch: int = 0) -> tuple[Tensor, Tensor]:
    with closing(loader), loader.epoch(epoch) as batches:
        found = [(network.features(batch.x), batch.target) for batch in batches]
    return torch.cat([feature for feature, _ in found]), torch.cat([target for _, target in found])


def top1(logits_NK: Tensor, target_N: Tensor) -> float:
    return (logits_NK.argmax(-1) == target_N).float().mean().item()


if __name__ == "__main__":
    main()
