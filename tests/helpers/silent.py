"""The loop and an evaluation alone, with meters that measure nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from pipeline.measure.meters import Meters
from pipeline.rules.base import LossTerm, Rule
from pipeline.train.backend.base import Backend
from pipeline.train.loop import Guard, MicroBatch, train_batch
from pipeline.train.objective import CrossEntropy


class NoMeters(Meters):
    def __init__(self) -> None:
        pass

    def batch(self, step: int) -> Any:
        return nullcontext()

    def part(self, name: str) -> Any:
        return nullcontext()

    def each(self, name: str, source: Any) -> Any:
        return source

    def add(self, term: LossTerm) -> None:
        pass

    def end_of_micro_batch(self, target_B: Tensor, share: float) -> None:
        pass


def micro_batches(
    x_TB: Tensor, target_B: Tensor, *, rank: int = 0, ranks: int = 1, accumulation: int = 1
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of a global batch."""
    size = len(target_B) // ranks // accumulation
    for index in range(accumulation):
        rows = range((index * ranks + rank) * size, (index * ranks + rank + 1) * size)
        part = slice(rows.start, rows.stop)
        yield MicroBatch(x_TB[:, part], target_B[part], rows, size / len(target_B))


def train(
    rule: Rule,
    backend: Backend,
    batches: Iterable[tuple[int, Iterable[MicroBatch]]],
    meters: Meters = NoMeters(),
    guard: Guard = Guard(),
) -> None:
    """Train on (step, micro-batches) of each global batch, with the optimizer's learning rate."""
    schedule = lambda step: None
    for step, micro_batches in batches:
        train_batch(rule, backend, schedule, step, micro_batches, CrossEntropy(), meters, guard)


class NoActivity:
    """Fits what `pipeline.train.evaluation` asks of `Activity`."""

    def __init__(self, network: nn.Module, *, every: int) -> None:
        pass

    def __enter__(self) -> NoActivity:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def batch(self, index_B: Tensor) -> Any:
        return nullcontext()

    def layers(self, total: Any, largest: Any) -> tuple[()]:
        return ()
