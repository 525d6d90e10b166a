"""The runs of a folder: find one by name, list them all. All is read from the run folders; MLflow is not asked."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.job import resume_command
from pipeline.track.jsonl import first, last
from pipeline.track.state import State, state_of

__all__ = ["ReportError", "RunRow", "find_run", "list_runs", "load", "print_runs", "run_folders"]


class ReportError(ValueError):
    """A run cannot be found or read; the message is one line for a user."""


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run in a list. `step` counts global batches done; `resume` is None for a run that is finished or running."""

    name: str
    folder: Path
    state: State
    rule: str
    study: str
    step: int | None
    total_steps: int | None
    top1: float | None
    resume: str | None


def find_run(runs_dir: str | os.PathLike[str], name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a run, from its name in `runs_dir`, an unambiguous beginning of it, or a path.

    Raises:
        ReportError: no run, or several, answer to it.
    """
    runs_dir, text = Path(runs_dir), os.fspath(name_or_path)
    for folder in (runs_dir / text, Path(text)):
        if _is_run(folder):
            return folder
    folders = run_folders(runs_dir)
    found = [folder for folder in folders if folder.name.startswith(text)] if text else []
    if len(found) == 1:
        return found[0]
    if found:
        raise ReportError(f"{text!r} begins the names of {len(found)} runs: {', '.join(folder.name for folder in found)}")
    known = ", ".join(folder.name for folder in folders[:8]) + (", ..." if len(folders) > 8 else "")
    raise ReportError(f"no run {text!r} in {runs_dir}" + (f"; there are {known}" if folders else ", which has no runs"))


def list_runs(runs_dir: str | os.PathLike[str]) -> list[RunRow]:
    """All runs of a folder, the one started last first."""
    rows = [(_started(folder), _row(Path(runs_dir), folder)) for folder in run_folders(Path(runs_dir))]
    return [row for _, row in sorted(rows, key=lambda pair: pair[0], reverse=True)]


def run_folders(runs_dir: Path) -> list[Path]:
    """The folders in `runs_dir` that hold a run, by name."""
    return sorted(folder for folder in runs_dir.iterdir() if _is_run(folder)) if runs_dir.is_dir() else []


def print_runs(runs_dir: str | os.PathLike[str], console: Console | None = None) -> None:
    """The list as a table, and the command that resumes each run that did not finish on a line of its own, to be copied."""
    console = console or Console()
    rows = list_runs(runs_dir)
    if not rows:
        console.print(f"no runs in {os.fspath(runs_dir)}", soft_wrap=True, markup=False, highlight=False)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("run", "state", "rule", "study", "step", "top-1"):
        table.add_column(title, justify="right" if title in ("step", "top-1") else "left", overflow="fold")
    for row in rows:
        step = "-" if row.step is None else f"{row.step}/{row.total_steps or '?'}"
        top1 = "-" if row.top1 is None else f"{row.top1:.2%}"
        table.add_row(*map(Text, (row.name, row.state, row.rule, row.study, step, top1)))
    console.print(table)
    for row in rows:
        if row.resume:
            console.print(row.resume, soft_wrap=True, highlight=False, markup=False)


def load(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file.

    Raises:
        ReportError: the file holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} holds a {type(value).__name__}, not an object")
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
        resume=None if state in ("finished", "running") else resume_command(runs_dir, folder.name),
    )
