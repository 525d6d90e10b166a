"""The cost of a recipe's teacher, which is the same for every rule and T: one answer per batch,
without a graph.

Weights that would have to be downloaded are random here; they cost the same.
"""

# B batch

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.measure.clock import seconds_of
from pipeline.measure.memory import device_here
from pipeline.measure.tensor_bytes import bytes_of
from pipeline.models.teachers.base import Teacher
from pipeline.recipe.recipe import Recipe
from pipeline.train.tasks import tasks_of
from pipeline.train.teaching import build_teacher

TIMED = 5


@dataclass(frozen=True, kw_only=True)
class TeacherCost:
    """The cost of a teacher's answers for one batch."""

    teacher: str
    bytes: int  # of its weights and statistics
    seconds: float  # median, without a cache

    def describe(self) -> str:
        """One line under a table of rules."""
        return (
            f"the teacher, {self.teacher}, is in no row: beside every rule it holds "
            f"{self.bytes / 1e6:.4g} MB of weights "
            f"and answers for a batch in {self.seconds * 1e3:.4g} ms"
        )


def measure_teacher(recipe: Recipe, x_B: Tensor) -> TeacherCost | None:
    """Measure the recipe's teacher on a batch from the loader; None without a teacher."""
    if recipe.teacher is None:
        return None
    teacher = untrained_teacher(recipe).to(x_B.device)
    seconds = answer_seconds(teacher, x_B)
    return TeacherCost(teacher=teacher.label, bytes=teacher_bytes(teacher), seconds=seconds)


def untrained_teacher(recipe: Recipe) -> Teacher:
    """The recipe's teacher with random weights, and with a random head where one would be fitted.

    Raises: ValueError as `build_teacher`.
    """
    data = tasks_of(recipe)[0].data
    teacher = build_teacher(recipe.with_untrained_teacher(), data)
    if teacher.probe is not None:
        with torch.random.fork_rng(devices=[]):
            features = teacher.features(torch.zeros(1, *data.shape)).shape[-1]
            teacher.head = nn.Linear(features, data.classes)
    return teacher


def teacher_seconds(recipe: Recipe, samples: int) -> float:
    """Median seconds in which the recipe's teacher answers for random samples."""
    device = device_here()
    x_B = torch.rand(samples, *tasks_of(recipe)[0].data.shape, device=device)
    return answer_seconds(untrained_teacher(recipe).to(device), x_B)


@torch.no_grad()
def answer_seconds(teacher: Teacher, x_B: Tensor) -> float:
    """Median seconds of one answer."""
    teacher(x_B)  # warms up
    return statistics.median(seconds_of(lambda: teacher(x_B), x_B.device) for _ in range(TIMED))


def teacher_bytes(teacher: Teacher) -> int:
    """Bytes of the teacher's weights and statistics."""
    return bytes_of((*teacher.parameters(), *teacher.buffers()))
