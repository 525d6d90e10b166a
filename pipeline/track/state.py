"""The state of a run, derived from its journal and the driver's lock: no process keeps it."""

from __future__ import annotations

import fcntl
from pathlib import Path

from pipeline.core.run_folder import RunFolder
from pipeline.track.events import KINDS, State, kind_of
from pipeline.track.journal import last

__all__ = ["State", "is_driven", "state_of"]


def state_of(run_dir: Path) -> State:
    """`finished` after its finish; else `running` while a driver holds the run; else its last end.

    `interrupted`: the last attempt has no end (killed, power cut). `new`: no attempt has begun.
    """
    files = RunFolder(run_dir)
    newest = last(files.journal, *(name for name, kind in KINDS.items() if kind.state is not None))
    if newest is None:
        state: State = "finished" if files.summary.exists() else "new"
    else:
        state = kind_of(newest).state or "new"
    return "running" if state != "finished" and is_driven(run_dir) else state


def is_driven(run_dir: Path) -> bool:
    """Whether a live process holds the flock of `driver.lock`.

    This takes the lock, shared, for an instant: a driver should try for it more than once.
    """
    try:
        with RunFolder(run_dir).driver_lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False  # closing the file lets the shared lock go
    except FileNotFoundError:
        return False
