"""What a worker takes to move the weights, alone: it looks at the gradients
(`train/guards/anomaly.py`),
and its backend steps.

The engine of DeepSpeed does much beside its optimizer, which alone would be too little.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.forecast.bench import TIMED, UNTIMED, Bench
from pipeline.measure.collectives import collectives_on
from pipeline.measure.stopwatch import seconds_of
from pipeline.train.backend.collectives import Ranks, group_of_one
from pipeline.train.guards.anomaly import Guard, takes_back
from pipeline.train.loop import train


def moving_s(bench: Bench) -> float:
    """Seconds of one move, the median over batches that the recipe's own rule and backend train on;
    the weights rest.

    Raises: ValueError as of a launch: what the rule or the backend refuses; DoesNotFit where the
    batch does not fit into memory."""
    recipe, device = bench.recipe, bench.x_B.device
    with group_of_one(device.type), bench.in_memory(f"{recipe.name}'s move"):
        network, rule = bench.attached(recipe.rule)
        meters = bench.meters(network)
        with collectives_on(
            meters.clock
        ):  # what an engine alone says to itself is no part of the optimizer
            backend = bench.own_backend(network, rule)
            look = _Look(
                Guard(
                    backend, rule, Ranks(device=device.type), takes_back=takes_back(recipe, rule)
                ),
                device,
            )
            batches = ((step, bench.micro_batches()) for step in range(UNTIMED + TIMED))
            train(rule, backend, lambda step: None, batches, bench.loss, meters, look)
    of_batches = zip(look.seconds, look.moves, meters.clock.take(), strict=True)
    moves = [(looking + parts["optimizer"]) / moves for looking, moves, parts in of_batches]
    return statistics.median(moves[UNTIMED:])


class _Look:
    """A guard that is timed, and lets every batch pass: what is asked is what it takes, not whether
    the batch is good.
    """

    def __init__(self, guard: Guard, device: torch.device) -> None:
        self.guard, self.device = guard, device
        self.seconds, self.moves = list[float](), list[int]()
        """of each batch"""

    @contextmanager
    def batch(self, step: int) -> Iterator[None]:
        self.seconds.append(0.0)
        self.moves.append(0)
        with self.guard.batch(step):
            yield

    def keep(self) -> None:
        self._timed(self.guard.keep)

    def add(self, loss: Tensor, share: float) -> None:
        self.guard.add(loss, share)

    def check(self) -> None:
        self.moves[-1] += 1
        self._timed(self.guard.verdict)

    def _timed(self, act: Callable[[], object]) -> None:
        self.seconds[-1] += seconds_of(act, self.device)
