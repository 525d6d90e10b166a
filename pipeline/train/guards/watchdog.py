"""Ends a worker that hangs, and writes the stacks of its threads to the run's folder. Ray then
restarts the workers.

A hang in a loader, a lock or a collective raises no error. Ray considers a worker alive as long as
its actor responds. The timer is that of `faulthandler`, which fires even if no Python thread can
run.
"""

import faulthandler
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Self

from pipeline.core.run_folder import RunFolder
from pipeline.track.events import Event, Hung

# The timer is set again after this fraction of the timeout, not at every `beat`, because
# faulthandler starts a thread each time.
_INTERVAL = 0.1


def unreported_hangs(run: Path, events: Sequence[Event]) -> dict[str, int]:
    """The hangs that are not in the journal. A key is the path of the stacks relative to the run's
    folder, and its value is the rank that hung.
    """
    reported = {event.stacks for event in events if isinstance(event, Hung)}
    folder, hangs = RunFolder(run).stacks, {}
    for file in sorted(folder.glob("rank*")):
        match, path = re.match(r"rank(\d+)-.+\.txt$", file.name), f"{folder.name}/{file.name}"
        with suppress(FileNotFoundError):  # a worker deletes its file when it ends without a hang
            # The file is empty if the worker was killed.
            if match is not None and path not in reported and file.stat().st_size:
                hangs[path] = int(match[1])
    return hangs


class Watchdog:
    """The watchdog of one process. Inside its context, the process ends if `beat` is not called for
    about `patience_s` seconds; 0: the watchdog is disabled.
    """

    def __init__(self, run: Path, *, rank: int, patience_s: float) -> None:
        self._timeout_s = patience_s  # the current timeout
        self._path = RunFolder(run).stacks / f"rank{rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        self._file: IO[str] | None = None
        self._set_in = 0  # the interval, numbered from 1970, in which the timer was set

    def __enter__(self) -> Self:
        if self._timeout_s > 0:
            self._path.parent.mkdir(exist_ok=True)
            self._file = self._path.open("w")
            self._set()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._file = None
            self._path.unlink()

    def beat(self) -> None:
        """Report that this worker does not hang. This sets the timer again if a new interval began.

        The intervals begin at the same times on all ranks, so a hung rank and the ranks that wait
        for it usually end at about the same time.
        """
        if self._timeout_s > 0 and self._interval() != self._set_in:
            self._set()

    def off(self) -> AbstractContextManager[None]:
        """Inside the context, the watchdog is disabled, because one worker may be busy for long
        while the others wait.
        """
        return self.patient(math.inf)

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Inside the context, the timeout is at least `seconds`."""
        own_timeout_s = self._timeout_s
        self._timeout_s = max(own_timeout_s, seconds) if own_timeout_s > 0 else 0.0
        self._set()
        try:
            yield
        finally:
            self._timeout_s = own_timeout_s
            self._set()

    def _interval(self) -> int:
        return int(time.time() / (_INTERVAL * self._timeout_s))

    def _set(self) -> None:
        if self._file is None:
            return
        if 0 < self._timeout_s < math.inf:
            self._set_in = self._interval()
            faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=self._file)
        else:
            faulthandler.cancel_dump_traceback_later()
