"""What a recipe's teacher costs beside every rule: one answer a batch, whatever T, without a graph.

Its weights are fresh where the recipe's would have to be downloaded: they cost as much.
"""

# B batch

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.measure.clock import seconds_of
from pipeline.measure.tensor_bytes import bytes_of
from pipeline.models.teachers.base import Teacher
from pipeline.recipe.recipe import Recipe
from pipeline.train.tasks import tasks_of
from pipeline.train.teaching import build_teacher

TIMED = 5


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    """A teacher that answered for one batch."""

    teacher: str
    bytes: int  # of its weights and statistics
    seconds: float  # of its answers, the median of several; none where a cache holds them

    def describe(self) -> str:
        """A line under a table of rules."""
        return (
            f"the teacher, {self.teacher}, is in no row: beside every rule it holds "
            f"{self.bytes / 1e6:.4g} MB of weights "
            f"and answers for a batch in {self.seconds * 1e3:.4g} ms"
        )


def measure_teacher(recipe: Recipe, x_B: Tensor) -> TeacherCost | None:
    """What the recipe's teacher needs for this batch, as the loader gives it; None without one."""
    if recipe.teacher is None:
        return None
    teacher = untrained_teacher(recipe).to(x_B.device)
    seconds = answer_seconds(teacher, x_B)
    return TeacherCost(teacher=teacher.label, bytes=teacher_bytes(teacher), seconds=seconds)


def untrained_teacher(recipe: Recipe) -> Teacher:
    """The recipe's teacher with fresh weights, and with a fresh head where one would be fitted.

    Raises: ValueError as `build_teacher`.
    """
    data = tasks_of(recipe)[0].data
    teacher = build_teacher(recipe.with_untrained_teacher(), data)
    if teacher.probe is not None:
        with torch.random.fork_rng(devices=[]):
            features = teacher.features(torch.zeros(1, *data.shape)).shape[-1]
            teacher.head = nn.Linear(features, data.classes)
    return teacher


@torch.no_grad()
def answer_seconds(teacher: Teacher, x_B: Tensor) -> float:
    """Of one answer, the median of several."""
    teacher(x_B)  # warms up
    return statistics.median(seconds_of(lambda: teacher(x_B), x_B.device) for _ in range(TIMED))


def teacher_bytes(teacher: Teacher) -> int:
    return bytes_of((*teacher.parameters(), *teacher.buffers()))
