"""Learning rates as functions of the step, and of nothing else."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from pipeline.train.schedule import constant, cosine, milestones, staircase
from tests.helpers.rule_networks import refusals


def rates(
    schedule_of, steps: int, asked: list[int], *, steps_per_epoch: int = 10, **kwargs: Any
) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = schedule_of(optimizer, steps, steps_per_epoch, **kwargs)
    found = []
    for step in asked:
        schedule(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def cosine_of(lr: float, min_lr: float, share: float) -> float:
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * share))


@pytest.mark.parametrize(
    ("kwargs", "warmup", "after"),
    [
        ({"warmup": 0.1, "min_lr": 0.01}, 10, lambda step: cosine_of(0.2, 0.01, step / 100)),
        # Each epoch has the rate of its first step, and the warm-up is within the first epoch, as
        # in DSR's published code for ImageNet: lr/2 (1 + cos(pi epoch / epochs)).
        (
            {"steps_per_epoch": 20, "warmup": 0.05, "update_every": "epoch"},
            5,
            lambda step: cosine_of(0.2, 0.0, (step // 20) / 5),
        ),
        # As QKFormer's published code: at the end of the warm-up the rate is the optimizer's own.
        (
            {"warmup": 0.1, "min_lr": 0.01, "warmup_prefix": True},
            10,
            lambda step: cosine_of(0.2, 0.01, (step - 10) / 90),
        ),
    ],
)
def test_cosine_with_warm_up(
    kwargs: dict[str, Any], warmup: int, after: Callable[[int], float]
) -> None:
    wanted = [0.2 * step / warmup if step < warmup else after(step) for step in range(100)]
    assert rates(cosine, 100, list(range(100)), **kwargs) == pytest.approx(wanted)


test_refuses = refusals(
    [
        (
            lambda: rates(cosine, 10, [0], update_every="batch"),
            "cosine: update_every must be .* or .*; got 'batch'",
        ),
        (
            lambda: rates(cosine, 10, [0], warmup=5),
            r"cosine: warmup is a share of the run and must be in 0\.\.1; got warmup=5",
        ),
        (
            lambda: rates(partial(milestones, at=(0.75, 0.5)), 100, [0]),
            r"milestones: at must be in ascending order; got at=\(0\.75, 0\.5\)",
        ),
    ]
)


def test_staircase_and_constant() -> None:
    assert rates(staircase, 90, [0, 29, 30, 59, 60, 89]) == pytest.approx(
        [0.2, 0.2, 0.02, 0.02, 0.002, 0.002]
    )
    assert rates(constant, 90, [0, 50, 89]) == [0.2, 0.2, 0.2]


def test_milestones() -> None:
    assert rates(
        partial(milestones, at=(0.5, 0.75)), 100, [0, 5, 10, 49, 50, 74, 75, 99], warmup=0.1
    ) == pytest.approx([0.0, 0.1, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    assert rates(partial(milestones, at=(0.5,), factor=0.5), 100, [0, 49, 50]) == pytest.approx(
        [0.2, 0.2, 0.1]
    )


@pytest.mark.parametrize("schedule_of", [cosine, staircase, partial(milestones, at=(0.3, 0.6))])
def test_what_was_asked_before_does_not_matter(schedule_of) -> None:
    assert rates(schedule_of, 50, [3, 40, 7, 22])[-1] == rates(schedule_of, 50, [22])[0]
