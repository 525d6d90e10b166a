"""The results of a suite: its own report once all runs are done, or its comparisons so far.

`print_protocols` is the report of a search.
"""

import io
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from pipeline.core.printing import new_console, number, print_table, say
from pipeline.recipe import BASELINE
from pipeline.recipe.command_line import how_to_resume
from pipeline.recipe.json import flat
from pipeline.recipe.suite import Report, SuiteFile, is_suite
from pipeline.report.compare import comparisons, finite, print_comparison, unfinished_to_json
from pipeline.report.results import ReportError, Run, folders_in, read_run, read_runs
from pipeline.report.selection import AmbiguousName, find_run, is_study, written
from pipeline.report.study import WITHIN
from pipeline.track.state import best, entries_in, is_driven, over_in, state_of


def suite_named(runs_dir: Path, names: Sequence[str]) -> Path | None:
    """The folder of the suite that the names select; None if they select runs or studies.

    Raises:
        ReportError: a suite is named beside something else, or a name begins the names of several
            runs and is no study's key.
    """
    there = folders_in(runs_dir, suites=True)
    for name in names:
        try:
            folder = find_run(runs_dir, name, suites=True, among=there)
        except AmbiguousName:
            if not is_study(read_runs(runs_dir), name):
                raise
            continue
        except ReportError:
            continue  # a study, or nothing: `compare` raises the precise error
        if is_suite(folder):
            if len(names) > 1:
                others = f"got {folder.name} among {', '.join(names)}"
                raise ReportError(f"compare: a suite is compared by itself; {others}")
            return folder
    return None


class Reported(NamedTuple):
    """The value of a suite's own report, and the plain text that it printed."""

    value: Any
    printed: str


def own_report(suite: str, report: Report, over: Mapping[str, Path], console: Console) -> Reported:
    """Run a suite's own report on its finished and diverged runs.

    Raises:
        ValueError: the report refused the runs or failed; the message says where.
    """
    console.record = True
    try:
        return Reported(report(over, console), console.export_text())
    except ValueError:
        raise
    except Exception as error:  # the report is the suite author's code
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
    """Print a suite's own report or its comparisons, and the unfinished runs.

    The result of its own report is returned, so that the caller need not run it again.

    Args:
        trust: the user's own packages that the suite's report and recipes may be imported from.
        against, within: as in `compare`; a suite's own report takes neither.
        format: "table"; "json" prints the own report's value, with null for numbers that are not
            finite; "csv" prints one line per finished run that is no trial, with or without an own
            report. For json and csv, the unfinished runs are named on stderr.

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
    over = over_in(folder)
    left = {name: run for name, run in entries_in(folder).items() if name not in over}
    done = f"{len(over)} of {len(over) + len(left)}"
    if format == "json" and report is not None:
        if left:
            raise ValueError(f"compare: {folder.name} must have finished; {done} runs have")
        _print_json(folder.name, report, over, console)
        return None
    if report is not None and not left:
        return own_report(folder.name, report, over, console)
    if report is None:
        ended = [run for run in map(read_run, over.values()) if run.protocol != "trial"]
        studies = {run.study for run in ended if run.is_finished}
        folders = [run.folder for run in ended if run.study in studies]
        judged: dict[str, Any] = {"against": against, "within": within, "format": format}
        print_comparison(folder.parent, folders=folders, **judged, console=console)
        for run in (run for run in ended if run.study not in studies):
            say(beside, f"{run.name} diverged, and so did all other ended runs of its study")
    for name, run in left.items():
        state = f"is {state_of(run)}" if run.exists() else "has not begun"
        say(beside, f"not finished: {name} ({run.name}) {state}")
    if left:
        until = "" if report is None else ", the report is printed when all have"
        command = "" if is_driven(folder) else how_to_resume(folder)
        counts = f"{done} finished{until}"
        say(beside, f"{counts}; {command}" if command else counts, whole=[command])
    return None


def _print_json(suite: str, report: Report, over: Mapping[str, Path], console: Console) -> None:
    value = own_report(suite, report, over, Console(file=io.StringIO())).value
    whose = f"the report of {suite}"
    if value is None:
        raise ValueError(f"compare: {whose} returns nothing, so there is no --format json of it")
    try:
        text = json.dumps(finite(value), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ReportError(f"compare: {whose} must return JSON values; {error}") from error
    console.out(text, highlight=False)


TITLES = {
    "shared": "shared: only the rule differs",
    "tuned": "tuned: each rule with its own best value of {fields}",
}


def print_protocols(runs: Mapping[str, Path], console: Console) -> dict[str, Any]:
    """Print the results of a search.

    The order is: shared settings for every rule, each rule with its own best value, and the trials
    with their accuracy on the held-out part of the training set. If all runs of a study diverged,
    they are named instead of a table.

    Args:
        runs: all runs of the suite.

    Returns:
        The printed values as JSON values.
    """
    printed: dict[str, Any] = {}
    read = [read_run(folder) for folder in runs.values()]
    for protocol, title in TITLES.items():
        printed[protocol] = []
        of_protocol = [run for run in read if run.protocol == protocol]
        for study in dict.fromkeys(run.study for run in of_protocol):
            members = [run for run in of_protocol if run.study == study]
            say(
                console,
                title.format(fields=", ".join(members[0].recipe.get("tuned", ()))),
                style="bold",
            )
            if all(run.state == "diverged" for run in members):
                for run in members:
                    say(console, f"{run.name} ({run.rule}) diverged")
                console.print()
                lost = list(map(unfinished_to_json, members))
                printed[protocol].append({"study": study, "runs": [], "unfinished": lost})
                continue
            folders = [run.folder for run in members]
            for comparison in comparisons(folders[0].parent, folders):
                comparison.render(console)
                console.print()
                printed[protocol].append(comparison.to_json())
    tried = [run for run in read if run.protocol == "trial"]
    studies = dict.fromkeys(run.study for run in tried)
    trials = list(_trials([run for study in studies for run in tried if run.study == study]))
    rows = [
        (
            trial["rule"],
            trial["field"],
            str(trial["value"]),
            "diverged" if trial["top1"] is None else f"{trial['top1']:.2%}",
            "taken" if trial["taken"] else "",
        )
        for trial in trials
    ]
    columns = ("rule", "field", number("value"), number("top-1"), "")
    print_table(console, columns, rows, title="trials, on a held-out part")
    return {**printed, "trials": trials}


def _trials(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """The trials of each search in the order of execution, with the chosen one marked."""
    searches: dict[str, dict[str, float | None]] = {}
    for run in runs:
        top1 = None if run.state == "diverged" else run.value("top1")
        searches.setdefault(_search(run), {})[run.name] = top1
    for run in runs:
        tried = searches[_search(run)]
        [field] = run.recipe["tuned"]
        yield {
            "run": run.name,
            "rule": run.rule,
            "field": field,
            "value": written(run.recipe, field),
            "top1": tried[run.name],
            "taken": run.name == best(tried),
        }


def _search(run: Run) -> str:
    """A key of a search: everything that its trials have in common."""
    tried = ("name", *run.recipe["tuned"])
    fields = {key: value for key, value in flat(run.recipe) if key not in tried}
    return json.dumps([run.study, fields], sort_keys=True)
