"""An interpreter that has read with FFCV ends on one core."""

import subprocess
import sys

FORKS = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from pipeline.data.ffcv import api
if not os.fork():
    os._exit(0)
os.wait()
print("its last line", flush=True)
"""


def test_an_interpreter_that_has_forked_ends_on_one_core() -> None:
    """As Ray forks in every driver; numba waited for ever, for a task of TBB that nobody was left
    to do.
    """
    done = subprocess.run(
        [sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "its last line\n"), done.stderr
