"""A worker that hangs: what each of its threads is at goes into the run's folder, and the process ends, to be started again.

A hang in a loader, a lock or a collective raises nothing, and Ray looks no closer at a worker whose actor answers. The timer
is the interpreter's own (faulthandler), which needs no thread of Python to get its turn.
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

FOLDER = "stacks"
"""in a run's folder: a file for each rank and attempt that hung"""
_ARMED_ANEW = 0.1  # of the patience: to arm it costs a thread


class Watchdog:
    """Of one process; inside, `beat` has to be called at least every `patience_s` seconds. 0: nobody watches."""

    def __init__(self, run: Path, *, rank: int, patience_s: float) -> None:
        self.patience_s = patience_s
        self._path = run / FOLDER / f"rank{rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        self._file: IO[str] | None = None
        self._armed = 0.0
        self._is_off = False

    def __enter__(self) -> Watchdog:
        if self.patience_s > 0:
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
        """It goes on."""
        if self._file is not None and not self._is_off and time.monotonic() - self._armed > _ARMED_ANEW * self.patience_s:
            self._arm()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Nobody watches inside, where one worker may rightly be busy for longer and the others wait for it."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
        self._is_off = True
        try:
            yield
        finally:
            self._is_off = False
            if self._file is not None:
                self._arm()

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """A sign of life is due every so many seconds inside, where its own patience is shorter."""
        own, self.patience_s = self.patience_s, max(self.patience_s, seconds)
        if self._file is not None:
            self._arm()
        try:
            yield
        finally:
            self.patience_s = own
            if self._file is not None:
                self._arm()

    def _arm(self) -> None:
        assert self._file is not None, "inside"
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(self.patience_s, exit=True, file=self._file)
