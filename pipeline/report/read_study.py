"""Resolve the names on the command line of `spiketrain report` to a study.

A name is that of a suite or a run, or a study key. Without names the newest study is read. Trials
of a search are excluded: they differ in a tried value, and their accuracy is that of a part of the
training set.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from pipeline.core.units import counted
from pipeline.recipe import BASELINE
from pipeline.recipe.recipe import read_json
from pipeline.recipe.suite import SuiteFile, has_report, runs_of
from pipeline.report.claims import Returned, returned
from pipeline.report.compare import comparable
from pipeline.report.drawing import slug
from pipeline.report.results import ReportError, Run, read_run, read_runs, refuse_damage
from pipeline.report.selection import chosen, with_baseline
from pipeline.report.study import WITHIN, Study
from pipeline.report.suite import Reported, own_report, suite_named
from pipeline.report.sweeps import sweep_of
from pipeline.track.mlflow import REPORT
from pipeline.track.state import entries_in, over_in

_WIDTH = 120  # columns of the console of a suite's own report


class Found(NamedTuple):
    """A study, the path of its page, and the folders of its runs and trials."""

    study: Study
    place: Path
    folders: tuple[Path, ...]


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
    """Read a study.

    Args:
        names: a suite, or runs and study keys as `compare` takes them; none: the newest study.
        sweeps: files with the output of `spiketrain sweep --format json`.
        trust: the user's own packages that a suite's report and recipes may be imported from.
        reported: the result of the suite's own report, if it has already run; None: the report is
            run, if there is one.

    Raises:
        ValueError: no run or study has such a name, a file is damaged, or a suite's own report
            fails or ignores the given options.
    """
    swept = tuple(sweep_of(read_json(path), str(path)) for path in sweeps)
    suite = suite_named(runs_dir, names)
    own, printed, notes = Returned(), "", []
    if suite is not None:
        runs, tried = _runs_of_suite(suite, judges_alike=(against, within) == (BASELINE, WITHIN))
        own, printed, notes = _own_report(suite, trust, reported)
        title, place = suite.name, suite / REPORT
    else:
        everything = read_runs(runs_dir)
        runs, tried = _without_trials(chosen(runs_dir, names, everything))
        if names:
            runs, notes = _with_their_baseline(everything, runs, against)
        title = _title(runs, names)
        place = runs_dir / f"report-{slug(title)[:80]}.html"
    if tried:
        trials = counted(len(tried), "trial")
        notes.append(f"Left out: {trials} on a held-out part of the training set.")
    for run in runs:
        refuse_damage(run)
        _ = run.activity  # the file may be damaged, too
    study = Study(
        title=title,
        runs=tuple(runs),
        against=against,
        within=within,
        claims=own.claims,
        sweeps=(*swept, *own.sweeps),
        notes=tuple(notes),
        printed=printed,
    )
    return Found(study, place, tuple(run.folder for run in (*runs, *tried)))


def _runs_of_suite(suite: Path, *, judges_alike: bool) -> tuple[list[Run], list[Run]]:
    """The runs and the trials. `judges_alike`: --against and --within have their defaults."""
    members = [read_run(run) for run in runs_of(suite).values() if run.is_dir()]
    if not members:
        raise ReportError(f"report: {suite.name} has no run yet")
    if not judges_alike and has_report(suite):
        raise ReportError(
            f"report: {suite.name} has a report of its own, so --against and --within have no"
            " effect on its claims"
        )
    return _without_trials(members)


def _without_trials(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Split runs into ordinary runs and trials.

    Raises:
        ReportError: all runs are trials.
    """
    trials = [run for run in runs if run.protocol == "trial"]
    if trials and len(trials) == len(runs):
        alone = f"{counted(len(trials), 'trial')} of a search alone"
        raise ReportError(f"report: runs must be trained on the whole training set; got {alone}")
    return [run for run in runs if run.protocol != "trial"], trials


def _with_their_baseline(
    everything: Sequence[Run], runs: Sequence[Run], against: str
) -> tuple[list[Run], list[str]]:
    """The runs, with the baseline's runs that a study and machine lacks.

    A note says why a baseline is missing.
    """
    added: list[Run] = []
    notes: list[str] = []
    for members in comparable(runs):
        if finished := [run for run in members if run.is_finished]:
            more, why = with_baseline(everything, finished, against)
            added += more
            notes += why
    return list({run.folder.resolve(): run for run in (*added, *runs)}.values()), notes


def _own_report(
    suite: Path, trust: tuple[str, ...], reported: Reported | None
) -> tuple[Returned, str, list[str]]:
    """The values and the text of the suite's report, or a note that it waits for runs.

    Raises:
        ReportError: the report failed. An earlier page is worth more than one without claims.
    """
    entries, over = entries_in(suite), over_in(suite)
    if not has_report(suite):
        return Returned(), "", []
    if len(over) < len(entries):
        waits = "The suite's own report, with its claims, waits for all runs"
        return Returned(), "", [f"{waits}: {len(over)} of {len(entries)} have finished."]
    try:
        report = SuiteFile.read(suite, trust=trust).suite.report
        assert report is not None, "has_report says so"
        console = Console(file=io.StringIO(), width=_WIDTH)
        reported = reported or own_report(suite.name, report, over, console)
    except ValueError as error:
        why = str(error).removeprefix("compare: ")
        raise ReportError(
            f"report: what {suite.name} reports by itself cannot be made; its runs can be named"
            f" instead: {why}"
        ) from error
    return returned(reported.value, suite.name), reported.printed, []


def _title(runs: Sequence[Run], names: Sequence[str]) -> str:
    studies = {run.study for run in runs}
    if len(studies) == 1 and (study := studies.pop()):
        return f"Study {study[:8]}"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
