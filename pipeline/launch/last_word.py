"""MLflow is told of a driver that was killed where it stood: by `kill -9`, or by a kernel short of memory.

Nothing can be done then by the driver itself. So a small process in a session of its own holds the other end of a pipe, and does
nothing until that ends: a driver that ends by itself has said so first, and after one that could not, `spiketrain sync` delivers
the rest of the run and marks it KILLED. Where a whole machine or container goes, it goes too, and whoever resumes or syncs the
run tells MLflow.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_WAIT = "import os, sys\nif not os.read(0, 1): os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


@contextmanager
def synced_if_killed(folder: Path, uri: str) -> Iterator[None]:
    """Inside, MLflow at `uri` is told of the death of this process; whoever leaves it alive has told what there is to tell."""
    heir = subprocess.Popen(
        # -I -S: a tenth of the memory and of the time of an interpreter that looks for packages; the sync does.
        [sys.executable, "-I", "-S", "-c", _WAIT, "-m", "pipeline", "sync", str(folder.resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # the driver's terminal is somebody else's by then; what fails here, the user's own sync says
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
        start_new_session=True,
    )
    try:
        yield
    finally:
        with suppress(OSError):  # somebody killed it first
            heir.communicate(b".")
