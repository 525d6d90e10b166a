"""The study that is meant by names on the command line: a suite with its own report, a study key,
runs, or the newest study.

Trials of a search are never in it: they differ in a value that was tried, and are judged on a part
of the training set."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from pipeline.core.units import counted
from pipeline.recipe import BASELINE
from pipeline.recipe.recipe import read_json
from pipeline.recipe.suite import SuiteFile, has_report, runs_of
from pipeline.report.choose import Finished, is_trial, named, newest_study, study_of, with_baseline
from pipeline.report.compare import comparable
from pipeline.report.paired import WITHIN
from pipeline.report.returned import Returned, returned, sweep_of
from pipeline.report.runs import ReportError
from pipeline.report.study import Study
from pipeline.report.study_run import from_folder
from pipeline.report.suite import Reported, own_report, suite_named
from pipeline.track.publish import REPORT
from pipeline.track.trials import over_in

_WIDTH = 120  # characters of what a suite's own report prints


class Found(NamedTuple):
    """What is meant."""

    study: Study
    place: Path
    """where its page belongs"""
    folders: tuple[Path, ...]
    """of its runs, and of trials that were left out"""


def read_study(
    runs_dir: Path,
    names: Sequence[str] = (),
    *,
    against: str = BASELINE,
    within: float = WITHIN,
    sweeps: Sequence[Path] = (),
    trust: tuple[str, ...] = (),
    reported: Reported | None = None,
) -> Found:
    """The study, where its page belongs, and its runs.

    Args:
        names: a suite, or runs and study keys as `compare` takes them; none: the newest study.
        sweeps: files that `spiketrain sweep --format json` printed.
        trust: packages of the user's own that a suite's report and recipes may be imported from.
        reported: what the suite's own report has told already; None: it is asked, if it has one.

    Raises:
        ValueError: nothing answers to a name, a file is damaged, or a suite's own report cannot be
        made or judges otherwise.
    """
    swept = tuple(sweep_of(read_json(path), str(path)) for path in sweeps)
    suite = suite_named(runs_dir, names)
    if suite is not None:
        runs = {name: run for name, run in runs_of(suite).items() if run.is_dir()}
        if not runs:
            raise ReportError(f"report: {suite.name} has no run yet")
        if (against, within) != (BASELINE, WITHIN) and has_report(suite):
            raise ReportError(
                f"report: {suite.name} has a report of its own, so --against and --within have no"
                f" effect on its claims; got {against}, {within:g}"
            )
        own, printed, notes = _own_report(suite, trust, reported)
        members, tried = _without_trials(runs.values())
        title, place = suite.name, suite / REPORT
    else:
        folders = named(runs_dir, names) if names else newest_study(runs_dir)
        own, printed, notes = Returned(), "", []
        chosen, tried = _without_trials(folders)
        members, missing = (
            _with_their_baseline(runs_dir, chosen, against) if names else (chosen, [])
        )
        notes += missing
        title = _title(members, names)
        place = runs_dir / f"report-{_slug(title)}.html"
    if tried and not members:
        raise ReportError(
            "report: runs must be trained on the whole training set; got"
            f" {counted(len(tried), 'trial')} of a search alone"
        )
    if tried:
        notes.append(
            f"Left out: {counted(len(tried), 'trial')} on a held-out part of the training set."
        )
    study = Study(
        title=title,
        runs=tuple(from_folder(folder) for folder in members),
        against=against,
        within=within,
        claims=own.claims,
        sweeps=(*swept, *own.sweeps),
        notes=tuple(notes),
        printed=printed,
    )
    return Found(study, place, (*members, *tried))


def _without_trials(folders: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """And the trials."""
    members: list[Path] = []
    tried: list[Path] = []
    for folder in folders:
        (tried if is_trial(folder) else members).append(folder)
    return members, tried


def _with_their_baseline(
    runs_dir: Path, folders: Sequence[Path], against: str
) -> tuple[list[Path], list[str]]:
    """Those of each study and machine with the runs of the baseline that they lack; where there are
    none, a note says why.
    """
    found: list[Path] = []
    notes: list[str] = []
    for runs in comparable(folders):
        if finished := [run for run in runs if isinstance(run, Finished)]:
            more, said = with_baseline(runs_dir, finished, against)
            found += [run.folder.resolve() for run in more]
            notes += said
    return list(dict.fromkeys([*found, *(folder.resolve() for folder in folders)])), notes


def _own_report(
    suite: Path, trust: tuple[str, ...], reported: Reported | None
) -> tuple[Returned, str, list[str]]:
    """What the suite's report returns and prints; a note where it has nothing to say yet.

    Raises: ReportError where it cannot be made: an earlier page, and its artifact, are worth more
    than one without claims."""
    runs, over = runs_of(suite), over_in(suite)
    if not has_report(suite):
        return Returned(), "", []
    if len(over) < len(runs):
        waits = (
            f"The suite's own report, with its claims, waits for all runs: {len(over)} of"
            f" {len(runs)} have finished."
        )
        return Returned(), "", [waits]
    try:
        report = SuiteFile.read(suite, trust=trust).suite.report
        assert report is not None, "has_report says so"
        reported = reported or own_report(
            suite.name, report, over, Console(file=io.StringIO(), width=_WIDTH)
        )
    except ValueError as error:
        why = str(error).removeprefix("compare: ")
        raise ReportError(
            f"report: what {suite.name} reports by itself cannot be made; its runs can be named"
            f" instead: {why}"
        ) from error
    return returned(reported.value, suite.name), reported.printed, []


def _title(folders: Sequence[Path], names: Sequence[str]) -> str:
    studies = list(dict.fromkeys(study_of(folder) for folder in folders))
    if len(studies) == 1 and studies[0]:
        return f"Study {studies[0][:8]}"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _slug(text: str) -> str:
    return (
        "-".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())[
            :80
        ]
        or "runs"
    )
