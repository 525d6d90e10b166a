"""What one process of a run is made of: `compose.py` builds it, `attempt.py` trains with it,
`record.py` tells of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.data.mixing import Mixing
from pipeline.measure.meters import Meters
from pipeline.recipe.phases import Stretch
from pipeline.recipe.recipe import Recipe, Split
from pipeline.rules.base import Rule
from pipeline.track.journal import Tracker
from pipeline.train.backend.base import Backend
from pipeline.train.backend.collectives import Ranks
from pipeline.train.checkpoint import Checkpoints
from pipeline.train.gradient_fidelity import Nearness
from pipeline.train.guards.anomaly import Skipped
from pipeline.train.guards.watchdog import Watchdog
from pipeline.train.job import Job, Notice
from pipeline.train.tasks import Loaders
from pipeline.train.teaching import Teaching


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    """Everything that one process trains with."""

    job: Job
    ranks: Ranks
    tracker: Tracker
    watchdog: Watchdog
    """armed"""
    recipe: Recipe
    split: Split
    device: torch.device
    rule: Rule
    backend: Backend
    schedule: Callable[[int], None]
    loaders: Loaders
    stretches: tuple[Stretch, ...]
    """of each task, by the loaders' numbers"""
    mixing: Mixing | None
    teaching: Teaching | None
    nearness: Nearness | None
    """on rank 0, where the recipe asks for it"""
    meters: Meters
    checkpoints: Checkpoints
    skipped: Skipped
    """what going back has decided"""
    decided: dict[str, Any]
    """that and the micro-batch that fits, as checkpoints tell of them"""
    sizes: tuple[int, ...]
    """every number of workers that the run may have"""
    notice: Callable[[], Notice | None]
    """what this rank has been told of machines that are about to be taken away; asks no other"""
    trainer: dict[str, Any] | None
    """what the checkpoint says that was restored; None at a fresh start"""
    began: float
    """unix seconds at the process's first line of work"""
