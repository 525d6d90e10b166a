"""The folder of a run or of a suite: there whole, or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.files import is_name
from pipeline.recipe.command_line import how_to_resume


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A hidden one beside it, to write into, that takes its name at the end; who is killed before
    leaves at most the hidden one.

    Raises:
        ValueError: the name is taken.
    """
    refuse_taken(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    hidden.mkdir()
    try:
        yield hidden
        try:
            hidden.rename(folder)
        except OSError:
            refuse_taken(folder)  # by another launch, meanwhile
            raise
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def named(runs: Path, name: str) -> Path:
    """The folder of this name in the folder of runs.

    Raises:
        ValueError: it would lie elsewhere.
    """
    if not is_name(name):
        raise ValueError(f"launch: --name must be a name in {runs}; got {name!r}")
    return runs / name


def refuse_taken(folder: Path) -> None:
    if folder.exists():
        raise ValueError(
            f"launch: --name must be new in {folder.parent}; got {folder.name}, which"
            f" `{how_to_resume(folder)}` goes on with"
        )


def numbered(folder: Path) -> Iterator[Path]:
    """The folder, and the names to try where it is taken."""
    yield folder
    for number in range(2, 10_000):
        yield folder.with_name(f"{folder.name}-{number}")
