"""Where a process puts what it fetches from a bucket: a folder of its own, on the run's storage, which its other ranks see.

It goes with the process. That of one which was killed is swept by the next start: the kernel has let go of its lock.
"""

from __future__ import annotations

import atexit
import fcntl
import shutil
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO

_LOCK, _FETCHED = ".fetching-", ".fetched-"

_own: dict[Path, tuple[Path, IO[str]]] = {}
"""this process's folder, and its lock, by the folder that both lie in"""


def own_folder(staging: Path) -> Path:
    """This process's in `staging`, empty: what it had fetched before is gone."""
    if staging not in _own:
        _own[staging] = _locked(staging)
    folder, _ = _own[staging]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def sweep(staging: Path) -> None:
    """Delete the folders of processes that are gone; what cannot be deleted stays."""
    for lock in staging.glob(f"{_LOCK}*"):
        with suppress(OSError), lock.open("r+") as handle:  # a BlockingIOError: its process lives; NFS locks what may be written
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock)


def _locked(staging: Path) -> tuple[Path, IO[str]]:
    """The name of a new one, which is locked before it is there."""
    staging.mkdir(parents=True, exist_ok=True)
    lock = staging / f"{_LOCK}{uuid.uuid4().hex}"
    handle = lock.open("w")
    fcntl.flock(handle, fcntl.LOCK_EX)
    atexit.register(_remove, lock)
    return _folder_of(lock), handle


def _remove(lock: Path) -> None:
    folder = _folder_of(lock)
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():  # else the next sweep finds it by its lock
        lock.unlink(missing_ok=True)


def _folder_of(lock: Path) -> Path:
    return lock.with_name(lock.name.replace(_LOCK, _FETCHED))
