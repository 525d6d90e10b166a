"""What a finished run answered, with the group that each sample of its evaluation set belongs to."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.answers import Answers, read_answers
from pipeline.data.base import Grouped
from pipeline.recipe import Recipe
from pipeline.report.runs import ReportError, summary_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Answered:
    name: str
    fingerprint: str
    """of the data's content"""
    answers: Answers
    group_N: NDArray[Any]
    """text `[N]`, beside the answers"""
    workers: int
    """that it was trained by, each with statistics of its own in batch norms"""
    commits: tuple[str, ...]
    """that it was trained at: several where it was resumed at another"""

    def differs_from(self, other: Answered) -> str | None:
        """How the samples that two runs were evaluated on differ; None where they are the same."""
        if self.fingerprint != other.fingerprint:
            return f"data of content {self.fingerprint[:12]} and {other.fingerprint[:12]}"
        mine, others = self.answers, other.answers
        if not np.array_equal(mine.index, others.index):
            return f"{len(mine.index)} and {len(others.index)} samples, {len(np.intersect1d(mine.index, others.index))} in common"
        if not np.array_equal(mine.target, others.target) or not np.array_equal(self.group_N, other.group_N):
            return "samples of one place in two files"  # one evaluated on a share held out of the training file
        return None


def read_answered(run: Path, *, by: str, trust: Collection[str] = ()) -> Answered:
    """Raises: ValueError for a run that has not finished, of several tasks, or whose data is another or has no such groups."""
    summary = summary_of(run)
    if summary is None:
        raise ReportError(f"factorial: {run.name} must have finished; it has no summary.json")
    answers = read_answers(run / "answers.npz")
    if answers.task is not None:
        raise ReportError(f"factorial: {run.name} must be of one task; it has phases")
    data = Recipe.read(run / "recipe.json", trust=trust).data.build()
    if not isinstance(data, Grouped):
        raise ReportError(
            f"factorial: the data of {run.name} must group its samples by {by!r}; {type(data).__name__} has no groups"
        )
    fingerprint = data.fingerprint()
    evaluated = str(summary.get("data_fingerprint"))
    if fingerprint != evaluated:
        raise ReportError(
            f"factorial: {run.name} was evaluated on content {evaluated[:12]}; got {fingerprint[:12]}: "
            "another file lies where its recipe points"
        )
    groups = np.array(data.groups("val", by=by))
    if outside := answers.index[(answers.index < 0) | (answers.index >= len(groups))].tolist():
        raise ReportError(
            f"factorial: the samples that {run.name} answered must lie in its data's evaluation file, of {len(groups)}; "
            f"got index {outside[0]}"
        )
    return Answered(
        name=run.name,
        fingerprint=fingerprint,
        answers=answers,
        group_N=groups[answers.index],
        workers=int(summary["world_size"]),
        commits=tuple(summary["commits"]),
    )
