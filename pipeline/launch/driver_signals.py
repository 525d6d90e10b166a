"""Signals that ask the driver of a run or a suite to stop.

Ctrl-C, SIGTERM     The run saves after the current step and stops. If another signal came before,
                    the run stops at once.
SIGUSR1, SIGHUP     The run saves and stops, and never stops at once. A scheduler sends SIGUSR1
                    before its time limit. A terminal that closes sends SIGHUP.
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

SAVING_SIGNALS = (signal.SIGUSR1, signal.SIGHUP)  # They never stop a run at once.
AT_ONCE = "a second signal to the suite"  # the text of a request to end a run without saving
# One request may arrive as several signals: one to the process and one to its group, or one for
# each thread of a parent that dies (Linux 6). A signal within this time after another is ignored.
ECHO_S = 0.3


@contextmanager
def on_stop_signals(on_signal: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Inside, call `on_signal` once for each request. The call interrupts the main thread.

    SIGHUP stays ignored if it was ignored when this process started (nohup).
    """
    last_at = -math.inf

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal last_at
        now = time.monotonic()
        is_echo = now - last_at < ECHO_S
        last_at = now
        if not is_echo:
            on_signal(signal.Signals(number))

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    earlier_handlers = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)


class StopRequest:
    """Passes signals to the workers of a run, as a file in the run's folder."""

    def __init__(self, folder: Path, print_line: Callable[[str], None]) -> None:
        self._folder, self._print_line = folder, print_line
        self._signal_name, self._is_printed = "", False

    def on_signal(self, number: signal.Signals) -> None:
        """At the first signal, ask the workers to stop. At a later signal, or if the suite of the
        run has asked to end at once, end this process, unless the signal is one of SAVING_SIGNALS.

        The request is not printed here: the main thread may be in the middle of a line.
        """
        if not self._signal_name and not self._is_to_end_at_once():
            self._signal_name = number.name
            self._write_request()
        elif number not in SAVING_SIGNALS:
            try:
                self._print_line("stopped at once; a resume continues from the last checkpoint")
            finally:
                os._exit(130)

    def _is_to_end_at_once(self) -> bool:
        with suppress(OSError):
            return RunFolder(self._folder).stop_request.read_text() == AT_ONCE
        return False

    def report(self) -> None:
        """Print the request once. If the storage did not take the request, write it again. The
        driver calls this method repeatedly.
        """
        if not self._signal_name:
            return
        self._write_request()
        if not self._is_printed:
            self._is_printed = True
            self._print_line(
                f"{self._signal_name}: saving after this step; another Ctrl-C or SIGTERM stops at"
                " once"
            )

    def _write_request(self) -> None:
        with suppress(OSError):
            if not was_stopped(self._folder):
                RunFolder(self._folder).stop_request.write_text(self._signal_name)


@contextmanager
def blocked_signal(number: signal.Signals) -> Iterator[None]:
    """Block a signal in this thread and in the processes that it starts inside the block."""
    earlier_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier_mask)
