"""The trials of a search, as their folders tell: a value that diverges has lost, and its run is over like one that finished."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pipeline.recipe import read_json
from pipeline.recipe_json import recipe_fields
from pipeline.track.state import state_of

__all__ = ["best", "is_over", "top1_of"]

_SEARCH = ("trial", "tuned")


def is_over(run: Path) -> bool:
    """Whether a suite has nothing left to do for a run: it has finished, or it diverged in a search, which is an answer there.

    Raises:
        ValueError: it diverged, and its recipe.json is damaged.
    """
    state = state_of(run)
    return state == "finished" or (state == "diverged" and recipe_fields(run).get("protocol") in _SEARCH)


def top1_of(trial: Path) -> float | None:
    """Its accuracy on what it held out; None: it diverged."""
    return None if state_of(trial) == "diverged" else read_json(trial / "summary.json")["top1"]


def best(top1: Mapping[str, float | None]) -> str:
    """The name of the trial that a choice takes: the first of those that did best; one that diverged did worst."""
    worth = {name: -math.inf if value is None else value for name, value in top1.items()}
    return max(worth, key=lambda name: worth[name])
