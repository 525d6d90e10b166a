"""Schedules of the learning rate. `Schedule(step)` sets the rate as a function of the step, so
a resume needs no state.

A function here takes the optimizer, the number of global batches of the run (or of a phase), and
that of one epoch. timm's schedulers do the arithmetic. DeepSpeed gets no schedule: it would count
steps itself.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.step_lr import StepLRScheduler

from pipeline.core.checks import require

Schedule = Callable[[int], None]


def constant(optimizer: torch.optim.Optimizer, steps: int, epoch_steps: int) -> Schedule:
    """The optimizer's own learning rate throughout."""
    return lambda step: None


def cosine(
    optimizer: torch.optim.Optimizer,
    steps: int,
    epoch_steps: int,
    *,
    warmup: float = 0.0,
    floor: float = 0.0,
    by: Literal["step", "epoch"] = "step",
    starts: Literal["at_once", "after_warmup"] = "at_once",
) -> Schedule:
    """Half a cosine from the optimizer's learning rate down to `floor`, after a linear warm-up
    from 0.

        rate[s] = floor + (lr - floor) / 2 * (1 + cos(pi * (s - s0) / (steps - s0)))

    Args:
        warmup: share of the run spent warming up, in 0..1.
        floor: the learning rate at the end of the cosine.
        by: "epoch" holds the rate of the epoch's first step, like code that sets it once per
            epoch. The warm-up goes by step in both cases.
        starts: "at_once" has s0 = 0: the cosine begins during the warm-up; "after_warmup" has s0
            at the end of the warm-up.

    Raises:
        ValueError: a share is outside 0..1, or `by` or `starts` is another word.
    """
    require(by in ("step", "epoch"), f"cosine: by must be 'step' or 'epoch'; got {by!r}")
    require(
        starts in ("at_once", "after_warmup"),
        f"cosine: starts must be 'at_once' or 'after_warmup'; got {starts!r}",
    )
    warmup_steps = _share("cosine", "warmup", warmup, steps)
    first = warmup_steps if starts == "after_warmup" else 0
    # timm's own warm-up would last to the end of the epoch in which it ends.
    scheduler = CosineLRScheduler(
        optimizer, t_initial=max(1, steps - first), lr_min=floor, t_in_epochs=False
    )
    rates = [group["lr"] for group in optimizer.param_groups]

    def schedule(step: int) -> None:
        if step < warmup_steps:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = step * (rate / warmup_steps)
            return
        if by == "epoch":
            step -= step % epoch_steps
        scheduler.step_update(max(0, step - first))

    return schedule


def staircase(
    optimizer: torch.optim.Optimizer,
    steps: int,
    epoch_steps: int,
    *,
    every: float = 1 / 3,
    factor: float = 0.1,
) -> Schedule:
    """The learning rate times `factor` after each `every` of the run (a share in 0..1)."""
    return StepLRScheduler(
        optimizer,
        decay_t=max(1, _share("staircase", "every", every, steps)),
        decay_rate=factor,
        t_in_epochs=False,
    ).step_update


def milestones(
    optimizer: torch.optim.Optimizer,
    steps: int,
    epoch_steps: int,
    *,
    at: Sequence[float],
    factor: float = 0.1,
    warmup: float = 0.0,
) -> Schedule:
    """Linear warm-up from 0, then the learning rate times `factor` at each place `at` in the run
    (shares in 0..1).
    """
    places = [_share("milestones", "at", share, steps) for share in at]
    require(places == sorted(places), f"milestones: at must rise; got at={tuple(at)}")
    return MultiStepLRScheduler(
        optimizer,
        decay_t=[place + 1 for place in places],  # timm 1.0.31 applies m from step m - 1
        decay_rate=factor,
        warmup_t=_share("milestones", "warmup", warmup, steps),
        warmup_prefix=False,
        t_in_epochs=False,
    ).step_update


def _share(who: str, name: str, share: float, steps: int) -> int:
    require(
        0 <= share <= 1, f"{who}: {name} is a share of the run and must be in 0..1; got {share}"
    )
    return round(share * steps)
