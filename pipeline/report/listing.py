"""`spiketrain runs`: the runs and suites of a folder, and the commands that resume them."""

import os
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from pipeline.core.printing import new_console, number, print_table, say
from pipeline.core.run_folder import RunFolder
from pipeline.recipe.command_line import how_to_resume
from pipeline.recipe.suite import FILE, is_suite
from pipeline.report.results import UNKNOWN_RULE, Run, folders_in, read_runs
from pipeline.track.events import Evaluation
from pipeline.track.journal import last_event
from pipeline.track.state import entries_in, is_driven, over_in

_OVER = ("finished", "running", "diverged")  # states of runs that cannot be resumed


class SuiteRow(NamedTuple):
    """A suite in a list."""

    name: str
    state: str  # for example "2 of 5 finished"
    resume: str | None  # the command; None for a suite that is finished or running


def list_runs(runs_dir: str | os.PathLike[str]) -> list[Run]:
    """Return all runs of a folder, the newest start first."""
    return sorted(read_runs(Path(runs_dir)), key=lambda run: run.started, reverse=True)


def list_suites(runs_dir: str | os.PathLike[str]) -> list[SuiteRow]:
    """Return all suites of a folder, the newest launch first."""
    folders = [each for each in folders_in(runs_dir, suites=True) if is_suite(each)]
    folders.sort(key=lambda folder: (folder / FILE).stat().st_mtime, reverse=True)
    return [_suite_row(folder) for folder in folders]


def print_runs(runs_dir: str | os.PathLike[str], console: Console | None = None) -> None:
    """Print suites and runs as tables, and each resume command on a line of its own."""
    console = console or new_console()
    runs, suites = list_runs(runs_dir), list_suites(runs_dir)
    if not runs and not suites:
        say(console, f"no runs in {os.fspath(runs_dir)}")
        return
    if suites:
        print_table(console, ("suite", "state"), [(suite.name, suite.state) for suite in suites])
        console.print()
    columns = ("run", "state", "rule", "study", number("step"), number("top-1"))
    print_table(console, columns, map(_cells, runs))
    for command in filter(None, (*(suite.resume for suite in suites), *map(how_to_go_on, runs))):
        say(console, command, whole=[command])


def how_to_go_on(run: Run) -> str | None:
    """Return the command that resumes a run; None for a finished or running one."""
    return None if run.state in _OVER else how_to_resume(run.folder)


def newest_top1(run: Run) -> float | None:
    """Return a finished run's result, or the newest evaluation of another run."""
    if run.state == "finished":
        return run.value("top1")
    evaluation = last_event(RunFolder(run.folder).journal, Evaluation)
    return None if evaluation is None else evaluation.metrics.get("top1")


def _cells(run: Run) -> tuple[str, ...]:
    rule = "-" if run.rule == UNKNOWN_RULE else run.rule
    step = "-" if run.step is None else f"{run.step}/{run.total_steps or '?'}"
    top1 = newest_top1(run)
    return (
        run.name,
        run.state,
        rule,
        run.study[:8] or "-",
        step,
        "-" if top1 is None else f"{top1:.2%}",
    )


def _suite_row(folder: Path) -> SuiteRow:
    try:
        runs, over = entries_in(folder), len(over_in(folder))
    except ValueError:  # the list still shows every other suite
        return SuiteRow(folder.name, f"{FILE} is damaged", None)
    driven = is_driven(folder)
    resume = None if over == len(runs) or driven else how_to_resume(folder)
    state = f"{over} of {len(runs)} finished" + (", running" if driven else "")
    return SuiteRow(folder.name, state, resume)
