"""Finds runs and suites by name in a folder of runs, and reads their JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.run_folder import RunFolder
from pipeline.recipe.suite import is_suite

_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "trained_on": (list, "a list of objects"),
    "commits": (list, "a list"),
    "hardware": (dict, "an object"),
    "conditions": (dict, "an object"),
    **dict.fromkeys(("steps", "images_per_s", "peak_saved_bytes"), ((int, float), "a number")),
}  # fields of a summary whose kind readers rely on


class ReportError(ValueError):
    """A run cannot be found or read; the message is one line for a user."""


class AmbiguousName(ReportError):
    """A name begins the names of several runs."""


def find_run(
    runs_dir: str | os.PathLike[str],
    name_or_path: str | os.PathLike[str],
    *,
    suites: bool = False,
    among: Sequence[Path] | None = None,
) -> Path:
    """The absolute folder of a run, from its name, an unambiguous beginning of it, or a path.

    The parent of the folder is the folder of runs that it belongs to, whatever `runs_dir` is.

    Args:
        suites: the name may also be that of a suite.
        among: `folders_in(runs_dir, suites=suites)`, for callers that look up many names.

    Raises:
        ReportError: no run, or several, answer to the name.
    """
    text = os.fspath(name_or_path)
    for folder in (Path(runs_dir) / text, Path(text)):
        if _is_run(folder) or (suites and is_suite(folder)):
            # Without `.` and `..`; a link is not followed, as its run belongs where the link is.
            return Path(os.path.abspath(folder))  # noqa: PTH100
    folders = folders_in(runs_dir, suites=suites) if among is None else among
    found = [folder for folder in folders if folder.name.startswith(text)] if text else []
    if len(found) == 1:
        return found[0].absolute()
    if found:
        names = ", ".join(folder.name for folder in found)
        raise AmbiguousName(f"{text!r} begins the names of {len(found)} runs: {names}")
    known = ", ".join(folder.name for folder in folders[:8]) + (", ..." if len(folders) > 8 else "")
    there = f"; there are {known}" if folders else ", which has no runs"
    what = "run or suite" if suites else "run"
    raise ReportError(f"no {what} {text!r} in {runs_dir}{there}")


def runs_dir_of(runs_dir: Path, names: Sequence[str]) -> Path:
    """The folder that holds all these runs and suites, or `runs_dir` if one is a study key."""
    there = folders_in(runs_dir, suites=True)
    try:
        folders = {find_run(runs_dir, name, suites=True, among=there).parent for name in names}
    except ReportError:
        return runs_dir
    return folders.pop() if len(folders) == 1 else runs_dir


def folders_in(runs_dir: str | os.PathLike[str], *, suites: bool = False) -> list[Path]:
    """The folders that hold a run, or with `suites` a run or a suite, by name.

    Folders whose launch was killed while it made them have hidden names.
    """
    if not Path(runs_dir).is_dir():
        return []
    visible = sorted(each for each in Path(runs_dir).iterdir() if not each.name.startswith("."))
    return [folder for folder in visible if _is_run(folder) or (suites and is_suite(folder))]


def load(path: Path, kind: type = dict) -> Any:
    """The JSON object of a file, or its list; None where there is no such file.

    Raises:
        ReportError: the file holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, kind):
        called = "an object" if kind is dict else "a list"
        raise ReportError(f"{path} holds a {type(value).__name__}, not {called}")
    return value


def summary_of(folder: Path) -> dict[str, Any] | None:
    """The summary.json of a run; None where there is none.

    Raises:
        ReportError: it is damaged.
    """
    path = RunFolder(folder).summary
    summary = load(path)
    refuse_damaged_summary(summary or {}, str(path))
    return summary


def refuse_damaged_summary(summary: Mapping[str, Any], where: str) -> None:
    """Raise ReportError if a field has an unexpected type; the message names `where`."""
    for name, (kind, called) in _KINDS.items():
        if (value := summary.get(name)) is not None and not isinstance(value, kind):
            raise ReportError(f"{where}: {name} must be {called}; got {value!r}")
    for each in summary.get("trained_on") or ():
        if not isinstance(each, dict):
            raise ReportError(f"{where}: trained_on must be a list of objects; got {each!r} in it")
        refuse_damaged_summary(each, where)


def _is_run(folder: Path) -> bool:
    files = RunFolder(folder)
    return files.recipe.is_file() or files.journal.is_file()
