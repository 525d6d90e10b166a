"""One driver for the folder of a run or a suite, whichever machine another one is started on.

The kernel lets go of a process's lock when it dies. That of a machine which dies stays until the
file system gives it up, and by then a scheduler has started the same words elsewhere: so the lock
says whose it is, and another machine's is waited for."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.core.errors import UserError
from pipeline.core.run_folder import RunFolder
from pipeline.train.writer_lock import PATIENCE_S

INSTANT_S = 1.0
"""`spiketrain runs` holds it for an instant, to see whether anybody does"""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def driver_lock(folder: Path) -> Iterator[None]:
    """Hold the folder against every other driver; one on this machine is refused at once, one
    elsewhere has ten minutes to go.

    Raises:
        UserError: somebody else holds it.
    """
    with RunFolder(folder).driver_lock.open("a+") as handle:
        _take(handle, folder)
        handle.truncate(0)
        handle.write(this_machine())
        handle.flush()
        os.fsync(handle.fileno())
        yield


def this_machine() -> str:
    """Its name, and which of its starts this is: what it held before the last one is a dead
    machine's, too.
    """
    return f"{socket.gethostname()} {_BOOT.read_text().strip() if _BOOT.exists() else ''}"


def _take(handle: IO[str], folder: Path) -> None:
    begun, is_told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited_s = time.monotonic() - begun
        if waited_s > INSTANT_S:
            host = _other_machine(handle)
            if host is None:
                raise UserError(
                    f"{folder.name}: is being trained by another process on this machine"
                )
            if waited_s > PATIENCE_S:
                told = (
                    f"is being trained by another process on {host}, which still holds it after"
                    f" {waited_s:.0f} s"
                )
                raise UserError(f"{folder.name}: {told}")
            if not is_told:
                told = (
                    f"is held by {host}: waiting for up to {PATIENCE_S:.0f} s, in which a dead"
                    " machine loses it"
                )
                print(f"{folder.name}: {told}", flush=True)
                is_told = True
        time.sleep(0.5 if is_told else 0.05)


def _other_machine(handle: IO[str]) -> str | None:
    """The name of the one that holds it; None: it is this one, or nobody can tell."""
    handle.seek(0)
    holder = handle.read()
    return None if holder == this_machine() else holder.partition(" ")[0] or None
