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
    """Whether a suite has nothing left to do for a run: it has finished, or it diverged, which it
    would do again.

    That a rule diverges at the value which all share is told beside what the others did there, and
    another value may suit it. `is_needed`: others take its weights, which must have learnt
    something.
    """
    return state_of(run) in (("finished",) if is_needed else ("finished", "diverged"))


def over_in(suite: Path) -> dict[str, Path]:
    """The runs of a suite's folder that are over, by their recipes' names in their order.

    Raises:
        ValueError: suite.json is damaged.
    """
    needed = sources_in(suite)
    return {
        name: run for name, run in runs_of(suite).items() if is_over(run, is_needed=name in needed)
    }


def top1_of(run: Path) -> float | None:
    """Its accuracy, of a trial on what it held out; None: it diverged."""
    return None if state_of(run) == "diverged" else read_json(RunFolder(run).summary)["top1"]


def best(top1: Mapping[str, float | None]) -> str:
    """The name of the trial that a choice takes: the first of those that did best; one that
    diverged did worst.
    """
    worth = {name: -math.inf if value is None else value for name, value in top1.items()}
    return max(worth, key=lambda name: worth[name])
