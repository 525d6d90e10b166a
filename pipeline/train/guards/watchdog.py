"""Ends a worker that hangs: the stacks of its threads are written into the run's folder, and the
process ends. It is then restarted.

A hang in a loader, a lock or a collective raises nothing. For Ray a worker is alive as long as its
actor answers. The timer is the interpreter's own (faulthandler). It runs even if no Python thread
can run.
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

_PART = 0.1  # share of the patience after which the timer is reset; a reset costs a thread


def unreported_hangs(run: Path, events: Sequence[Event]) -> dict[str, int]:
    """The files of stacks that the journal does not name, relative to the run's folder, each with
    the rank that hung.
    """
    known = {event.stacks for event in events if isinstance(event, Hung)}
    folder, hangs = RunFolder(run).stacks, {}
    for file in sorted(folder.glob("rank*")):
        match, path = re.match(r"rank(\d+)-.+\.txt$", file.name), f"{folder.name}/{file.name}"
        with suppress(FileNotFoundError):  # its worker has ended normally meanwhile
            if match is not None and path not in known and file.stat().st_size:  # 0: killed
                hangs[path] = int(match[1])
    return hangs


class Watchdog:
    """The watchdog of one process. As a context manager it watches: `beat` must be called at least
    every `patience_s` seconds. 0: it does not watch.
    """

    def __init__(self, run: Path, *, rank: int, patience_s: float) -> None:
        self._patience_s = patience_s  # the current patience
        self._path = RunFolder(run).stacks / f"rank{rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        self._file: IO[str] | None = None
        self._set_in = 0  # the part of the patience, counted from 1970, in which the timer was set

    def __enter__(self) -> Self:
        if self._patience_s > 0:
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
        """A sign of life.

        The timer is reset when the clock enters another part of the patience, on all ranks at the
        same time. So the ranks that wait for a hung rank do not end before that rank.
        """
        if self._patience_s > 0 and self._part() != self._set_in:
            self._set()

    def off(self) -> AbstractContextManager[None]:
        """Inside, it does not watch: one worker may be busy for long while the others wait."""
        return self.patient(math.inf)

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Inside, the patience is at least `seconds`."""
        own = self._patience_s
        self._patience_s = max(own, seconds) if own > 0 else 0.0
        self._set()
        try:
            yield
        finally:
            self._patience_s = own
            self._set()

    def _part(self) -> int:
        return int(time.time() / (_PART * self._patience_s))

    def _set(self) -> None:
        if self._file is None:
            return
        if 0 < self._patience_s < math.inf:
            self._set_in = self._part()
            faulthandler.dump_traceback_later(self._patience_s, exit=True, file=self._file)
        else:
            faulthandler.cancel_dump_traceback_later()
