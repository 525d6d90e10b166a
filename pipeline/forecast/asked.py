"""What a recipe's teacher needs beside every rule: it is asked once a batch, whatever T, and no
graph is kept of its answers.

Its weights are fresh where those of the recipe would have to be had: what they are costs nothing.
"""

# B batch

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.core.torch_settings import Precision
from pipeline.measure.memory_breakdown import bytes_of
from pipeline.measure.stopwatch import seconds_of
from pipeline.measure.traffic import Traffic
from pipeline.recipe.recipe import Recipe
from pipeline.train.tasks import tasks_of
from pipeline.train.teaching import build_teacher

TIMED = 5


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A teacher that answered for one batch."""

    teacher: str
    bytes: int
    """of its weights and statistics"""
    seconds: float
    """of its answers, the median of several; none where a cache holds them"""

    def told(self) -> str:
        """A line under a table of rules."""
        return (
            f"the teacher, {self.teacher}, is in no row: beside every rule it holds"
            f" {self.bytes / 1e6:.4g} MB of weights and answers for a batch in"
            f" {self.seconds * 1e3:.4g} ms"
        )


def asked(recipe: Recipe, x_B: Tensor) -> Asked | None:
    """What the recipe's teacher needs for this batch, as the loader gives it; None without one."""
    if recipe.teacher is None:
        return None
    asking = Asking(recipe, x_B.device)
    return Asked(teacher=asking.label, bytes=asking.bytes, seconds=asking.seconds(x_B))


class Asking:
    """The teacher of a recipe, to be asked about batches.

    Raises: ValueError as `build_teacher`.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        data = tasks_of(recipe)[0].data
        teacher = build_teacher(recipe.with_untrained_teacher(), data)
        if teacher.probe is not None:  # a head as large as that which would be fitted
            with torch.random.fork_rng(devices=[]):
                teacher.head = nn.Linear(
                    teacher.features(torch.zeros(1, *data.shape)).shape[-1], data.classes
                )
        self._teacher, self._device = teacher.to(device), device

    @property
    def label(self) -> str:
        return self._teacher.label

    @property
    def bytes(self) -> int:
        return bytes_of((*self._teacher.parameters(), *self._teacher.buffers()))

    @property
    def precision(self) -> Precision:
        """In which it computes."""
        return self._teacher.precision

    @torch.no_grad()
    def seconds(self, x_B: Tensor) -> float:
        self._teacher(x_B)  # warms up
        return statistics.median(
            seconds_of(lambda: self._teacher(x_B), self._device) for _ in range(TIMED)
        )

    @torch.no_grad()
    def traffic(self, x_B: Tensor) -> Traffic:
        """What a device has to do for its answers."""
        with Traffic() as traffic:
            self._teacher(x_B)
        return traffic
