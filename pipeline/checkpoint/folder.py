"""Checkpoints in a folder: written in a hidden one beside them and renamed, so that one is whole or has another name."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.place import TRAINER, WRITING, read_trainer
from pipeline.checkpoint.shared import MARKER
from pipeline.disk import Unreadable, sync_folder, tried, write_whole

_REPLACED = ".replaced-"  # whole, and counts again where its place is empty
_DELETING = ".deleting-"


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

    def finish(self, temp: Path, name: str) -> str:
        self.tidy(name)  # of what could not be deleted when this was last replaced
        if (self.folder / name).exists():  # redone after a rollback, or saved again with the score of its evaluation
            (self.folder / name).rename(self.folder / f"{_REPLACED}{name}")
        temp.rename(self.folder / name)
        sync_folder(self.folder)
        return self.address(name)

    def tidy(self, name: str) -> None:
        replaced = self.folder / f"{_REPLACED}{name}"
        if replaced.exists() and (self.folder / name).exists():  # not before the new one is there for good
            self._delete(replaced, name)

    def fetch(self, name: str) -> Path:
        return self.folder / name

    def trainer(self, name: str) -> dict[str, Any]:
        try:
            return tried(lambda: read_trainer(self.folder / name))
        except Unreadable as error:  # damaged, as `damage` says of it
            raise ValueError(f"{self.folder / name / TRAINER} cannot be read: {error.strerror}") from error

    def delete(self, name: str) -> None:
        self._delete(self.folder / name, name)

    def set_aside(self, name: str, aside: str) -> None:
        moved = self.folder / aside
        moved.parent.mkdir(exist_ok=True)
        (self.folder / name).rename(moved)

    def read(self, file: str) -> bytes:
        return (self.folder / file).read_bytes()

    def write(self, file: str, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / file, content)

    def is_pinned(self, name: str) -> bool:
        return _pin_of(self.folder / name).exists()

    def sweep(self) -> None:
        for replaced in self.folder.glob(f"{_REPLACED}*"):
            name = replaced.name.removeprefix(_REPLACED)
            if (self.folder / name).exists():
                with contextlib.suppress(OSError):
                    self._delete(replaced, name)
            else:  # its writer died before the new one was in its place
                replaced.rename(self.folder / name)
        for abandoned in (*self.folder.glob(f"{WRITING}*"), *self.folder.glob(f"{_DELETING}*")):
            shutil.rmtree(abandoned, ignore_errors=True)
        for marker in self.folder.glob(f"{MARKER}*"):
            marker.unlink(missing_ok=True)

    def _delete(self, path: Path, name: str) -> None:
        """Under a name from which nothing comes back."""
        doomed = self.folder / f"{_DELETING}{time.time_ns():x}-{name}"  # beside what could not be deleted before
        path.rename(doomed)
        shutil.rmtree(doomed)


def step_folders(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def pin(path: Path) -> None:
    """Keep a checkpoint from being pruned: somebody outside of the run knows it by its address."""
    _pin_of(path).touch()


def _pin_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.pinned")  # beside it: what lies in it is sealed
