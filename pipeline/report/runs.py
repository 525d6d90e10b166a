"""The runs and suites of a folder: find one by name, list them all. All is read from their folders;
MLflow is not asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from pipeline.core.printing import new_console, number, print_table, say
from pipeline.recipe.command_line import how_to_resume
from pipeline.recipe.suite import FILE, is_suite, runs_of
from pipeline.track.journal import first, last
from pipeline.track.state import State, is_driven, state_of
from pipeline.track.trials import over_in

__all__ = [
    "AmbiguousName",
    "ReportError",
    "RunRow",
    "SuiteRow",
    "find_run",
    "find_run_or_suite",
    "list_runs",
    "list_suites",
    "load",
    "load_list",
    "print_runs",
    "recipe_of",
    "refuse_damaged_summary",
    "run_and_suite_folders",
    "run_folders",
    "runs_dir_of",
    "summary_of",
]


T_ = TypeVar("T_")

_OF_A_SUMMARY: dict[str, tuple[type | tuple[type, ...], str]] = {
    "trained_on": (list, "a list of objects"),
    "commits": (list, "a list"),
    "hardware": (dict, "an object"),
    "conditions": (dict, "an object"),
    **dict.fromkeys(("steps", "images_per_s", "peak_saved_bytes"), ((int, float), "a number")),
}
"""what is read of it as what it is; of other fields a number or text is shown where it is one"""


class ReportError(ValueError):
    """A run cannot be found or read; the message is one line for a user."""


class AmbiguousName(ReportError):
    """Several begin with it."""


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run in a list. `step` counts global batches done; `resume` is None for a run that is
    finished or running.
    """

    name: str
    folder: Path
    state: State
    rule: str
    study: str
    step: int | None
    total_steps: int | None
    top1: float | None
    resume: str | None


@dataclass(frozen=True, kw_only=True)
class SuiteRow:
    """One suite in a list. `resume` is None for one that is finished or being trained."""

    name: str
    folder: Path
    state: str
    """such as 2 of 5 finished"""
    resume: str | None


def find_run(
    runs_dir: str | os.PathLike[str],
    name_or_path: str | os.PathLike[str],
    *,
    among: Sequence[Path] | None = None,
) -> Path:
    """The folder of a run, absolute, from its name in `runs_dir`, an unambiguous beginning of it,
    or a path.

    Its parent is the folder of runs that it belongs to, whatever `runs_dir` is.

    Args:
        among: `run_folders` of it, for whoever looks up many names.

    Raises:
        ReportError: no run, or several, answer to it.
    """
    folders = run_folders(Path(runs_dir)) if among is None else among
    return _found(Path(runs_dir), os.fspath(name_or_path), folders, is_one=_is_run, kind="run")


def find_run_or_suite(
    runs_dir: str | os.PathLike[str],
    name_or_path: str | os.PathLike[str],
    *,
    among: Sequence[Path] | None = None,
) -> Path:
    """As `find_run`, or the folder of a suite; `among`: `run_and_suite_folders`."""
    folders = run_and_suite_folders(Path(runs_dir)) if among is None else among

    def is_one(folder: Path) -> bool:
        return _is_run(folder) or is_suite(folder)

    return _found(
        Path(runs_dir), os.fspath(name_or_path), folders, is_one=is_one, kind="run or suite"
    )


def runs_dir_of(runs_dir: Path, names: Sequence[str]) -> Path:
    """The folder that all of these runs and suites are in, where their baseline is; else, as for a
    study's key, `runs_dir`.
    """
    there = run_and_suite_folders(runs_dir)
    try:
        folders = {find_run_or_suite(runs_dir, name, among=there).parent for name in names}
    except ReportError:
        return runs_dir
    return folders.pop() if len(folders) == 1 else runs_dir


def _found(
    runs_dir: Path, text: str, folders: Sequence[Path], *, is_one: Callable[[Path], bool], kind: str
) -> Path:
    for folder in (runs_dir / text, Path(text)):
        if is_one(folder):
            return _absolute(folder)
    found = [folder for folder in folders if folder.name.startswith(text)] if text else []
    if len(found) == 1:
        return _absolute(found[0])
    if found:
        raise AmbiguousName(
            f"{text!r} begins the names of {len(found)} runs:"
            f" {', '.join(folder.name for folder in found)}"
        )
    known = ", ".join(folder.name for folder in folders[:8]) + (", ..." if len(folders) > 8 else "")
    raise ReportError(
        f"no {kind} {text!r} in {runs_dir}"
        + (f"; there are {known}" if folders else ", which has no runs")
    )


def _absolute(folder: Path) -> Path:
    """Of `.` and `..`, too; a link is not followed, as its run belongs where the link is."""
    return Path(os.path.abspath(folder))  # noqa: PTH100  (absolute() keeps .., resolve() follows links)


def list_runs(runs_dir: str | os.PathLike[str]) -> list[RunRow]:
    """All runs of a folder, the one started last first."""
    rows = [
        (_started(folder), _row(Path(runs_dir), folder)) for folder in run_folders(Path(runs_dir))
    ]
    return [row for _, row in sorted(rows, key=lambda pair: pair[0], reverse=True)]


def list_suites(runs_dir: str | os.PathLike[str]) -> list[SuiteRow]:
    """All suites of a folder, the one launched last first."""
    newest = sorted(
        suite_folders(Path(runs_dir)),
        key=lambda folder: (folder / FILE).stat().st_mtime,
        reverse=True,
    )
    return [_suite_row(Path(runs_dir), folder) for folder in newest]


def suite_folders(runs_dir: Path) -> list[Path]:
    """The folders in `runs_dir` that hold a suite, by name."""
    return sorted(folder for folder in _shown(runs_dir) if is_suite(folder))


def run_folders(runs_dir: Path) -> list[Path]:
    """The folders in `runs_dir` that hold a run, by name."""
    return sorted(folder for folder in _shown(runs_dir) if _is_run(folder))


def run_and_suite_folders(runs_dir: Path) -> list[Path]:
    """Those of either, by name."""
    return sorted(run_folders(runs_dir) + suite_folders(runs_dir))


def _shown(runs_dir: Path) -> list[Path]:
    """What a launch that was killed while it made a folder has left is hidden."""
    return (
        [folder for folder in runs_dir.iterdir() if not folder.name.startswith(".")]
        if runs_dir.is_dir()
        else []
    )


def print_runs(runs_dir: str | os.PathLike[str], console: Console | None = None) -> None:
    """Suites and runs as tables, and the command that resumes each that did not finish on a line of
    its own, to be copied.
    """
    console = console or new_console()
    rows, suites = list_runs(runs_dir), list_suites(runs_dir)
    if not rows and not suites:
        say(console, f"no runs in {os.fspath(runs_dir)}")
        return
    if suites:
        print_table(console, ("suite", "state"), [(suite.name, suite.state) for suite in suites])
        console.print()
    cells = []
    for row in rows:
        step = "-" if row.step is None else f"{row.step}/{row.total_steps or '?'}"
        top1 = "-" if row.top1 is None else f"{row.top1:.2%}"
        cells.append((row.name, row.state, row.rule, row.study, step, top1))
    print_table(console, ("run", "state", "rule", "study", number("step"), number("top-1")), cells)
    for row in (*suites, *rows):
        if row.resume:
            say(console, row.resume, whole=[row.resume])


def load(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file.

    Raises:
        ReportError: the file holds something else.
    """
    return _load(path, dict, "an object")


def load_list(path: Path) -> list[Any] | None:
    """A JSON list, likewise."""
    return _load(path, list, "a list")


def summary_of(folder: Path) -> dict[str, Any] | None:
    """What a run's summary.json holds; None where there is none.

    Raises:
        ReportError: it is damaged.
    """
    path = folder / "summary.json"
    summary = load(path)
    refuse_damaged_summary(summary or {}, str(path))
    return summary


def refuse_damaged_summary(summary: Mapping[str, Any], where: str) -> None:
    """Raises: ReportError where a field of it, or of what it trained on, is of another kind;
    `where` it came from.
    """
    for name, (kind, called) in _OF_A_SUMMARY.items():
        if (value := summary.get(name)) is not None and not isinstance(value, kind):
            raise ReportError(f"{where}: {name} must be {called}; got {value!r}")
    for each in summary.get("trained_on") or ():
        if not isinstance(each, dict):
            raise ReportError(f"{where}: trained_on must be a list of objects; got {each!r} in it")
        refuse_damaged_summary(each, where)


def recipe_of(folder: Path) -> dict[str, Any]:
    """The fields of a run's recipe, as JSON; none where there is no recipe.

    Raises: ReportError for one that is damaged.
    """
    fields = (load(folder / "recipe.json") or {}).get("recipe") or {}
    if not isinstance(fields, dict):
        raise ReportError(f"{folder / 'recipe.json'}: recipe must be an object; got {fields!r}")
    return fields


def _load(path: Path, kind: type[T_], called: str) -> T_ | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, kind):
        raise ReportError(f"{path} holds a {type(value).__name__}, not {called}")
    return value


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.json").is_file() or (folder / "journal.jsonl").is_file()


def _started(folder: Path) -> float:
    start = first(folder / "journal.jsonl", "start")
    return float(start["time"]) if start else folder.stat().st_mtime


def _row(runs_dir: Path, folder: Path) -> RunRow:
    journal = folder / "journal.jsonl"
    start = last(journal, "start") or {}
    try:
        summary = load(folder / "summary.json") or {}
    except ReportError:
        summary = {}  # a list shows what there is
    state = state_of(folder)
    progress = last(journal, "step", "start", "stopped") or {}
    step = summary.get("steps") if state == "finished" else progress.get("step")
    evaluation = last(journal, "evaluation") or {}
    top1 = summary.get("top1") if state == "finished" else evaluation.get("metrics", {}).get("top1")
    return RunRow(
        name=folder.name,
        folder=folder,
        state=state,
        rule=str(start.get("rule") or summary.get("rule") or "-"),
        study=str(start.get("study") or summary.get("study") or "-")[:8],
        step=step,
        total_steps=start.get("total_steps") or summary.get("steps"),
        top1=float(top1) if top1 is not None else None,
        resume=None if state in ("finished", "running", "diverged") else how_to_resume(folder),
    )


def _suite_row(runs_dir: Path, folder: Path) -> SuiteRow:
    try:
        runs, over = runs_of(folder), len(over_in(folder))
    except ValueError:
        return SuiteRow(
            name=folder.name, folder=folder, state=f"{FILE} is damaged", resume=None
        )  # a list shows what there is
    driven = is_driven(folder)
    resume = None if over == len(runs) or driven else how_to_resume(folder)
    state = f"{over} of {len(runs)} finished" + (", running" if driven else "")
    return SuiteRow(name=folder.name, folder=folder, state=state, resume=resume)
