"""What a file's medium has lost, told from storage that is away as a whole: a bad sector, or a
server that fails over.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.core.files import UNREADABLE, Unreadable, retry_read

PLACES = 8
"""of a file, evenly over it, that can be read where only a sector of it cannot"""

T_ = TypeVar("T_")


def read_part(path: Path, file: int, part: range, read: Callable[[int], T_]) -> T_:
    """What `read` gives of the bytes `part` of the file, from its open descriptor; where that
    fails, from a fresh one.

    Raises:
        Unreadable: the medium has lost them, and the others are there.
        OSError: the storage is away, and may be back for workers that are started again.
    """

    def afresh() -> T_:
        with path.open("rb", buffering=0) as again:
            return read(again.fileno())

    try:
        return read(file)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
    try:
        return retry_read(afresh)
    except Unreadable:
        look_at(path, besides=part)
        raise


def look_at(path: Path, *, besides: range = range(0)) -> None:
    """Read a byte here and there, outside of the bytes `besides`.

    Raises:
        OSError: one of them cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for at in range(0, size, max(1, size // PLACES)):
            if at not in besides:
                os.pread(file.fileno(), 1, at)
