"""What measuring costs: the training loop with its meters and without, one batch of each in turn.

Command:  python -m benchmarks.measuring [--rule sltt|bptt] [--batches 1000]
Result:   SLTT +0.82 % (95.01 ms with meters, 94.24 ms without, T = 4, batch 104), BPTT +0.58 % (101.41 and 100.82 ms, batch 96),
          under the 1 % that is aimed at; commit 5ab7dbd52225, one thread of 2 cores of an Intel Xeon with nothing else running,
          torch 2.13. SLTT +0.85 % at commit 0938e54ac260 on that Xeon, +0.46 % at commit 12c68ad6952d on an AMD EPYC

The meters are those of every run on a CPU: the clock of the parts, read after every tenth batch, loss and hits, saved bytes on
one batch of 200, operations on one of 1000; evaluation, which counts the spikes of every neuron, is not in it. A share of the
sampled batches falls on every batch, so it is sums that are compared, over a number of batches that both kinds of samples divide.
The network is that of recipes/fashion/base.py, its batch so large that one takes about 100 ms, on one thread. Exits with 1 where
measuring costs more than 1 %.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch
from torch import Tensor, nn

from benchmarks.overhead import RULES, tuned_batch
from pipeline.backend.plain import Plain
from pipeline.code import commit
from pipeline.guards.batches import Unguarded
from pipeline.loop import Meters as LoopMeters
from pipeline.loop import MicroBatch, train
from pipeline.measure.memory import hardware
from pipeline.measure.meters import Meters
from pipeline.objective import CrossEntropy
from pipeline.spiking.encode import repeat
from recipes.fashion.base import fashion
from tests.silent import NoMeters

LOG_EVERY = 10
AIM = 0.01


class Trained:
    """One of the two: a network, its rule and its meters; `step()` trains on one batch and gives its seconds."""

    def __init__(self, network: nn.Module, rule_name: str, meters: LoopMeters, x_TB: Tensor, target_B: Tensor) -> None:
        self.rule = RULES[rule_name]()
        self.rule.attach(network)
        self.backend = Plain(network, lambda network: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9))
        self.meters = meters
        self.micro_batches = [MicroBatch(x_TB, target_B, range(len(target_B)), 1.0)]
        self.steps = 0

    def step(self) -> float:
        begun = time.perf_counter()
        train(
            self.rule,
            self.backend,
            lambda step: None,
            [(self.steps, self.micro_batches)],
            CrossEntropy(),
            self.meters,
            Unguarded(),
        )
        self.steps += 1
        if isinstance(self.meters, Meters) and self.steps % LOG_EVERY == 0:
            self.meters.take(lambda sums: sums)
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rule", choices=sorted(RULES), default="sltt")
    parser.add_argument("--batches", type=int, default=1000)
    arguments = parser.parse_args()
    recipe = fashion()
    size = tuned_batch(recipe, arguments.rule)
    torch.manual_seed(0)
    x_TB, target_B = repeat(torch.randn(size, 1, 28, 28), recipe.time_steps), torch.randint(10, (size,))
    network = recipe.model.build()
    other = copy.deepcopy(network)
    meters = Meters(network, batch_size=size, device=torch.device("cpu"))
    measured = Trained(network, arguments.rule, meters, x_TB, target_B)
    silent = Trained(other, arguments.rule, NoMeters(), x_TB, target_B)
    silent.step()
    pairs: list[tuple[float, float]] = []
    for index in range(arguments.batches):
        order = (measured, silent) if index % 2 else (silent, measured)  # neither is always the one with the warmer cache
        seconds = {one is measured: one.step() for one in order}
        pairs.append((seconds[True], seconds[False]))
    with_meters, without = (sum(column) for column in zip(*pairs, strict=True))
    cost, machine = with_meters / without - 1, hardware()
    print(
        f"{arguments.rule.upper()}, T = {recipe.time_steps}, batch {size}, {arguments.batches} batches of each in turn: "
        f"{with_meters / len(pairs) * 1e3:.2f} ms with meters, {without / len(pairs) * 1e3:.2f} ms without, "
        f"{cost:+.2%} (commit {commit()}, {machine['cpu']}, torch {machine['torch']})"
    )
    sys.exit(cost > AIM)


if __name__ == "__main__":
    main()
