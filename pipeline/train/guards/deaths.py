"""A worker that dies or raises: what its launcher hears of it waits in the run's folder for whoever
opens the journal next.

Rank 0, which holds the journal, is gone itself, or hears of a lost connection alone.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.core.run_folder import RunFolder
from pipeline.recipe.recipe import read_json, write_json


def note_death(run: Path, *, worker: int, error: str) -> None:
    write_json(RunFolder(run).died, {"worker": worker, "error": error})


def noted(run: Path) -> dict[str, Any] | None:
    """The last death that nobody has told yet; None where what was noted cannot be read, which is
    no reason not to train.
    """
    file = RunFolder(run).died
    with suppress(ValueError):
        return read_json(file) if file.exists() else None
    return None


def forget_death(run: Path) -> None:
    """Once it is told."""
    RunFolder(run).died.unlink(missing_ok=True)
