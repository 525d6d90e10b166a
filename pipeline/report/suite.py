"""Results by the name of a suite, a run or a study.

`print_suite` prints a suite's own report once all runs are done. For a suite without its own
report, it prints the comparisons so far. `print_protocols` is the report of a search. `read_study`
reads the study of `spiketrain report`. A study excludes the trials of a search: the trials differ
in the tried value, and their accuracy is measured on a part of the training set.
"""

import io
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console

from pipeline.core.printing import new_console, number, print_table, say
from pipeline.core.units import counted, first_few
from pipeline.recipe import BASELINE
from pipeline.recipe.json import flat
from pipeline.recipe.recipe import read_json
from pipeline.recipe.suite import Report, SuiteFile, has_report, how_to_resume, measured_in, runs_of
from pipeline.report.claims import SuiteReport, parse_result
from pipeline.report.compare import (
    comparable,
    comparisons,
    finite,
    print_comparison,
    unfinished_to_json,
)
from pipeline.report.drawing import slug
from pipeline.report.results import (
    ReportError,
    Run,
    read_run,
    read_runs,
    refuse_damage,
)
from pipeline.report.selection import (
    locate,
    recipe_value,
    select_runs,
    with_baseline,
)
from pipeline.report.study import WITHIN, Study
from pipeline.report.sweeps import print_by_time_steps, sweep_of
from pipeline.track.mlflow import REPORT
from pipeline.track.run_state import best, done_entries, is_driven, state_of, suite_entries

_WIDTH = 120  # columns of the console of a suite's own report


class Reported(NamedTuple):
    """The value that a suite's own report returned, and the plain text that it printed."""

    value: Any
    printed: str


def own_report(suite: str, report: Report, done: Mapping[str, Path], console: Console) -> Reported:
    """Run a suite's own report on its finished and diverged runs and its measurements.

    Raises:
        ValueError: the report refused the runs, or it failed. The message of a failure names the
            line.
    """
    console.record = True
    try:
        return Reported(report(done, console), console.export_text())
    except ValueError:
        raise
    except Exception as error:  # the report is the suite author's code
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ReportError(
            f"compare: the report of {suite} failed in {Path(last.filename).name}, line"
            f" {last.lineno}: {type(error).__name__}: {error}"
        ) from error


def print_suite(
    folder: Path,
    *,
    trust: tuple[str, ...] = (),
    against: str = BASELINE,
    within: float = WITHIN,
    format: Literal["table", "json", "csv"] = "table",
    console: Console | None = None,
) -> Reported | None:
    """Print a suite's own report or its comparisons, and the unfinished runs.

    Args:
        trust: the user's own packages that the suite's report and recipes may be imported from.
        against, within: as in `print_comparison`; a suite's own report takes neither.
        format: "table" prints the suite's own report or, without one, comparisons; "json" prints
            the value that the report returns, or the comparisons as JSON; "csv" prints one line per
            finished run, except trials. For json and csv, unfinished runs are listed on stderr.

    Returns:
        The result of the suite's own report if it was printed as a table; otherwise None.

    Raises:
        ValueError: the suite cannot be read or compared. If it has its own report: the report
            fails, `against` or `within` is set, or "json" is set before all runs are done.
    """
    console = console or new_console()
    notes_console = console if format == "table" else new_console(stderr=True)
    report = None if format == "csv" else SuiteFile.read(folder, trust=trust).suite.report
    if report is not None and (against, within) != (BASELINE, WITHIN):
        raise ValueError(
            f"compare: --against and --within must not be set, because {folder.name} has its own"
            f" report; got {against}, {within:g}"
        )
    done = done_entries(folder)
    left = {name: run for name, run in suite_entries(folder).items() if name not in done}
    progress = f"{len(done)} of {len(done) + len(left)}"
    if format == "json" and report is not None:
        if left:
            raise ValueError(f"compare: {folder.name} must have finished; got {progress} done")
        _print_json(folder.name, report, done, console)
        return None
    if report is not None and not left:
        return own_report(folder.name, report, done, console)
    if report is None:
        runs = [read_run(path) for name, path in done.items() if name in runs_of(folder)]
        ended = [run for run in runs if run.protocol != "trial"]
        studies = {run.study for run in ended if run.is_finished}
        compared = [run.folder for run in ended if run.study in studies]
        how: Any = {"format": format, "against": against, "within": within, "console": console}
        print_comparison(folder.parent, folders=compared, **how)
        for run in (run for run in ended if run.study not in studies):
            say(notes_console, f"{run.name} diverged, and so did all other ended runs of its study")
        for sweep in _measured_sweeps(folder) if format == "table" else ():
            print_by_time_steps(sweep, console)
    if left:
        has_report = report is not None
        _say_unfinished(notes_console, folder, left, progress=progress, has_report=has_report)
    return None


def _say_unfinished(
    console: Console, folder: Path, left: Mapping[str, Path], *, progress: str, has_report: bool
) -> None:
    for name, run in left.items():
        state = f"is {state_of(run)}" if run.exists() else "has not begun"
        say(console, f"not finished: {name} ({run.name}) {state}")
    text = f"{progress} finished"
    if has_report:
        text += ", the report follows when all have finished"
    command = "" if is_driven(folder) else how_to_resume(folder)
    say(console, f"{text}; {command}" if command else text, whole=[command])


def _print_json(suite: str, report: Report, done: Mapping[str, Path], console: Console) -> None:
    value = own_report(suite, report, done, Console(file=io.StringIO())).value
    if value is None:
        raise ValueError(
            f"compare: the report of {suite} must return a value for --format json; got None"
        )
    try:
        text = json.dumps(finite(value), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ReportError(
            f"compare: the report of {suite} must return JSON values; {error}"
        ) from error
    console.out(text, highlight=False)


TITLES = {
    "shared": "shared: only the rule differs",
    "tuned": "tuned: each rule with its own best value of {fields}",
}


def print_protocols(runs: Mapping[str, Path], console: Console) -> dict[str, Any]:
    """Print the results of a search.

    The order is: shared settings for every rule, each rule with its own best value, and the trials
    with their accuracy on the held-out part of the training set. A study whose runs all diverged
    has a list of the runs instead of a table.

    Args:
        runs: all runs of the suite.

    Returns:
        The printed values as JSON values.
    """
    printed: dict[str, Any] = {protocol: [] for protocol in TITLES}
    studies: dict[str, dict[str, list[Run]]] = {}
    for run in map(read_run, runs.values()):
        studies.setdefault(run.protocol, {}).setdefault(run.study, []).append(run)
    for protocol, title in TITLES.items():
        for study, members in studies.get(protocol, {}).items():
            fields = ", ".join(members[0].recipe.get("tuned", ()))
            say(console, title.format(fields=fields), style="bold")
            if all(run.state == "diverged" for run in members):
                for run in members:
                    say(console, f"{run.name} ({run.rule}) diverged")
                console.print()
                printed[protocol].append(
                    {
                        "study": study,
                        "runs": [],
                        "unfinished": list(map(unfinished_to_json, members)),
                    }
                )
                continue
            folders = [run.folder for run in members]
            for comparison in comparisons(folders[0].parent, folders):
                comparison.render(console)
                console.print()
                printed[protocol].append(comparison.to_json())
    trials = list(_trials([run for runs in studies.get("trial", {}).values() for run in runs]))
    rows = [
        (
            trial["rule"],
            trial["field"],
            str(trial["value"]),
            "diverged" if trial["top1"] is None else f"{trial['top1']:.2%}",
            "chosen" if trial["taken"] else "",
        )
        for trial in trials
    ]
    columns = ("rule", "field", number("value"), number("top-1"), "")
    print_table(console, columns, rows, title="trials, on a held-out part of the training set")
    return {**printed, "trials": trials}


def _trials(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """The trials of all searches in the order of `runs`. `taken` marks the best of each search."""
    searches: dict[str, dict[str, float | None]] = {}
    for run in runs:
        top1 = None if run.state == "diverged" else run.value("top1")
        searches.setdefault(_search(run), {})[run.name] = top1
    for run in runs:
        top1_by_name = searches[_search(run)]
        [field] = run.recipe["tuned"]
        yield {
            "run": run.name,
            "rule": run.rule,
            "field": field,
            "value": recipe_value(run.recipe, field),
            "top1": top1_by_name[run.name],
            "taken": run.name == best(top1_by_name),
        }


def _search(run: Run) -> str:
    """A key that is equal for the trials of one search."""
    varied = ("name", *run.recipe["tuned"])
    fields = {key: value for key, value in flat(run.recipe) if key not in varied}
    return json.dumps([run.study, fields], sort_keys=True)


class StudyPage(NamedTuple):
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
) -> StudyPage:
    """Read a study.

    Args:
        names: a suite, or runs and study keys as in `compare`; without names, the newest study.
        sweeps: files with the output of `spiketrain sweep --format json`.
        trust: the user's own packages that a suite's report and recipes may be imported from.
        reported: the result of the suite's own report if it has already run; None: run it now.

    Raises:
        ValueError: a name is unknown, there are no names and no finished run, all runs are trials,
            a file is damaged, a suite's own report fails, or `against` or `within` is set for it.
    """
    given_sweeps = [sweep_of(read_json(path), str(path)) for path in sweeps]
    runs_dir, suite = locate(runs_dir, names)
    if suite is None:
        all_runs = read_runs(runs_dir)
        members = select_runs(runs_dir, names, all_runs)
    else:
        all_runs = members = [read_run(run) for run in runs_of(suite).values() if run.is_dir()]
    runs, trials = _without_trials(members, names)
    if suite is not None:
        title, place = suite.name, suite / REPORT
        own, notes = _own_report(suite, trust, reported, judged=(against, within))
    else:
        own = SuiteReport()
        runs, notes = _with_baselines(all_runs, runs, against) if names else (runs, [])
        studies = {run.study for run in runs}
        is_one = len(studies) == 1 and "" not in studies
        title = f"Study {runs[0].study[:8]}" if is_one else first_few(names, 3)
        place = runs_dir / f"report-{slug(title)[:80]}.html"
    if trials:
        count = counted(len(trials), "trial")
        notes.append(f"Excluded: {count} on a held-out part of the training set.")
    for run in runs:
        refuse_damage(run)
        _ = run.activity  # the file may be damaged, too
    return StudyPage(
        study=Study(
            title=title,
            runs=tuple(runs),
            against=against,
            within=within,
            claims=own.claims,
            sweeps=(*given_sweeps, *own.sweeps),
            notes=tuple(notes),
            printed=own.printed,
        ),
        place=place,
        folders=tuple(run.folder for run in (*runs, *trials)),
    )


def _measured_sweeps(suite: Path) -> Iterator[Mapping[str, Any]]:
    """The sweeps among the measurements of a suite that have been made."""
    for name, file in measured_in(suite).items():
        if file.exists() and "points" in (found := read_json(file)):
            yield sweep_of(found, name)


def _without_trials(members: Sequence[Run], names: Sequence[str]) -> tuple[list[Run], list[Run]]:
    runs = [run for run in members if run.protocol != "trial"]
    trials = [run for run in members if run.protocol == "trial"]
    if not runs:
        raise ReportError(
            f"report: {', '.join(names)} must have a run that was trained on the whole training"
            f" set; got {counted(len(trials), 'trial')} of a search"
        )
    return runs, trials


def _with_baselines(
    all_runs: Sequence[Run], runs: Sequence[Run], against: str
) -> tuple[list[Run], list[str]]:
    """The runs with added baselines for each study and machine, and notes on missing baselines."""
    added, notes = [], []
    for group in comparable(runs):
        if finished := [run for run in group if run.is_finished]:
            with_base, reasons = with_baseline(all_runs, finished, against)
            added += with_base
            notes += reasons
    return list({run.folder.resolve(): run for run in (*added, *runs)}.values()), notes


def _own_report(
    suite: Path, trust: tuple[str, ...], reported: Reported | None, *, judged: tuple[str, float]
) -> tuple[SuiteReport, list[str]]:
    """The suite's report, or a note that the suite has not finished.

    Without a report of its own, a suite has only its measured sweeps. A report that fails raises an
    error, because a page without claims must not replace an earlier page.

    Raises:
        ReportError: `judged` (the baseline and the tolerance) is set, or the report fails.
    """
    if not has_report(suite):
        return SuiteReport(sweeps=tuple(_measured_sweeps(suite))), []
    if judged != (BASELINE, WITHIN):
        raise ReportError(
            f"report: --against and --within must not be set, because {suite.name} has its own"
            " report"
        )
    entries, done = suite_entries(suite), done_entries(suite)
    if len(done) < len(entries):
        note = (
            "The suite's own report and its claims follow when all runs and measurements have"
            f" finished: {len(done)} of {len(entries)} have."
        )
        return SuiteReport(), [note]
    try:
        report = SuiteFile.read(suite, trust=trust).suite.report
        assert report is not None, "has_report says so"
        console = Console(file=io.StringIO(), width=_WIDTH)
        reported = reported or own_report(suite.name, report, done, console)
    except ValueError as error:
        raise ReportError(
            f"report: the own report of {suite.name} cannot be used; name its runs instead of the"
            f" suite: {str(error).removeprefix('compare: ')}"
        ) from error
    return parse_result(reported.value, suite.name, printed=reported.printed), []
