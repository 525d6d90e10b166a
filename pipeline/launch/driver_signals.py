"""Requests by signals to the driver of a run or a suite.

Ctrl-C, SIGTERM     save after the current step and stop; a second one stops at once
SIGUSR1, SIGHUP     save and stop, however often they come. A scheduler sends SIGUSR1 before its
                    time limit; SIGHUP comes when a terminal closes
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pipeline.core.run_folder import RunFolder
from pipeline.train.job import was_stopped

PATIENT = (signal.SIGUSR1, signal.SIGHUP)  # Signals that never mean "at once"
# One request may come as several signals: to a process and to its group, or for each thread of a
# parent that dies (Linux 6).
ECHO_S = 0.3


@contextmanager
def on_stop_signals(hear: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Inside, call `hear` once for each request. The call interrupts the main thread.

    SIGHUP stays ignored if it was ignored when this process started (nohup).
    """
    heard = -math.inf

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        is_echo, heard = time.monotonic() - heard < ECHO_S, time.monotonic()
        if not is_echo:
            hear(signal.Signals(number))

    wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Passes signals on to the workers, as a file in the run's folder. For `on_stop_signals`."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._by, self._is_said = "", False

    def hear(self, number: signal.Signals) -> None:
        """Ask the workers to stop; the second time, end this process.

        The first time nothing is printed here: the main thread may be in the middle of a line.
        """
        if not self._by:
            self._by = number.name
            self._ask()
        elif number not in PATIENT:
            try:
                self._say("stopped at once; the last checkpoint counts")
            finally:
                os._exit(130)

    def report(self) -> None:
        """Print the request, and repeat it if the storage did not take the file. Call it often."""
        if not self._by:
            return
        self._ask()
        if not self._is_said:
            self._is_said = True
            self._say(f"{self._by}: saving after this step; once more to stop at once")

    def _ask(self) -> None:
        with suppress(OSError):
            if not was_stopped(self._folder):
                RunFolder(self._folder).stop_request.write_text(self._by)


@contextmanager
def blocked_signal(number: signal.Signals) -> Iterator[None]:
    """Inside, block a signal. Processes that are started inside never get it. This process gets it
    at the end of the block at the latest.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
