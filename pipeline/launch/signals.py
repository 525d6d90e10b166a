"""What signals ask of whoever drives a run or a suite.

Ctrl-C, SIGTERM     to save after the step at hand and to stop; the second one to stop at once
SIGUSR1, SIGHUP     to save and to stop, however often they come: a scheduler sends the one ahead of
                    its time limit, the other comes of a terminal that is gone
"""

from __future__ import annotations

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

PATIENT = (signal.SIGUSR1, signal.SIGHUP)
ECHO_S = 0.3
"""One wish may come as several signals: to a process and to its group, or for each thread of a
parent that dies (Linux 6).
"""


@contextmanager
def wishes(hear: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Inside, every wish goes to `hear`, once, in the middle of whatever the main thread does.

    A SIGHUP that whoever started this process had it ignore (nohup) stays ignored.
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


@contextmanager
def stops_on_signal(folder: Path, say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Inside, signals ask the run in this folder to stop."""
    request = StopRequest(folder, say)
    with wishes(request.hear):
        yield request


class StopRequest:
    """What was heard, and what became of it."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._by = ""
        self._is_said = False

    def hear(self, number: signal.Signals) -> None:
        """Asks the workers. The first time nothing is said here: the main thread may be in the
        middle of a line.
        """
        if not self._by and not self._is_there():
            self._by = number.name
            self._ask()
        elif number not in PATIENT:
            try:
                self._say("stopped at once; the last checkpoint counts")
            finally:
                os._exit(130)

    def tell(self) -> None:
        """To be called now and then: says what was heard, and asks once more where storage did not
        take it.
        """
        if not self._by:
            return
        if not self._is_there():
            self._ask()
        if not self._is_said:
            self._is_said = True
            self._say(f"{self._by}: saving after this step; once more to stop at once")

    def _ask(self) -> None:
        with suppress(OSError):
            RunFolder(self._folder).stop.write_text(self._by)

    def _is_there(self) -> bool:
        try:
            return was_stopped(self._folder)
        except OSError:
            return False


@contextmanager
def withheld(number: signal.Signals) -> Iterator[None]:
    """Processes that are started inside never get it; this one does, afterwards at the latest."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
