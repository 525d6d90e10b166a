"""Finds runs and suites by name in a folder of runs, and reads their JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
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
    among: Sequence[Path] | None = None,
) -> Path:
    """The absolute folder of a run, from its name, an unambiguous beginning of it, or a path.

    The parent of the folder is the folder of runs that it belongs to, whatever `runs_dir` is.

    Args:
        among: `run_folders(runs_dir)`, for callers that look up many names.

    Raises:
        ReportError: no run, or several, answer to the name.
    """
    folders = run_folders(Path(runs_dir)) if among is None else among
    return _found(Path(runs_dir), os.fspath(name_or_path), folders, is_one=_is_run, what="run")


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

    text, what = os.fspath(name_or_path), "run or suite"
    return _found(Path(runs_dir), text, folders, is_one=is_one, what=what)


def runs_dir_of(runs_dir: Path, names: Sequence[str]) -> Path:
    """The folder that all of these runs and suites are in; `runs_dir` where one is a study key."""
    there = run_and_suite_folders(runs_dir)
    try:
        folders = {find_run_or_suite(runs_dir, name, among=there).parent for name in names}
    except ReportError:
        return runs_dir
    return folders.pop() if len(folders) == 1 else runs_dir


def run_folders(runs_dir: Path) -> list[Path]:
    """The folders in `runs_dir` that hold a run, by name."""
    return [folder for folder in _visible(runs_dir) if _is_run(folder)]


def suite_folders(runs_dir: Path) -> list[Path]:
    """The folders in `runs_dir` that hold a suite, by name."""
    return [folder for folder in _visible(runs_dir) if is_suite(folder)]


def run_and_suite_folders(runs_dir: Path) -> list[Path]:
    """The folders that hold either, by name."""
    return sorted(run_folders(runs_dir) + suite_folders(runs_dir))


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
    """Raises: ReportError, which names `where`, for a field of another kind than readers expect."""
    for name, (kind, called) in _KINDS.items():
        if (value := summary.get(name)) is not None and not isinstance(value, kind):
            raise ReportError(f"{where}: {name} must be {called}; got {value!r}")
    for each in summary.get("trained_on") or ():
        if not isinstance(each, dict):
            raise ReportError(f"{where}: trained_on must be a list of objects; got {each!r} in it")
        refuse_damaged_summary(each, where)


def recipe_of(folder: Path) -> dict[str, Any]:
    """The fields of a run's recipe, as JSON; none without a recipe.json.

    Raises:
        ReportError: recipe.json is damaged.
    """
    file = RunFolder(folder).recipe
    fields = (load(file) or {}).get("recipe") or {}
    if not isinstance(fields, dict):
        raise ReportError(f"{file}: recipe must be an object; got {fields!r}")
    return fields


def _found(
    runs_dir: Path, text: str, folders: Sequence[Path], *, is_one: Callable[[Path], bool], what: str
) -> Path:
    for folder in (runs_dir / text, Path(text)):
        if is_one(folder):
            return _absolute(folder)
    found = [folder for folder in folders if folder.name.startswith(text)] if text else []
    if len(found) == 1:
        return _absolute(found[0])
    if found:
        names = ", ".join(folder.name for folder in found)
        raise AmbiguousName(f"{text!r} begins the names of {len(found)} runs: {names}")
    known = ", ".join(folder.name for folder in folders[:8]) + (", ..." if len(folders) > 8 else "")
    there = f"; there are {known}" if folders else ", which has no runs"
    raise ReportError(f"no {what} {text!r} in {runs_dir}{there}")


def _absolute(folder: Path) -> Path:
    """Without `.` and `..`; a link is not followed, as its run belongs where the link is."""
    return Path(os.path.abspath(folder))  # noqa: PTH100  (absolute() keeps .., resolve() follows links)


def _visible(runs_dir: Path) -> list[Path]:
    """Folders whose launch was killed while it made them have hidden names."""
    if not runs_dir.is_dir():
        return []
    return sorted(folder for folder in runs_dir.iterdir() if not folder.name.startswith("."))


def _is_run(folder: Path) -> bool:
    files = RunFolder(folder)
    return files.recipe.is_file() or files.journal.is_file()
