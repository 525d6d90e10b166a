"""The state of a run, derived from its journal and the driver's lock: no process keeps it."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Literal

from pipeline.track.journal import last

__all__ = ["ENDS", "State", "is_driven", "state_of"]

State = Literal["new", "running", "finished", "stopped", "failed", "diverged", "interrupted"]
ENDS: dict[str, State] = {
    "start": "interrupted",
    "finish": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "diverged": "diverged",
}
"""the state after each kind of event that begins or ends an attempt, if no driver holds the run"""


def state_of(run_dir: Path) -> State:
    """`finished` after its finish; else `running` while a driver holds the run; else its last end.

    `interrupted`: the last attempt has no end (killed, power cut). `new`: no attempt has begun.
    """
    newest = last(run_dir / "journal.jsonl", *ENDS)
    if newest is None:
        state: State = "finished" if (run_dir / "summary.json").exists() else "new"
    else:
        state = ENDS[newest["event"]]
    return "running" if state != "finished" and is_driven(run_dir) else state


def is_driven(run_dir: Path) -> bool:
    """Whether a live process holds the flock of `driver.lock`.

    This takes the lock, shared, for an instant: a driver should try for it more than once.
    """
    try:
        with (run_dir / "driver.lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False  # closing the file lets the shared lock go
    except FileNotFoundError:
        return False
