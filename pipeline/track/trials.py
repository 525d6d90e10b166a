"""Which entries of a suite are done. A diverged run counts as done; a diverged trial ranks last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import read_json
from pipeline.recipe.suite import measured_in, runs_of, sources_in
from pipeline.track.state import state_of

__all__ = ["best", "entries_in", "is_over", "over_in", "top1_of"]


def is_over(run: Path, *, is_needed: bool) -> bool:
    """Whether a suite has nothing left to do for a run.

    A run that diverged would diverge again, so it counts as done. With `is_needed` other runs take
    its weights, and it must have finished.
    """
    return state_of(run) in (("finished",) if is_needed else ("finished", "diverged"))


def entries_in(suite: Path) -> dict[str, Path]:
    """The folder of each run of a suite and the file of each measurement, by name, in their order.

    Raises:
        ValueError: suite.json is damaged.
    """
    return {**runs_of(suite), **measured_in(suite)}


def over_in(suite: Path) -> dict[str, Path]:
    """The entries of a suite that are done; see `entries_in`."""
    needed, runs = sources_in(suite), runs_of(suite)
    return {
        name: place
        for name, place in entries_in(suite).items()
        if (is_over(place, is_needed=name in needed) if name in runs else place.exists())
    }


def top1_of(run: Path) -> float | None:
    """The top-1 accuracy of a finished run in 0..1; None for a run that diverged."""
    return None if state_of(run) == "diverged" else read_json(RunFolder(run).summary)["top1"]


def best(top1: Mapping[str, float | None]) -> str:
    """The name of the best trial, the first of several. One that diverged (None) ranks last."""
    worth = {name: -math.inf if value is None else value for name, value in top1.items()}
    return max(worth, key=lambda name: worth[name])
