"""A terminal that may be lost while a run trains: a full disk beneath a log, a pipe that nobody
reads, an ssh that ended.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console

_STDERR = 2


def outlive(console: Console) -> None:
    """From here on nothing that is printed on it raises: once it takes no more, that is said on
    stderr, and all is quiet.
    """
    if not isinstance(console.file, _Losable):
        console.file = cast(IO[str], _Losable(console.file))


class _Losable:
    """Writes to `file` until it fails. So rich (15.0), too, never meets a broken pipe, of which it
    ends the process.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file, self._is_lost = file, False

    def write(self, text: str) -> int:
        self._unless_lost(lambda: self._file.write(text))
        return len(text)

    def flush(self) -> None:
        self._unless_lost(self._file.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _unless_lost(self, act: Callable[[], object]) -> None:
        if self._is_lost:
            return
        try:
            act()
        except OSError as error:
            self._is_lost = True
            with suppress(OSError):
                told = (
                    f"shown no more: {error.strerror or error}; training goes on, and its journal"
                    " has everything\n"
                )
                os.write(_STDERR, told.encode())
            self._empty()

    def _empty(self) -> None:
        """What its buffer holds goes nowhere: the interpreter would try again as it ends, and end
        with 120 (Python 3.11).
        """
        with suppress(OSError, ValueError):  # it may have no descriptor
            descriptor, nowhere = self._file.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
