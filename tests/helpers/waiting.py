"""What a test waits for: a condition, within a time, while a process lives."""

import os
import subprocess
import threading
import time
from collections.abc import Callable
from multiprocessing import parent_process
from typing import Any, TypeVar

T = TypeVar("T")


def until(
    holds: Callable[[], T | None],
    *,
    within: float,
    process: subprocess.Popen[Any] | None = None,
    said: Callable[[], str] = str,
    pause: float = 0.05,
) -> T:
    """Wait until `holds()` is true and return its value.

    Fails with what `said` returns after `within` seconds, or when the process has ended."""
    deadline = time.monotonic() + within
    while not (found := holds()):
        assert process is None or process.poll() is None, f"the process ended: {said()}"
        assert time.monotonic() < deadline, f"not within {within} s: {said()}"
        time.sleep(pause)
    return found


def end_with_parent() -> None:
    """Let this process, which multiprocessing has started, end with the one of the test.

    A timeout ends pytest at once, without a word to others."""
    parent = parent_process()
    assert parent is not None, "started by pytest"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
