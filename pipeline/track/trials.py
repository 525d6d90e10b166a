"""Which runs of a suite are done. A diverged run counts as done; a diverged trial ranks last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import read_json
from pipeline.recipe.suite import runs_of, sources_in
from pipeline.track.state import state_of

__all__ = ["best", "is_over", "over_in", "top1_of"]


def is_over(run: Path, *, is_needed: bool) -> bool:
    """Whether a suite has nothing left to do for a run.

    A run that diverged would diverge again, so it counts as done. With `is_needed` other runs take
    its weights, and it must have finished.
    """
    return state_of(run) in (("finished",) if is_needed else ("finished", "diverged"))


def over_in(suite: Path) -> dict[str, Path]:
    """The runs of a suite's folder that are done, by the names of their recipes, in their order.

    Raises:
        ValueError: suite.json is damaged.
    """
    needed = sources_in(suite)
    return {
        name: run for name, run in runs_of(suite).items() if is_over(run, is_needed=name in needed)
    }


def top1_of(run: Path) -> float | None:
    """The top-1 accuracy of a finished run in 0..1; None for a run that diverged."""
    return None if state_of(run) == "diverged" else read_json(RunFolder(run).summary)["top1"]


def best(top1: Mapping[str, float | None]) -> str:
    """The name of the best trial, the first of several. One that diverged (None) ranks last."""
    worth = {name: -math.inf if value is None else value for name, value in top1.items()}
    return max(worth, key=lambda name: worth[name])
