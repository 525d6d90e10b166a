"""What measuring costs: training with its meters and without, and evaluations likewise, one of each
in turn.

Command:  python -m benchmarks.measuring [--rule sltt|bptt] [--processes 6] [--batches 200]
          [--evaluations 4]
Result:   one thread of 2 cores of an AMD EPYC, torch 2.13, T = 4

    SLTT, batch 168, commit 287f1a37561f, 3 processes, batches of 97 to 99 ms:

    a long training       +0.13 %, of a process +0.06 to +0.26 %
    an evaluation         +3.27 %, of a process +2.72 to +3.78 %
    a run of 1 epoch      +0.53 %, of a process +0.42 to +0.67 %
    a run of 10 epochs    +0.34 %, of a process +0.26 to +0.49 %

    At d092e0416fb7, batch 304: +0.17, +3.39, +0.51 and +0.40 %.
    At 17cea4861c18, batch 240: +0.38, +3.70, +0.87 and +0.64 %. Before, on an Intel Xeon, without
    what reading the clock takes: +0.48, +3.80, +0.87 and +0.72 % (14580ba4833a, 4 processes);
    before the clock's boundaries took fewer calls (aa085d6a9b29): +0.78, +1.48, +1.09 and +0.85 %.
    One process, on a quiet day: BPTT +0.39 % of training, +0.74 % of a run of 1 epoch
    (5794d42b0e93). On a busy one, 4 processes: +1.49 % and +1.99 % (0340ab195497). It depends on
    how cold the caches are when a meter has its turn.

The meters are those of every run on a CPU. In training: the clock of the parts, read after every
tenth batch (which is timed by itself: of turns of one batch the middle half would leave it out),
loss and hits, saved bytes on one batch of 200, operations on one of 1000. At every evaluation: the
spikes of every neuron on one sample in eight, and the peaks of memory before it and after; at the
last one the operations of 64 samples, too. An evaluation is timed with the batch of training that
follows it. Batches with meters and without are trained in turn, of one network; the others, of
which something is counted, are timed by themselves, and a run has its share of them.

A run is so many epochs of 60,000 images, each with an evaluation of 10,000, as Fashion-MNIST has
them, put together from what was timed here; with one epoch its only evaluation is the last. The
network is that of recipes/fashion/base.py, its batch so large that one takes about 100 ms, on one
thread; images are noise. Of what is timed the middle half counts, and of processes, whose memory
lies differently, the mean. Exits with 1 where measuring costs more than 1 % of training or of a
run."""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.overhead import RULES, timed, tuned_batch
from pipeline.core.code_version import commit
from pipeline.core.torch_settings import configure_torch
from pipeline.measure.constants import MEMORY_EVERY, OPERATIONS_EVERY
from pipeline.measure.memory import device_here, hardware
from pipeline.measure.meters import Meters
from pipeline.spiking.encode import repeat
from pipeline.train.backend.plain import Plain
from pipeline.train.evaluation import evaluate
from pipeline.train.loop import MicroBatch
from pipeline.train.objective import CrossEntropy
from recipes.fashion.base import fashion
from tests.helpers.silent import NoActivity, NoMeters, train

LOG_EVERY = 10
TAKES = 5
AIM = 0.01
TRAINED_ON, EVALUATED_ON = 60_000, 10_000  # images
EPOCHS = (1, 10)
ROUND = 3
"""batches of which one is counted"""


class Trained:
    """One network and its rule, whoever measures them: of two networks one lies better in the
    caches than the other, which is as much as meters cost."""

    def __init__(self, network: nn.Module, rule_name: str, x_TB: Tensor, target_B: Tensor) -> None:
        self.network, self.rule = network, RULES[rule_name]()
        self.rule.attach(network)
        self.backend = Plain(
            network, lambda network: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        )
        self.micro_batches = [MicroBatch(x_TB, target_B, range(len(target_B)), 1.0)]


class Measured:
    """What is done with it under some meters."""

    def __init__(self, trained: Trained, meters: Meters) -> None:
        self.trained, self.meters = trained, meters
        self.steps = 0

    def step(self) -> None:
        """Train on one batch."""
        batch = (self.steps, self.trained.micro_batches)
        train(self.trained.rule, self.trained.backend, [batch], self.meters)
        self.steps += 1

    def steps_of(self, batches: int) -> None:
        for _ in range(batches):
            self.step()

    def evaluate(self, *, is_last: bool = False) -> None:
        """As pipeline/train/evaluation.py does, and train on the next batch."""
        x_TB, target_B, *_ = self.trained.micro_batches[0]
        ids = torch.arange(EVALUATED_ON).split(len(target_B))
        batches = ((x_TB[:, : len(index_B)], target_B[: len(index_B)], index_B) for index_B in ids)
        measures = not isinstance(self.meters, NoMeters)
        if measures:
            peak_bytes = self.meters.totals.peak_rss_bytes
            self.meters.note_peaks()
            self.meters.totals.peak_rss_bytes = (
                peak_bytes  # whoever evaluates without meters leaves its peak to the next
            )
        with nullcontext() if measures else patch("pipeline.train.evaluation.Activity", NoActivity):
            evaluate(self.trained.network, batches, CrossEntropy(), counts_operations=is_last)
        if measures:
            self.meters.forget_peaks()
        self.step()


def in_turn(
    times: int, silent: Callable[[], None], *acts: Callable[[], None]
) -> tuple[float, list[float]]:
    """Seconds of the silent one, and how many more each of the others takes than the silent one of
    the same turn: means of the middle half. None of them is always the one with the warmer
    cache."""
    seconds: list[list[float]] = [[] for _ in (silent, *acts)]
    for index in range(times):
        for place in range(len(seconds)):
            which = (index + place) % len(seconds)
            seconds[which].append(timed((silent, *acts)[which]))
    beside, *measured = seconds
    more = [_middle([a - b for a, b in zip(each, beside, strict=True)]) for each in measured]
    return _middle(beside), more


def _middle(values: list[float]) -> float:
    """Another process's turn in the middle of a batch is as much as meters cost in a hundred."""
    quarter = len(values) // 4
    return statistics.fmean(sorted(values)[quarter : len(values) - quarter])


class Costs(NamedTuple):
    """Of one process; seconds. `more`: than the same without meters."""

    batch: float
    batch_more: float
    bytes_more: float
    """of a batch whose bytes are counted, beside `batch_more`"""
    operations_more: float
    evaluation: float
    """and the batch after it"""
    evaluation_more: float
    last_more: float
    """of the last evaluation of a run"""


def costs(rule_name: str, size: int, batches: int, evaluations: int) -> Costs:
    """In a process of its own."""
    configure_torch(1, torch.device("cpu"))
    recipe = fashion()
    x_TB, target_B = (
        repeat(torch.randn(size, 1, 28, 28), recipe.time_steps),
        torch.randint(10, (size,)),
    )
    trained = Trained(recipe.model.build(), rule_name, x_TB, target_B)
    never = 10**9
    meters = partial(Meters, trained.network, batch_size=size, device=torch.device("cpu"))
    silent = Measured(trained, NoMeters())
    uncounted = meters(memory_every=never, operations_every=never)
    plain = Measured(trained, uncounted)
    of_bytes = Measured(trained, meters(memory_every=ROUND, operations_every=never))
    of_operations = Measured(trained, meters(memory_every=never, operations_every=ROUND))
    for each in (silent, plain, of_bytes, of_operations):
        each.steps_of(ROUND)
    batch, (step_more,) = in_turn(batches, silent.step, plain.step)
    batch_more = step_more + _seconds_of_take(plain, uncounted) / LOG_EVERY
    uncounted.note_peaks()
    _, counted_more = in_turn(
        evaluations, *(partial(each.steps_of, ROUND) for each in (silent, of_bytes, of_operations))
    )
    bytes_more, operations_more = (more - ROUND * step_more for more in counted_more)
    evaluation, (evaluation_more, last_more) = in_turn(
        evaluations, silent.evaluate, plain.evaluate, partial(plain.evaluate, is_last=True)
    )
    return Costs(
        batch, batch_more, bytes_more, operations_more, evaluation, evaluation_more, last_more
    )


def _seconds_of_take(plain: Measured, meters: Meters) -> float:
    """By itself: of turns of one batch the middle half would leave out the tenth that it belongs
    to.
    """

    def take() -> None:
        meters.take(lambda sums: sums)

    take()  # what came before
    seconds: list[float] = []
    for _ in range(TAKES):
        plain.steps_of(LOG_EVERY)
        seconds.append(timed(take))
    return statistics.fmean(seconds)


def share_of_training(found: Costs) -> float:
    """What measuring adds to a long training, a share of it."""
    more = (
        found.batch_more
        + found.bytes_more / MEMORY_EVERY
        + found.operations_more / OPERATIONS_EVERY
    )
    return more / found.batch


def share_of_a_run(found: Costs, *, epochs: int, size: int) -> float:
    """And to so many epochs with an evaluation after each."""
    steps = epochs * (TRAINED_ON // size)
    plain = steps - epochs  # but for those that an evaluation is timed with
    more = plain * found.batch_more + (epochs - 1) * found.evaluation_more + found.last_more
    more += math.ceil((steps - 1) / MEMORY_EVERY) * found.bytes_more
    more += math.ceil((steps - 2) / OPERATIONS_EVERY) * found.operations_more
    return more / (plain * found.batch + epochs * found.evaluation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rule", choices=sorted(RULES), default="sltt")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--evaluations", type=int, default=4)
    arguments = parser.parse_args()
    configure_torch(1, torch.device("cpu"))
    recipe, machine = fashion(), hardware(device_here())
    size = tuned_batch(recipe, arguments.rule)
    print(
        f"{arguments.rule.upper()}, T = {recipe.time_steps}, batch {size}, commit {commit()},"
        f" {machine['cpu']}, torch {machine['torch']}; {arguments.processes} processes, of each"
        f" {arguments.batches} batches and {arguments.evaluations} evaluations with meters and"
        " without, in turn"
    )
    shares: dict[str, list[float]] = {}
    # One after the other, each anew: where a process's memory lies is as much as meters cost.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as starts:
        for _ in range(arguments.processes):
            found = starts.submit(
                costs, arguments.rule, size, arguments.batches, arguments.evaluations
            ).result()
            print(
                f"a batch {found.batch * 1e3:.1f} ms {found.batch_more * 1e3:+.2f}, whose bytes are"
                f" counted {found.bytes_more * 1e3:+.0f}, whose operations are"
                f" {found.operations_more * 1e3:+.0f}; an evaluation and the batch after it"
                f" {found.evaluation:.3f} s {found.evaluation_more * 1e3:+.0f} ms, the last"
                f" {found.last_more * 1e3:+.0f}",
                flush=True,
            )
            shares.setdefault("a long training", []).append(share_of_training(found))
            shares.setdefault("an evaluation", []).append(found.evaluation_more / found.evaluation)
            for epochs in EPOCHS:
                share = share_of_a_run(found, epochs=epochs, size=size)
                shares.setdefault(f"a run, epochs with an evaluation: {epochs}", []).append(share)
    means = {}
    for what, each in shares.items():
        means[what] = statistics.fmean(each)
        print(f"{what:40}{means[what]:+.2%}, of a process {min(each):+.2%} to {max(each):+.2%}")
    means.pop("an evaluation")  # which runs have as a part
    sys.exit(max(means.values()) > AIM)


if __name__ == "__main__":
    main()
