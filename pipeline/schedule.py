"""Learning rates as pure functions of the step: `Schedule(step)` sets them, so that resuming needs no state.

timm's schedulers do the arithmetic. DeepSpeed is never handed one: it would step it by its own count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler

Schedule = Callable[[int], None]


def constant(optimizer: torch.optim.Optimizer, steps: int) -> Schedule:
    """The optimizer's own learning rate throughout."""
    return lambda step: None


def cosine(optimizer: torch.optim.Optimizer, steps: int, *, warmup: float = 0.0, floor: float = 0.0) -> Schedule:
    """Linear warm-up from 0, then half a cosine down to `floor`, over the whole run.

    Args:
        steps: global batches of the whole run.
        warmup: share of the run spent warming up, in 0..1.
        floor: the last learning rate.
    """
    warmup_steps = _share("cosine", "warmup", warmup, steps)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=steps,
        lr_min=floor,
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    return _by_step(scheduler)


def staircase(optimizer: torch.optim.Optimizer, steps: int, *, every: float = 1 / 3, factor: float = 0.1) -> Schedule:
    """The learning rate times `factor` after each `every` of the run (a share in 0..1)."""
    return _by_step(
        StepLRScheduler(
            optimizer, decay_t=max(1, _share("staircase", "every", every, steps)), decay_rate=factor, t_in_epochs=False
        )
    )


def milestones(
    optimizer: torch.optim.Optimizer, steps: int, *, at: Sequence[float], factor: float = 0.1, warmup: float = 0.0
) -> Schedule:
    """Linear warm-up from 0, then the learning rate times `factor` at each of the places `at` in the run (shares in 0..1)."""
    places = [_share("milestones", "at", share, steps) for share in at]
    if places != sorted(places):
        raise ValueError(f"milestones: at must rise; got at={tuple(at)}")
    scheduler = MultiStepLRScheduler(
        optimizer,
        decay_t=[place + 1 for place in places],  # timm 1.0.31 lets a milestone m apply from step m - 1
        decay_rate=factor,
        warmup_t=_share("milestones", "warmup", warmup, steps),
        warmup_prefix=False,
        t_in_epochs=False,
    )
    return _by_step(scheduler)


def _share(who: str, name: str, share: float, steps: int) -> int:
    if not 0 <= share <= 1:
        raise ValueError(f"{who}: {name} is a share of the run and must be in 0..1; got {share}")
    return round(share * steps)


def _by_step(scheduler: Scheduler) -> Schedule:
    def schedule(step: int) -> None:
        scheduler.step_update(step)

    return schedule
