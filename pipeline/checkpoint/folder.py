"""Checkpoints in a folder: written in a hidden one beside them and renamed, so that one is whole or has another name."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.place import read_trainer
from pipeline.disk import sync_folder


@dataclass(frozen=True)
class Folder:
    """`folder`: RUN/checkpoints, or another one of a run's own, on storage that every rank sees."""

    folder: Path

    @property
    def staging(self) -> Path:
        return self.folder

    def names(self) -> list[str]:
        return [path.name for path in step_folders(self.folder)]

    def address(self, name: str) -> str:
        return str(self.folder / name)

    def put(self, temp: Path, name: str, files: Iterable[str]) -> None:
        pass  # they are on the storage that they belong on

    def finish(self, temp: Path, name: str) -> None:
        if (self.folder / name).exists():  # a step redone after a rollback; the redone one is as good and surely whole
            self.delete(name)
        temp.rename(self.folder / name)
        sync_folder(self.folder)

    def fetch(self, name: str) -> Path:
        return self.folder / name

    def trainer(self, name: str) -> dict[str, Any]:
        return read_trainer(self.folder / name)

    def delete(self, name: str) -> None:
        doomed = self.folder / f".deleting-{name}"
        shutil.rmtree(doomed, ignore_errors=True)
        (self.folder / name).rename(doomed)
        shutil.rmtree(doomed)

    def set_aside(self, name: str, suffix: str) -> str:
        moved = self.folder / "quarantine" / f"{name}-{suffix}"
        moved.parent.mkdir(exist_ok=True)
        (self.folder / name).rename(moved)
        return str(moved)

    def is_pinned(self, name: str) -> bool:
        return _pin_of(self.folder / name).exists()

    def sweep(self) -> None:
        for abandoned in (*self.folder.glob(".writing-*"), *self.folder.glob(".deleting-*")):
            shutil.rmtree(abandoned)


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def pin(path: Path) -> None:
    """Keep a checkpoint from being pruned: somebody outside of the run knows it by its address."""
    _pin_of(path).touch()


def _pin_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.pinned")  # beside it: what lies in it is sealed
