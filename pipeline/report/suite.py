"""What came out of a suite: its report once all of its runs are over, or the tables of its studies
so far.
"""

from __future__ import annotations

import io
import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from pipeline.core.printing import new_console, say
from pipeline.recipe import BASELINE
from pipeline.recipe.command_line import how_to_resume
from pipeline.recipe.suite import Report, SuiteFile, is_suite, runs_of
from pipeline.report.choose import is_study, is_trial, study_of
from pipeline.report.compare import print_studies
from pipeline.report.finite import finite
from pipeline.report.paired import WITHIN
from pipeline.report.runs import (
    AmbiguousName,
    ReportError,
    find_run_or_suite,
    run_and_suite_folders,
)
from pipeline.track.state import is_driven, state_of
from pipeline.track.trials import over_in


def suite_named(runs_dir: Path, names: Sequence[str]) -> Path | None:
    """The folder of the suite that is meant; None where runs or studies are.

    Raises:
        ReportError: a suite beside something else, or a name that begins those of several and no
        study.
    """
    there = run_and_suite_folders(runs_dir)
    for name in names:
        try:
            folder = find_run_or_suite(runs_dir, name, among=there)
        except AmbiguousName:
            if not is_study(runs_dir, name):
                raise
            continue
        except ReportError:
            continue  # a study, or nothing: `compare` says which
        if is_suite(folder):
            if len(names) > 1:
                raise ReportError(
                    f"compare: a suite is compared by itself; got {folder.name} among"
                    f" {', '.join(names)}"
                )
            return folder
    return None


class Reported(NamedTuple):
    """What a report of a suite's own has returned, and printed, as plain text."""

    value: Any
    printed: str


def own_report(suite: str, report: Report, over: Mapping[str, Path], console: Console) -> Reported:
    """Run the report of a suite's own, of runs that are over.

    Raises:
        ValueError: what it refused, or the error that it ended in, and where.
    """
    console.record = True
    try:
        value = report(over, console)
        return Reported(value, console.export_text())
    except ValueError:
        raise
    except Exception as error:  # code of whoever wrote the suite
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        raise ReportError(
            f"compare: the report of {suite} failed in {where}: {type(error).__name__}: {error}"
        ) from error


def print_suite(
    folder: Path,
    *,
    trust: tuple[str, ...] = (),
    against: str = BASELINE,
    within: float = WITHIN,
    format: str = "table",
    console: Console | None = None,
) -> Reported | None:
    """Print a suite's report, or for want of one its comparisons; children that have not finished
    are named.

    What a report of its own has told on the console comes back, so that who needs it further does
    not run it again.

    Args:
        trust: packages of the user's own that the suite's report and recipes may be imported from.
        against, within: see `compare`; a report of the suite's own knows neither.
        format: table; json, of a report of its own what that returns, with null for what is not
            finite; csv, a line for each finished run that is no trial, whether or not there is a
            report. Of json and csv the names are on stderr.

    Raises:
        ValueError: the suite cannot be read, or its runs must not be set side by side.
    """
    console = console or new_console()
    report = (
        None if format == "csv" else SuiteFile.read(folder, trust=trust).suite.report
    )  # of csv runs alone are told
    if report is not None and (against, within) != (BASELINE, WITHIN):
        raise ValueError(
            f"compare: {folder.name} has a report of its own, so --against and --within have no"
            f" effect; got {against}, {within:g}"
        )
    runs, over = runs_of(folder), over_in(folder)
    if format == "json" and report is not None:
        _print_json(folder, report, runs, over, console)
        return None
    if len(over) == len(runs) and report is not None:
        return own_report(folder.name, report, over, console)
    if report is None:
        folders = [run for run in over.values() if not is_trial(run)]
        told_of = {study_of(run) for run in folders if state_of(run) == "finished"}
        of_these = [run for run in folders if study_of(run) in told_of]
        print_studies(
            folder.parent, of_these, format=format, against=against, within=within, console=console
        )
        for run in folders:
            if run not in of_these:
                beside = console if format == "table" else new_console(stderr=True)
                say(beside, f"{run.name} diverged, as did whatever else has ended of its study")
    if len(over) < len(runs):
        console = console if format == "table" else new_console(stderr=True)
        for name, run in runs.items():
            if name not in over:
                state = f"is {state_of(run)}" if run.exists() else "has not begun"
                say(console, f"not finished: {name} ({run.name}) {state}")
        command = "" if is_driven(folder) else how_to_resume(folder)
        until = "" if report is None else ", the report is printed when all have"
        told = f"{len(over)} of {len(runs)} finished{until}"
        say(console, f"{told}; {command}" if command else told, whole=[command])
    return None


def _print_json(
    folder: Path,
    report: Report,
    runs: Mapping[str, Path],
    over: Mapping[str, Path],
    console: Console,
) -> None:
    if len(over) < len(runs):
        raise ValueError(
            f"compare: {folder.name} must have finished; {len(over)} of {len(runs)} runs have"
        )
    value = own_report(folder.name, report, over, Console(file=io.StringIO())).value
    if value is None:
        raise ValueError(
            f"compare: the report of {folder.name} returns nothing, so there is no --format json"
            " of it"
        )
    try:
        text = json.dumps(finite(value), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ReportError(
            f"compare: the report of {folder.name} must return JSON values; {error}"
        ) from error
    console.out(text, highlight=False)
