"""Sets the runs of one study side by side: what each rule cost and how well it did, with ratios to
the baseline, BPTT.

Runs that differ in more than the rule and the seed are refused, and nothing is divided across
studies or machines: a table of unlike runs would look the same as this one. A study whose runs are
of several machines has a comparison for each."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pipeline.core.printing import new_console, say
from pipeline.recipe import BASELINE
from pipeline.report.choose import (
    ComparisonError,
    Finished,
    Unfinished,
    finished_run,
    is_study,
    named,
    newest_study,
    refuse_unlike,
    rule_of,
    seed_of,
    study_of,
    unfinished_run,
    with_baseline,
)
from pipeline.report.comparison import Comparison, csv_of
from pipeline.report.paired import WITHIN
from pipeline.report.places import loaders, places
from pipeline.report.runs import ReportError, load
from pipeline.report.study import Group, StudyRun, kind
from pipeline.report.study_run import study_run
from pipeline.track.journal import last

__all__ = [
    "Comparison",
    "ComparisonError",
    "Finished",
    "Unfinished",
    "compare",
    "comparisons",
    "print_comparison",
    "print_studies",
]


def compare(
    runs_dir: str | os.PathLike[str],
    names: Sequence[str | os.PathLike[str]] = (),
    *,
    against: str = BASELINE,
    within: float = WITHIN,
) -> Comparison:
    """Compare finished runs.

    Args:
        runs_dir: where runs live.
        names: run names, paths, or study keys (or beginnings of them); none: all of the study whose
            run finished last. Named runs get those of the same study of each kind of the baseline
            that is not among them.
        against: the rule that ratios and differences refer to.
        within: points of accuracy below it that a rule may be, for the verdict on paired seeds.

    Raises:
        ComparisonError: nothing finished, or the runs differ in more than the rule and the seed.
        ReportError: a name that is neither a run nor a study.
    """
    runs_dir = Path(runs_dir)
    folders = named(runs_dir, names) if names else newest_study(runs_dir)
    return _compared(
        runs_dir, list(map(_read, folders)), against=against, within=within, is_whole=not names
    )


def _read(folder: Path) -> Finished | Unfinished:
    return finished_run(folder) or unfinished_run(folder)


def _compared(
    runs_dir: Path,
    runs: Sequence[Finished | Unfinished],
    *,
    against: str,
    within: float,
    is_whole: bool,
) -> Comparison:
    """Of a study that `is_whole` nothing is missing but the baseline, whose runs may be of another
    suite.
    """
    finished = [run for run in runs if isinstance(run, Finished)]
    left_out = [run for run in runs if isinstance(run, Unfinished)]
    if not finished:
        raise ComparisonError(
            "compare: no finished run: "
            + ", ".join(f"{run.folder.name} is {run.state}" for run in left_out)
        )
    finished.sort(key=lambda run: (rule_of(run) != against, rule_of(run), seed_of(run), run.name))
    refuse_unlike(finished)
    notes = []
    if rule_of(finished[0]) != against or not is_whole:
        finished, notes = with_baseline(runs_dir, finished, against)
    lost = [
        run
        for run in left_out
        if run.state == "diverged" and _kind_of(run) == _kind_of(finished[0])
    ]
    diverged = frozenset((run.rule, run.seed) for run in lost)
    group = Group(
        tuple(map(_study_run, finished)), against=against, within=within, diverged_beside=diverged
    )
    return Comparison(
        study=str(finished[0].summary.get("study", "")),
        runs=tuple(finished),
        unfinished=tuple(left_out),
        notes=(*notes, *group.notes),
        group=group,
    )


def print_comparison(
    runs_dir: str | os.PathLike[str],
    names: Sequence[str | os.PathLike[str]] = (),
    *,
    format: str = "table",
    against: str = BASELINE,
    within: float = WITHIN,
    console: Console | None = None,
) -> None:
    """Print `compare`, or of a whole study a comparison for each machine that its runs are of;
    `format`: see `print_studies`.
    """
    if folders := _whole_study(Path(runs_dir), names):
        print_studies(
            runs_dir, folders, format=format, against=against, within=within, console=console
        )
    else:
        _print(
            [compare(runs_dir, names, against=against, within=within)],
            format=format,
            console=console,
        )


def print_studies(
    runs_dir: str | os.PathLike[str],
    folders: Sequence[Path],
    *,
    format: str = "table",
    against: str = BASELINE,
    within: float = WITHIN,
    console: Console | None = None,
) -> None:
    """Print `comparisons`; what keeps some of the runs from one is raised after those of others.

    Args:
        format: table, one below another on the console; json, a list of them; or csv, a line for
        each finished run.

    Raises:
        ComparisonError: see `comparisons`.
    """
    found, refusals = _made(runs_dir, folders, against=against, within=within)
    if found or not refusals:
        _print(found, format=format, console=console)
    if refusals:
        raise refusals[0]


def _print(found: Sequence[Comparison], *, format: str, console: Console | None) -> None:
    if format == "table":
        _print_tables(found, console or new_console())
    elif format == "json":
        print(json.dumps([comparison.to_json() for comparison in found], indent=2, allow_nan=False))
    elif format == "csv":
        sys.stdout.write(csv_of(found))
    else:
        raise ReportError(f"compare: format must be table, json or csv; got {format!r}")


def _print_tables(found: Sequence[Comparison], console: Console) -> None:
    for index, comparison in enumerate(found):
        if index:
            console.print()
        comparison.render(console)
    for study, tables in Counter(comparison.study for comparison in found).items():
        if tables > 1:
            told = (
                f"study {study[:8]} has {tables} tables, of different machines, workers or"
                " micro-batches: nothing is divided from one to another"
            )
            say(console, told)


def comparisons(
    runs_dir: str | os.PathLike[str],
    folders: Sequence[Path],
    *,
    against: str = BASELINE,
    within: float = WITHIN,
) -> list[Comparison]:
    """Those of the runs that may be compared, by study and machine: runs of another are never
    divided by one another.

    Raises:
        ComparisonError: nothing of a study finished, or its runs differ in what no study key tells.
    """
    found, refusals = _made(runs_dir, folders, against=against, within=within)
    if refusals:
        raise refusals[0]
    return found


def _made(
    runs_dir: str | os.PathLike[str], folders: Sequence[Path], *, against: str, within: float
) -> tuple[list[Comparison], list[ComparisonError]]:
    found: list[Comparison] = []
    refusals: list[ComparisonError] = []
    for members in comparable(folders):
        try:
            found.append(
                _compared(Path(runs_dir), members, against=against, within=within, is_whole=True)
            )
        except ComparisonError as error:
            refusals.append(error)
    tables = Counter(comparison.study for comparison in found)
    told = [
        (
            replace(comparison, where=_where(comparison.group.runs[-1]))
            if tables[comparison.study] > 1
            else comparison
        )
        for comparison in found
    ]
    return told, refusals


def comparable(folders: Sequence[Path]) -> list[list[Finished | Unfinished]]:
    """Runs by study and machine, in their order; unfinished ones of a machine where nothing
    finished join the first of their study."""
    groups: dict[str, list[Finished | Unfinished]] = {}
    first_of: dict[str, str] = {}
    unfinished: list[Unfinished] = []
    for run in map(_read, folders):
        if isinstance(run, Unfinished):
            unfinished.append(run)
            continue
        key = _kind_of(run)
        groups.setdefault(key, []).append(run)
        first_of.setdefault(str(run.summary.get("study", "")), key)
    for run in unfinished:
        key, study = _kind_of(run), study_of(run.folder)
        groups.setdefault(key if key in groups else first_of.get(study, study), []).append(run)
    return list(groups.values())


def _kind_of(run: Finished | Unfinished) -> str:
    if isinstance(run, Finished):
        return kind(study_run(run.name, (), state="finished", summary=run.summary))
    start = last(run.folder / "journal.jsonl", "start")
    return kind(study_run(run.folder.name, [start] if start else [], state="interrupted"))


def _whole_study(runs_dir: Path, names: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The runs of the newest study, or of one named by its key; none where runs are named."""
    if not names:
        return newest_study(runs_dir)
    key = os.fspath(names[0])
    is_key = len(names) == 1 and is_study(runs_dir, key) and not (runs_dir / key).exists()
    return named(runs_dir, names) if is_key else []


def _study_run(run: Finished) -> StudyRun:
    of_summary = study_run(
        run.name, (), state="finished", summary=run.summary, recipe=load(run.folder / "recipe.json")
    )
    commits = run.summary.get("commits") or [run.summary.get("commit")]
    return replace(of_summary, commits=tuple(map(str, commits)))


def _where(run: StudyRun) -> str:
    """`a cpu, 2 cores, 1 thread; 2 workers, each on cores of its own, with 1 loader thread`"""
    threads = {loaders(each) for each in run.trained_on}
    told = (
        places(run, between="; "),
        threads.pop() if len(threads) == 1 else "",
    )  # several are told by places
    return ", ".join(filter(None, told))
