"""Schedules of the learning rate. `Schedule(step)` sets the rate as a function of the step, so
a resume needs no state.

Each function here takes the optimizer, the number of global batches in the run or in its phase
(`steps`), and the number in one epoch (`steps_per_epoch`). timm's schedulers compute the rates.
DeepSpeed gets no schedule, because it would count steps itself.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.step_lr import StepLRScheduler

from pipeline.core.checks import require

Schedule = Callable[[int], None]


def constant(optimizer: torch.optim.Optimizer, steps: int, steps_per_epoch: int) -> Schedule:
    """The optimizer's own learning rate throughout."""
    return lambda step: None


def cosine(
    optimizer: torch.optim.Optimizer,
    steps: int,
    steps_per_epoch: int,
    *,
    warmup: float = 0.0,
    min_lr: float = 0.0,
    update_every: Literal["step", "epoch"] = "step",
    warmup_prefix: bool = False,
) -> Schedule:
    """Half a cosine from the optimizer's learning rate down to `min_lr`, with a linear warm-up from
    0 at the start.

        rate[s] = min_lr + (lr - min_lr) / 2 * (1 + cos(pi * (s - s0) / (steps - s0)))

    Args:
        warmup: the share of the run's steps in the warm-up, in 0..1.
        min_lr: the learning rate at the end of the cosine.
        update_every: "epoch" holds the rate of the epoch's first step, like code that sets the rate
            once per epoch. The warm-up changes the rate at each step in both cases.
        warmup_prefix: whether the cosine begins at s0 = the end of the warm-up. Otherwise it begins
            at s0 = 0, and the warm-up replaces its first rates.

    Raises:
        ValueError: `warmup` is outside 0..1, or `update_every` is another word.
    """
    require(
        update_every in ("step", "epoch"),
        f"cosine: update_every must be 'step' or 'epoch'; got {update_every!r}",
    )
    warmup_steps = _steps_in("cosine", "warmup", warmup, steps)
    first = warmup_steps if warmup_prefix else 0
    # With "epoch", timm's own warm-up would change the rate only between epochs.
    scheduler = CosineLRScheduler(
        optimizer, t_initial=max(1, steps - first), lr_min=min_lr, t_in_epochs=False
    )
    rates = [group["lr"] for group in optimizer.param_groups]

    def schedule(step: int) -> None:
        if step < warmup_steps:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = step * (rate / warmup_steps)
            return
        if update_every == "epoch":
            step -= step % steps_per_epoch
        scheduler.step_update(max(0, step - first))

    return schedule


def staircase(
    optimizer: torch.optim.Optimizer,
    steps: int,
    steps_per_epoch: int,
    *,
    decay_every: float = 1 / 3,
    factor: float = 0.1,
) -> Schedule:
    """Multiply the learning rate by `factor` after each `decay_every` of the run.

    `decay_every` is a share of the run's steps.

    Raises:
        ValueError: the share is outside 0..1.
    """
    return StepLRScheduler(
        optimizer,
        decay_t=max(1, _steps_in("staircase", "decay_every", decay_every, steps)),
        decay_rate=factor,
        t_in_epochs=False,
    ).step_update


def milestones(
    optimizer: torch.optim.Optimizer,
    steps: int,
    steps_per_epoch: int,
    *,
    at: Sequence[float],
    factor: float = 0.1,
    warmup: float = 0.0,
) -> Schedule:
    """Warm up linearly from 0, then multiply the learning rate by `factor` at each milestone.

    `at` has the milestones in order. `warmup` is the length of the warm-up. Both are shares of the
    run's steps.

    Raises:
        ValueError: a share is outside 0..1, or a milestone is before the previous one.
    """
    decay_steps = [_steps_in("milestones", "at", share, steps) for share in at]
    require(
        decay_steps == sorted(decay_steps),
        f"milestones: at must be in ascending order; got at={tuple(at)}",
    )
    return MultiStepLRScheduler(
        optimizer,
        decay_t=[step + 1 for step in decay_steps],  # timm 1.0.31 applies m from step m - 1
        decay_rate=factor,
        warmup_t=_steps_in("milestones", "warmup", warmup, steps),
        warmup_prefix=False,
        t_in_epochs=False,
    ).step_update


def _steps_in(subject: str, name: str, share: float, steps: int) -> int:
    require(
        0 <= share <= 1,
        f"{subject}: {name} is a share of the run and must be in 0..1; got {name}={share}",
    )
    return round(share * steps)
