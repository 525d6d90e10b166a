"""The trials of a search, as their folders tell: a value that diverges has lost, and its run is over like one that finished."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.recipe import read_json
from pipeline.track.state import state_of

__all__ = ["best", "is_over", "top1_of"]


def is_over(run: Path) -> bool:
    """Whether a suite has nothing left to do for a run: it has finished, or it is a trial that diverged.

    Raises:
        ValueError: its recipe.json is damaged.
    """
    state = state_of(run)
    return state == "finished" or (state == "diverged" and _is_trial(run))


def top1_of(trial: Path) -> float | None:
    """Its accuracy on what it held out; None: it diverged."""
    return None if state_of(trial) == "diverged" else read_json(trial / "summary.json")["top1"]


def best(top1: Mapping[str, float | None]) -> str | None:
    """The name of the trial that a choice takes: the first of those that did best. None: all of them diverged."""
    ended = {name: value for name, value in top1.items() if value is not None}
    return max(ended, key=lambda name: ended[name], default=None)


def _is_trial(run: Path) -> bool:
    return read_json(run / "recipe.json")["recipe"].get("protocol") == "trial"
