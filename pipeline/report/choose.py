"""Which runs a comparison is of: those named, or the newest study, and the baseline's runs that
belong to them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.units import counted
from pipeline.recipe import is_baseline
from pipeline.recipe.json import listed
from pipeline.report.differences import differences
from pipeline.report.runs import ReportError, find_run, recipe_of, run_folders, summary_of
from pipeline.report.study_run import UNKNOWN_RULE
from pipeline.track.journal import first, last
from pipeline.track.state import State, state_of


class ComparisonError(ReportError):
    """Runs that must not be set side by side, or nothing to compare; one line that names what
    differs.
    """


@dataclass(frozen=True, kw_only=True)
class Finished:
    folder: Path
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    folder: Path
    rule: str
    seed: int
    state: State

    def to_json(self) -> dict[str, str]:
        return {"run": self.folder.name, "rule": self.rule, "state": self.state}


def newest_study(runs_dir: Path) -> list[Path]:
    """The runs of the study whose run finished last. Trials are of none: they are judged on a part
    of the training set.
    """
    folders = run_folders(runs_dir)
    finished = [run for folder in folders if (run := finished_run(folder)) is not None]
    if not finished:
        there = f"it has {len(folders)} that did not finish" if folders else "it has no runs"
        raise ComparisonError(f"compare: no finished run in {runs_dir}; {there}")
    newest_first = sorted(finished, key=lambda run: _ended(run.folder), reverse=True)
    newest = next((run for run in newest_first if not is_trial(run.folder)), None)
    if newest is None:
        why = (
            f"{counted(len(finished), 'trial')} on a held-out part, no runs to set beside one"
            " another"
        )
        raise ComparisonError(f"compare: no finished run in {runs_dir} but {why}")
    study = newest.summary.get("study")
    of_study = {run.folder for run in finished if run.summary.get("study") == study}
    return [folder for folder in folders if folder in of_study or study_of(folder) == study]


def is_trial(folder: Path) -> bool:
    """Of one value of a search: no run to set beside others by its rule."""
    return recipe_of(folder).get("protocol") == "trial"


def named(runs_dir: Path, names: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The folders of runs, and of all runs of a study, in the order of their names. Each journal is
    looked at once.
    """
    study_by_run = studies(runs_dir)
    there = list(study_by_run)
    folders: dict[Path, None] = {}
    for text in [os.fspath(name) for name in names]:
        keys = {key for key in study_by_run.values() if text and key.startswith(text)}
        if not keys or (runs_dir / text).exists():
            folders[find_run(runs_dir, text, among=there).resolve()] = None
        elif len(keys) > 1:
            raise ComparisonError(
                f"compare: {text!r} begins several study keys: {', '.join(sorted(keys))}"
            )
        else:
            folders.update(
                dict.fromkeys(
                    folder.resolve() for folder, key in study_by_run.items() if key in keys
                )
            )
    return list(folders)


def is_study(runs_dir: Path, text: str) -> bool:
    """Whether the study key of a run begins with it."""
    return bool(text) and any(key.startswith(text) for key in studies(runs_dir).values())


def studies(runs_dir: Path) -> dict[Path, str]:
    """The study key of each run's folder."""
    return {folder: study_of(folder) for folder in run_folders(runs_dir)}


def refuse_unlike(runs: Sequence[Finished]) -> None:
    """Raises: ComparisonError where two differ in more than the rule and the seed, or two of one
    rule in what was tuned.
    """
    namesakes: dict[str, Finished] = {}
    for run in runs[1:]:
        for other in (runs[0], namesakes.setdefault(rule_of(run), run)):
            if found := differences(other.folder, run.folder):
                what = f"differ in more than the rule and the seed: {listed(found)}"
                raise ComparisonError(
                    f"compare: {other.name} and {run.name} {what}; name runs that agree"
                )


def with_baseline(
    runs_dir: Path, finished: list[Finished], against: str
) -> tuple[list[Finished], list[str]]:
    """Adds the study's runs, where they stand comparison, of each kind of the baseline that is
    missing, BPTT in slices of time too, which may be the faster; else says why there is none.

    Raises: ComparisonError where they do not stand it with one another.
    """
    study, reference = finished[0].summary.get("study"), finished[0]
    there = {rule_of(run) for run in finished}
    others = [
        run
        for folder in run_folders(runs_dir)
        if study_of(folder) == study and (run := finished_run(folder)) is not None
    ]
    kinds = [
        run for run in others if is_baseline(rule_of(run), against) and rule_of(run) not in there
    ]
    kinds.sort(key=lambda run: rule_of(run) != against)
    fit = [run for run in kinds if not differences(run.folder, reference.folder)]
    if against in there:
        try:
            refuse_unlike(fit)
        except ComparisonError as error:
            return finished, [
                f"times may be divided by a slower {against}:"
                f" {str(error).removeprefix('compare: ')}"
            ]
        return sorted(fit + finished, key=lambda run: rule_of(run) != against), []
    if fit and rule_of(fit[0]) == against:
        refuse_unlike(fit)
        return fit + finished, []
    if kinds and rule_of(kinds[0]) == against:
        found = differences(kinds[0].folder, reference.folder)
        why = f"{kinds[0].name} does not stand comparison: {listed(found)}"
    else:
        why = f"study {str(study)[:8]} has no finished run of {against}"
    return finished, [f"no baseline, no ratios: {why}"]


def finished_run(folder: Path) -> Finished | None:
    summary = summary_of(folder)
    return (
        Finished(folder=folder, summary=summary)
        if summary is not None and state_of(folder) == "finished"
        else None
    )


def unfinished_run(folder: Path) -> Unfinished:
    start = last(folder / "journal.jsonl", "start") or {}
    state = state_of(folder)
    state = "interrupted" if state == "finished" else state
    return Unfinished(
        folder=folder, rule=str(start.get("rule", "-")), seed=_seed(start), state=state
    )


def study_of(folder: Path) -> str:
    """From the journal, as unfinished runs have no summary."""
    start = first(folder / "journal.jsonl", "start")
    return (
        str(start.get("study", "")) if start else str((summary_of(folder) or {}).get("study", ""))
    )


def rule_of(run: Finished) -> str:
    return str(run.summary.get("rule") or UNKNOWN_RULE)


def seed_of(run: Finished) -> int:
    return _seed(run.summary)


def _seed(told: Mapping[str, Any]) -> int:
    seed = told.get("seed")
    return seed if isinstance(seed, int) else 0


def _ended(folder: Path) -> float:
    finish = last(folder / "journal.jsonl", "finish")
    return float(finish["time"]) if finish else (folder / "summary.json").stat().st_mtime
