"""MLflow is told of a driver that was killed where it stood: by `kill -9`, or by a kernel short of memory.

Nothing can be done then by the driver itself. So a small process in a session of its own holds the other end of a pipe, and does
nothing until that ends: a driver that leaves in order has said so first, and after one that could not, or that left at once when
it was asked to twice, `spiketrain sync` delivers the rest of the run and marks it KILLED. What it says is in the run's folder.
Where a machine, a container or a scheduler's job goes as a whole, it goes too, and whoever resumes or syncs the run tells MLflow.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pipeline

LOG = "last-word.log"
"""in the folder of a run whose driver was killed: what the sync said"""

_WAIT = """
import os, sys
if not os.read(0, 1):
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@contextmanager
def synced_if_killed(folder: Path, uri: str, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, MLflow at `uri` is told of the death of this process. A machine that has no room for the other one is told of."""
    try:
        heir = _heir(folder, uri)
    except OSError as error:
        say(f"no process that outlives this one ({error.strerror}): after a kill, `spiketrain sync` tells MLflow")
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # somebody killed it first
            heir.communicate(b".")


def _heir(folder: Path, uri: str) -> subprocess.Popen[bytes]:
    """It waits without looking for packages; for the sync, -P: what lies in the working directory is not this one."""
    sync = ["-P", "-m", "pipeline", "sync", str(folder)]
    ours = str(Path(pipeline.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WAIT, str(folder / LOG), *sync],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": path},
        start_new_session=True,
    )
