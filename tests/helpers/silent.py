"""Meters that measure nothing, where the loop or an evaluation alone is on trial."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from pipeline.rules.base import LossTerm


class NoMeters:
    """Fits the loop's Protocol."""

    def batch(self, step: int) -> Any:
        return nullcontext()

    def part(self, name: str) -> Any:
        return nullcontext()

    def each(self, name: str, source: Any) -> Any:
        return source

    def add(self, objective: LossTerm) -> None:
        pass

    def end_of_micro_batch(self, target_B: Tensor, share: float) -> None:
        pass


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
