"""A worker that hangs: what each of its threads is at goes into the run's folder, and the process
ends, to be started again.

A hang in a loader, a lock or a collective raises nothing, and Ray looks no closer at a worker whose
actor answers. The timer is the interpreter's own (faulthandler), which needs no thread of Python to
get its turn.
"""

from __future__ import annotations

import faulthandler
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

from pipeline.core.run_folder import RunFolder
from pipeline.track.events import Event, Hung

_ARMED_ANEW = 0.1  # of the patience: to arm it costs a thread


def untold(run: Path, events: Sequence[Event]) -> dict[str, int]:
    """The files, beneath the run's folder, of hangs that its journal does not know, and the ranks
    that hung.
    """
    told = {event.stacks for event in events if isinstance(event, Hung)}
    folder = RunFolder(run).stacks
    files = (
        (re.match(r"rank(\d+)-.+\.txt$", file.name), file) for file in sorted(folder.glob("rank*"))
    )
    # One that was killed leaves its file empty.
    found = {
        f"{folder.name}/{file.name}": int(named[1])
        for named, file in files
        if named is not None and _size(file)
    }
    return {file: rank for file, rank in found.items() if file not in told}


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # its worker has ended well meanwhile
        return 0


class Watchdog:
    """Of one process; inside, `beat` has to be called at least every `patience_s` seconds. 0:
    nobody watches.
    """

    def __init__(self, run: Path, *, rank: int, patience_s: float) -> None:
        self._patience_s = patience_s
        """at the moment"""
        self._path = RunFolder(run).stacks / f"rank{rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        self._file: IO[str] | None = None
        self._armed = 0
        """in which tenth of the patience, of those since 1970"""

    def __enter__(self) -> Watchdog:
        if self._patience_s > 0:
            self._path.parent.mkdir(exist_ok=True)
            self._file = self._path.open("w")
            self._arm()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._file = None
            self._path.unlink()

    def beat(self) -> None:
        """It goes on.

        Armed anew when the clock begins another tenth of the patience, which it does for all ranks
        at once: those that wait for one that hangs have no less of it left than that one.
        """
        if self._patience_s > 0 and self._armed_in() != self._armed:
            self._arm()

    def off(self) -> AbstractContextManager[None]:
        """Nobody watches inside, where one worker may rightly be busy for longer and the others
        wait for it.
        """
        return self._within(0.0)

    def patient(self, seconds: float) -> AbstractContextManager[None]:
        """A sign of life is due every so many seconds inside, where its own patience is shorter."""
        return self._within(max(self._patience_s, seconds) if self._patience_s > 0 else 0.0)

    @contextmanager
    def _within(self, patience_s: float) -> Iterator[None]:
        own, self._patience_s = self._patience_s, patience_s
        self._arm()
        try:
            yield
        finally:
            self._patience_s = own
            self._arm()

    def _armed_in(self) -> int:
        return int(time.time() / (_ARMED_ANEW * self._patience_s)) if self._patience_s > 0 else 0

    def _arm(self) -> None:
        """Anew; where nobody watches, not at all."""
        if self._file is None:
            return
        self._armed = self._armed_in()
        if self._patience_s > 0:
            faulthandler.dump_traceback_later(self._patience_s, exit=True, file=self._file)
        else:
            faulthandler.cancel_dump_traceback_later()
