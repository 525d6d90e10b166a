"""What SLTT's slices cost: time of SLTT and SLTT-1 against the faster BPTT, on the network of the Fashion-MNIST claims.

Command:  python -m benchmarks.sltt [--batches 40] [--size 128] [--steps 6]
Result:   SLTT 0.992 and SLTT-1 0.517 of the faster BPTT, which is the one step by step (153.8 ms, folded 158.5); 60 batches, one
          thread of 2 cores of an Intel Xeon, torch 2.13, commit 4032ee417d7f

Four copies of the network of recipes/compare/claims_fashion.py with the same weights see the same images, batch after batch: by
BPTT folded over time and step by step, by SLTT, and by SLTT-1. Who comes first moves on by one each batch, so that drift of the
machine falls on all alike. Timed are forward, loss and backward of all T steps. Exits with 1 when SLTT takes longer than the
faster BPTT.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.trainee import Trainee
from pipeline.code import commit
from pipeline.measure.memory import hardware
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.run.settle import settle
from pipeline.spiking.encode import repeat
from recipes.fashion.base import fashion

WARM_UP = 4
RULES: dict[str, Rule] = {
    "BPTT": BPTT(),
    "BPTT, step by step": BPTT(chunk=1),
    "SLTT": SLTT(),
    "SLTT-1": SLTT(k=1, rescale=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    settle(arguments.threads)
    sys.exit(compare(arguments.batches, size=arguments.size, steps=arguments.steps) > 1)


def compare(batches: int, *, size: int, steps: int) -> float:
    """SLTT's median time over the faster BPTT's."""
    trainees = {name: trainee_of(rule) for name, rule in RULES.items()}
    for index in range(WARM_UP + batches):
        x_TB, target_B = repeat(torch.randn(size, 1, 28, 28), steps), torch.randint(10, (size,))
        each = list(trainees.values())
        first = index % len(each)
        for trainee in each[first:] + each[:first]:
            trainee.learn(x_TB, target_B)
    medians = {name: trainee.median(warm_up=WARM_UP) for name, trainee in trainees.items()}
    bptt = min(medians["BPTT"], medians["BPTT, step by step"])
    machine = hardware()
    for name, seconds in medians.items():
        print(f"{name:20} {1e3 * seconds:6.1f} ms a batch, {seconds / bptt:.3f} of the faster BPTT")
    print(
        f"T = {steps}, {size} images, {batches} batches in turn, {torch.get_num_threads()} threads; "
        f"commit {commit()}, {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}"
    )
    return medians["SLTT"] / bptt


def trainee_of(rule: Rule) -> Trainee:
    """One with the same weights at each call."""
    torch.manual_seed(0)
    return Trainee(fashion().model.build(), rule)


if __name__ == "__main__":
    main()
