"""The results of a suite: its own report once all runs are over, or its comparisons so far."""

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
from pipeline.report.compare import finite, print_studies
from pipeline.report.results import read_run, read_runs
from pipeline.report.runs import (
    AmbiguousName,
    ReportError,
    find_run_or_suite,
    run_and_suite_folders,
)
from pipeline.report.selection import is_study
from pipeline.report.study import WITHIN
from pipeline.track.state import is_driven, over_in, state_of


def suite_named(runs_dir: Path, names: Sequence[str]) -> Path | None:
    """The folder of the suite that is meant; None where runs or studies are.

    Raises:
        ReportError: a suite beside something else, or a name that begins those of several runs
            and no study's key.
    """
    there = run_and_suite_folders(runs_dir)
    for name in names:
        try:
            folder = find_run_or_suite(runs_dir, name, among=there)
        except AmbiguousName:
            if not is_study(read_runs(runs_dir), name):
                raise
            continue
        except ReportError:
            continue  # a study, or nothing: `compare` says which
        if is_suite(folder):
            if len(names) > 1:
                others = f"got {folder.name} among {', '.join(names)}"
                raise ReportError(f"compare: a suite is compared by itself; {others}")
            return folder
    return None


class Reported(NamedTuple):
    """What a suite's own report has returned and, as plain text, printed."""

    value: Any
    printed: str


def own_report(suite: str, report: Report, over: Mapping[str, Path], console: Console) -> Reported:
    """Run a suite's own report on the runs that are over.

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
        why = f"{type(error).__name__}: {error}"
        raise ReportError(f"compare: the report of {suite} failed in {where}: {why}") from error


def print_suite(
    folder: Path,
    *,
    trust: tuple[str, ...] = (),
    against: str = BASELINE,
    within: float = WITHIN,
    format: str = "table",
    console: Console | None = None,
) -> Reported | None:
    """Print a suite's own report, or its comparisons, and the runs that have not finished.

    The result of an own report is returned, so that the caller need not run it again.

    Args:
        trust: packages of the user's own that the suite's report and recipes may be imported from.
        against, within: see `compare`; a suite's own report takes neither.
        format: table; json: what an own report returns, with null for what is not finite; csv: a
            line for each finished run that is no trial, with or without an own report. For json
            and csv, the unfinished runs are named on stderr.

    Raises:
        ValueError: the suite cannot be read, or its runs must not be compared.
    """
    console = console or new_console()
    beside = console if format == "table" else new_console(stderr=True)
    report = None if format == "csv" else SuiteFile.read(folder, trust=trust).suite.report
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
        ended = [run for run in map(read_run, over.values()) if run.protocol != "trial"]
        studies = {run.study for run in ended if run.is_finished}
        folders = [run.folder for run in ended if run.study in studies]
        about: dict[str, Any] = {"format": format, "against": against, "within": within}
        print_studies(folder.parent, folders, **about, console=console)
        for run in (run for run in ended if run.study not in studies):
            say(beside, f"{run.name} diverged, and so did all other ended runs of its study")
    if len(over) < len(runs):
        for name, run in ((name, run) for name, run in runs.items() if name not in over):
            state = f"is {state_of(run)}" if run.exists() else "has not begun"
            say(beside, f"not finished: {name} ({run.name}) {state}")
        until = "" if report is None else ", the report is printed when all have"
        command = "" if is_driven(folder) else how_to_resume(folder)
        count = f"{len(over)} of {len(runs)} finished{until}"
        say(beside, f"{count}; {command}" if command else count, whole=[command])
    return None


def _print_json(
    folder: Path,
    report: Report,
    runs: Mapping[str, Path],
    over: Mapping[str, Path],
    console: Console,
) -> None:
    if len(over) < len(runs):
        have = f"{len(over)} of {len(runs)} runs have"
        raise ValueError(f"compare: {folder.name} must have finished; {have}")
    value = own_report(folder.name, report, over, Console(file=io.StringIO())).value
    whose = f"the report of {folder.name}"
    if value is None:
        raise ValueError(f"compare: {whose} returns nothing, so there is no --format json of it")
    try:
        text = json.dumps(finite(value), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ReportError(f"compare: {whose} must return JSON values; {error}") from error
    console.out(text, highlight=False)
