"""Learning rates as functions of the step, and of nothing else."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from pipeline.train.schedule import constant, cosine, milestones, staircase


def rates(
    schedule_of, steps: int, asked: list[int], *, epoch_steps: int = 10, **kwargs: Any
) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = schedule_of(optimizer, steps, epoch_steps, **kwargs)
    found = []
    for step in asked:
        schedule(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_cosine_with_warm_up() -> None:
    found = rates(cosine, 100, list(range(100)), warmup=0.1, floor=0.01)
    assert found[:10] == pytest.approx([0.2 * step / 10 for step in range(10)])
    expected = [
        0.01 + 0.5 * (0.2 - 0.01) * (1 + math.cos(math.pi * step / 100)) for step in range(10, 100)
    ]
    assert found[10:] == pytest.approx(expected)


def test_a_cosine_by_epoch_is_that_of_each_epochs_first_step_and_warms_up_by_step() -> None:
    """As DSR's published code for ImageNet: lr/2 (1 + cos(pi epoch / epochs)), and a warm-up within
    the first epoch.
    """
    found = rates(cosine, 100, list(range(100)), epoch_steps=20, warmup=0.05, by="epoch")
    expected = [0.2 * step / 5 for step in range(5)]
    expected += [0.1 * (1 + math.cos(math.pi * (step // 20) / 5)) for step in range(5, 100)]
    assert found == pytest.approx(expected)


def test_a_cosine_may_start_where_the_warm_up_ends() -> None:
    """As QKFormer's published code: at the end of the warm-up the rate is the optimizer's own."""
    found = rates(cosine, 100, list(range(100)), warmup=0.1, floor=0.01, starts="after_warmup")
    expected = [0.2 * step / 10 for step in range(10)]
    expected += [
        0.01 + 0.5 * 0.19 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in range(10, 100)
    ]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("name", "value"), [("by", "batch"), ("starts", "later")])
def test_cosine_refuses_other_words(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"cosine: {name} must be '\w+' or '\w+'; got '{value}'"):
        rates(cosine, 10, [0], **{name: value})


def test_staircase_and_constant() -> None:
    assert rates(staircase, 90, [0, 29, 30, 59, 60, 89]) == pytest.approx(
        [0.2, 0.2, 0.02, 0.02, 0.002, 0.002]
    )
    assert rates(constant, 90, [0, 50, 89]) == [0.2, 0.2, 0.2]


def test_milestones() -> None:
    asked = [0, 5, 10, 49, 50, 74, 75, 99]
    found = rates(partial(milestones, at=(0.5, 0.75)), 100, asked, warmup=0.1)
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    assert rates(partial(milestones, at=(0.5,), factor=0.5), 100, [0, 49, 50]) == pytest.approx(
        [0.2, 0.2, 0.1]
    )
    with pytest.raises(ValueError, match=r"milestones: at must rise; got at=\(0\.75, 0\.5\)"):
        rates(partial(milestones, at=(0.75, 0.5)), 100, [0])


@pytest.mark.parametrize("schedule_of", [cosine, staircase, partial(milestones, at=(0.3, 0.6))])
def test_what_was_asked_before_does_not_matter(schedule_of) -> None:
    assert rates(schedule_of, 50, [3, 40, 7, 22])[-1] == rates(schedule_of, 50, [22])[0]


def test_a_share_beyond_the_run_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"cosine: warmup is a share of the run and must be in 0\.\.1; got 5"
    ):
        rates(cosine, 10, [0], warmup=5)
