"""A search, as its folders tell: a value that diverges has lost, and its run is over like one that finished."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pipeline.recipe import read_json
from pipeline.suite import choices_of, runs_of
from pipeline.track.state import state_of

__all__ = ["best", "is_over", "over_in", "top1_of"]


def is_over(run: Path, *, in_search: bool) -> bool:
    """Whether a suite has nothing left to do for a run: it has finished, or it diverged in a suite that searches.

    There that is an answer, of a run at the value that all rules share, too: another value may suit its rule.
    """
    return state_of(run) in (("finished", "diverged") if in_search else ("finished",))


def over_in(suite: Path) -> dict[str, Path]:
    """The runs of a suite's folder that are over, by their recipes' names in their order.

    Raises:
        ValueError: suite.json is damaged.
    """
    in_search = bool(choices_of(suite))
    return {name: run for name, run in runs_of(suite).items() if is_over(run, in_search=in_search)}


def top1_of(trial: Path) -> float | None:
    """Its accuracy on what it held out; None: it diverged."""
    return None if state_of(trial) == "diverged" else read_json(trial / "summary.json")["top1"]


def best(top1: Mapping[str, float | None]) -> str:
    """The name of the trial that a choice takes: the first of those that did best; one that diverged did worst."""
    worth = {name: -math.inf if value is None else value for name, value in top1.items()}
    return max(worth, key=lambda name: worth[name])
