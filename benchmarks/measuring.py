"""What measuring costs: training with its meters and without, and evaluations likewise, one of each in turn.

Command:  python -m benchmarks.measuring [--rule sltt|bptt] [--batches 1000] [--evaluations 20]
Result:   SLTT, commit a2179347b4aa, one thread of 2 cores of an Intel Xeon, nothing else running, torch 2.13, T = 4, batch 104

    training, ms a batch         +0.76 %  (88.72, 88.05 without); a batch whose operations are counted 142 ms more
    an evaluation, s             +4.11 %  (3.774, 3.625 without), the last one +5.00 %
    a run of 10 epochs           +1.00 %, at the bound
    a run of 1 epoch             +1.16 %, NOT under it: its one count of operations is a third of a percent

          training before, by the same meters: SLTT +0.57 %, BPTT +0.34 % (abe7edc24319, batch 152). With the spikes of every
          seventh sample as a view of the batch an evaluation took +2.28 % (SLTT) and +2.99 % (BPTT), of every sample +7.94 %

The meters are those of every run on a CPU. In training: the clock of the parts, read after every tenth batch, loss and hits,
saved bytes on one batch of 200, operations on one of 1000. A share of the sampled batches falls on every batch, so it is sums
that are compared, over a number of batches that both kinds of samples divide. At every evaluation: the spikes of every neuron
on one sample in eight, and the peaks of memory before it and after; at the last one the operations of 64 samples, too. An
evaluation is timed with the batch of training that follows it, which is given the memory back that the meters released. Batches
whose operations are counted are timed by themselves, too, for a short run has its share of them and more.

A run is so many epochs of 60,000 images, each with an evaluation of 10,000, as Fashion-MNIST has them, put together from what
was timed here; with one epoch its only evaluation is the last. The network is that of recipes/fashion/base.py, its batch so
large that one takes about 100 ms, on one thread; images are noise. Exits with 1 where measuring costs more than 1 % of training
or of a run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.overhead import RULES, timed, tuned_batch
from pipeline.backend.plain import Plain
from pipeline.code import commit
from pipeline.evaluate import evaluate
from pipeline.guards.batches import Unguarded
from pipeline.loop import Meters as LoopMeters
from pipeline.loop import MicroBatch, train
from pipeline.measure.memory import hardware
from pipeline.measure.meters import Meters
from pipeline.measure.sampled import OPERATIONS_EVERY
from pipeline.objective import CrossEntropy
from pipeline.run.settle import settle
from pipeline.spiking.encode import repeat
from recipes.fashion.base import fashion
from tests.silent import NoActivity, NoMeters

LOG_EVERY = 10
AIM = 0.01
TRAINED_ON, EVALUATED_ON = 60_000, 10_000  # images
EPOCHS = (1, 10)
ROUND, COUNTED = 3, 20
"""batches of which one has its operations counted, and how many such rounds are timed"""


class Trained:
    """One network and its rule, whoever measures them: of two networks one lies better in the caches than the other, which is
    as much as meters cost."""

    def __init__(self, network: nn.Module, rule_name: str, x_TB: Tensor, target_B: Tensor) -> None:
        self.network, self.rule = network, RULES[rule_name]()
        self.rule.attach(network)
        self.backend = Plain(network, lambda network: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9))
        self.micro_batches = [MicroBatch(x_TB, target_B, range(len(target_B)), 1.0)]


class Measured:
    """What is done with it under some meters."""

    def __init__(self, trained: Trained, meters: LoopMeters) -> None:
        self.trained, self.meters = trained, meters
        self.steps = 0

    def step(self) -> None:
        """Train on one batch."""
        train(
            self.trained.rule,
            self.trained.backend,
            lambda step: None,
            [(self.steps, self.trained.micro_batches)],
            CrossEntropy(),
            self.meters,
            Unguarded(),
        )
        self.steps += 1
        if isinstance(self.meters, Meters) and self.steps % LOG_EVERY == 0:
            self.meters.take(lambda sums: sums)

    def steps_of(self, batches: int) -> None:
        for _ in range(batches):
            self.step()

    def evaluate(self, *, is_last: bool = False) -> None:
        """As pipeline/run/assess.py does, and train on the next batch."""
        x_TB, target_B, *_ = self.trained.micro_batches[0]
        ids = torch.arange(EVALUATED_ON).split(len(target_B))
        batches = ((x_TB[:, : len(index_B)], target_B[: len(index_B)], index_B) for index_B in ids)
        measures = isinstance(self.meters, Meters)
        if isinstance(self.meters, Meters):
            self.meters.note_peaks()
        with nullcontext() if measures else patch("pipeline.evaluate.Activity", NoActivity):
            evaluate(self.trained.network, batches, CrossEntropy(), counts_operations=is_last)
        if isinstance(self.meters, Meters):
            self.meters.forget_peaks()
        self.step()


def in_turn(times: int, *acts: Callable[[], None]) -> list[float]:
    """Mean seconds of each; none of them is always the one with the warmer cache."""
    seconds: list[list[float]] = [[] for _ in acts]
    for index in range(times):
        for place in range(len(acts)):
            which = (index + place) % len(acts)
            seconds[which].append(timed(acts[which]))
    return [statistics.fmean(each) for each in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rule", choices=sorted(RULES), default="sltt")
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--evaluations", type=int, default=20)
    arguments = parser.parse_args()
    settle(1)
    recipe = fashion()
    size = tuned_batch(recipe, arguments.rule)
    torch.manual_seed(0)
    x_TB, target_B = repeat(torch.randn(size, 1, 28, 28), recipe.time_steps), torch.randint(10, (size,))
    trained = Trained(recipe.model.build(), arguments.rule, x_TB, target_B)

    meters = partial(Meters, trained.network, batch_size=size, device=torch.device("cpu"))
    measured, silent = Measured(trained, meters()), Measured(trained, NoMeters())
    counting = Measured(trained, meters(memory_every=10**9, operations_every=ROUND))
    for each in (silent, counting):
        each.steps_of(ROUND)
    machine = hardware()
    print(
        f"{arguments.rule.upper()}, T = {recipe.time_steps}, batch {size}, commit {commit()}, {machine['cpu']}, "
        f"torch {machine['torch']}"
    )
    trains, trains_silently = in_turn(arguments.batches, measured.step, silent.step)
    in_training = trains / trains_silently - 1
    print(
        f"training, {arguments.batches} batches of each in turn: {trains * 1e3:.2f} ms with meters, "
        f"{trains_silently * 1e3:.2f} ms without, {in_training:+.2%}"
    )
    counts, beside = in_turn(COUNTED, lambda: counting.steps_of(ROUND), lambda: silent.steps_of(ROUND))
    count = counts - beside
    print(f"counting the operations of a batch takes {count * 1e3:.0f} ms more, {count / trains_silently:.0%} of a batch")
    evaluates, evaluates_last, evaluates_silently = in_turn(
        arguments.evaluations, measured.evaluate, lambda: measured.evaluate(is_last=True), silent.evaluate
    )
    print(
        f"evaluation and the batch after it, {arguments.evaluations} of each in turn: {evaluates:.3f} s with meters, "
        f"{evaluates_last:.3f} s for the last, {evaluates_silently:.3f} s without, "
        f"{evaluates / evaluates_silently - 1:+.2%} and {evaluates_last / evaluates_silently - 1:+.2%}"
    )
    steps = TRAINED_ON // size - 1  # one of an epoch's is timed with the evaluation before it
    plain = trains - count * math.ceil((arguments.batches - 2) / OPERATIONS_EVERY) / arguments.batches
    shares = {}
    for epochs in EPOCHS:
        counted = math.ceil((epochs * TRAINED_ON // size - 2) / OPERATIONS_EVERY)
        whole = epochs * steps * plain + counted * count + (epochs - 1) * evaluates + evaluates_last
        shares[epochs] = whole / (epochs * (steps * trains_silently + evaluates_silently)) - 1
        print(f"a run of {epochs} epochs, each with an evaluation: {shares[epochs]:+.2%}")
    sys.exit(max(in_training, *shares.values()) > AIM)


if __name__ == "__main__":
    main()
