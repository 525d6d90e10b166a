"""Checkpoints in a folder on storage that all ranks share: written beside it, then renamed."""

from __future__ import annotations

import contextlib
import errno
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.core.files import FOR_THE_USER, retry_read, sync_folder, write_whole
from pipeline.core.shared_marker import Marker, placed_marker
from pipeline.train.checkpoint.place import WRITING

MARKER = ".shared-"
LOOKS, LOOK_S = 60, 1.0
"""NFS caches names for 60 s by default (acdirmax; Linux 6, nfs(5))"""
_REPLACED = ".replaced-"  # a whole checkpoint; it counts again if its successor is missing
_DELETING = ".deleting-"


@dataclass(frozen=True)
class Folder:
    """`folder`: RUN/checkpoints, or another folder that belongs to one run."""

    folder: Path

    @property
    def staging(self) -> Path:
        return self.folder

    def names(self) -> list[str]:
        return [path.name for path in step_folders(self.folder)]

    def address(self, name: str) -> str:
        return str(self.folder / name)

    def finish(self, temp: Path, name: str, check: Callable[[], None] = lambda: None) -> str:
        """See `Place`; `check` is called before the last step."""
        self.tidy(name)  # an earlier `tidy` may have failed
        check()
        if (self.folder / name).exists():  # repeated after a rollback, or with its score
            (self.folder / name).rename(self.folder / f"{_REPLACED}{name}")
        temp.rename(self.folder / name)
        sync_folder(self.folder)
        return self.address(name)

    def tidy(self, name: str) -> None:
        replaced = self.folder / f"{_REPLACED}{name}"
        if replaced.exists() and (self.folder / name).exists():
            self._delete(replaced, name)

    def fetch(self, name: str) -> Path:
        return self.folder / name

    def read(self, file: str) -> bytes:
        return retry_read((self.folder / file).read_bytes)

    def write(self, file: str, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / file, content)

    def delete(self, name: str) -> None:
        self._delete(self.folder / name, name)

    def set_aside(self, name: str, aside: str) -> None:
        moved = self.folder / aside
        moved.parent.mkdir(exist_ok=True)
        (self.folder / name).rename(moved)

    def sweep(self) -> None:
        for replaced in self.folder.glob(f"{_REPLACED}*"):
            name = replaced.name.removeprefix(_REPLACED)
            if not (self.folder / name).exists():  # its writer died between the two renames
                replaced.rename(self.folder / name)
                continue
            with contextlib.suppress(OSError):
                self._delete(replaced, name)
        for prefix in (WRITING, _DELETING):
            for abandoned in self.folder.glob(f"{prefix}*"):
                shutil.rmtree(abandoned, ignore_errors=True)
        for marker in self.folder.glob(f"{MARKER}*"):
            marker.unlink(missing_ok=True)

    def _delete(self, path: Path, name: str) -> None:
        """Rename first: half of a checkpoint never has its name. The new name is always free."""
        doomed = self.folder / f"{_DELETING}{time.time_ns():x}-{name}"
        path.rename(doomed)
        shutil.rmtree(doomed)


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def pin(path: Path) -> None:
    """Keep a checkpoint from being pruned: somebody outside of the run knows its address."""
    path.with_name(f"{path.name}.pinned").touch()


def check_shared(
    folder: Path,
    *,
    rank: int,
    each: Callable[[Any], list[Any]],
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Check that all ranks see the same folder; collective.

    Rank 0 puts a marker there, and every rank looks for it. Rank 0 would wait for ever for the
    files of a rank that writes to another disk. See `Checkpoints` for `each` and `beat`.

    Raises:
        UserError: a rank does not see the marker, or rank 0 may not write there.
        OSError: rank 0 cannot write there now; on every rank.
    """
    with contextlib.ExitStack() as ends:
        marker, number, said = each(_put_marker(folder, ends) if rank == 0 else None)[0]
        if marker is None:
            told = f"checkpoints: worker 0 must be able to write to {folder}; got {said}"
            raise UserError(told) if number in FOR_THE_USER else OSError(number, told)
        for _ in range(LOOKS):
            if all(each(marker.is_in(folder))):
                return
            beat()
            time.sleep(LOOK_S)
        seen = each(marker.is_in(folder))
        hosts = each(socket.gethostname())
    blind = ", ".join(f"{at} on {hosts[at]}" for at, sees in enumerate(seen) if not sees)
    raise UserError(
        f"checkpoints: all workers must see {folder} as worker 0 on {hosts[0]} does; "
        f"worker {blind} does not: "
        "name storage that the nodes share with --checkpoints, or --runs"
    )


def _put_marker(folder: Path, ends: contextlib.ExitStack) -> tuple[Marker | None, int, str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return ends.enter_context(placed_marker(folder, prefix=MARKER)), 0, ""
    except OSError as error:
        return None, error.errno or errno.EIO, f"{error.strerror or error}"
