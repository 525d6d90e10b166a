"""Whether a lock that one machine holds on a file is seen from another: it is what keeps two drivers off one run.

Some storage keeps locks to each machine (Lustre mounted with localflock, NFS with local_lock, some of FUSE), and some knows none.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.doctor.failed import failed


@contextmanager
def held(file: Path) -> Iterator[None]:
    """With this file locked, as a driver locks a run."""
    with file.open("a") as handle:
        with suppress(OSError):  # where there are no locks, whoever tries one is told
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def tried(file: Path) -> str:
    """`held` where somebody has it locked, `free` where it could be locked as well; `failed: ...` where neither can be said."""
    try:
        with file.open("r+b") as handle:  # must be there: on another disk it is another's
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        return failed(error)
    return "free"
