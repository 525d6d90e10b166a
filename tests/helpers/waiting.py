"""What a test waits for: a condition, within a time, while a process lives."""

import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def until(
    holds: Callable[[], T],
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
