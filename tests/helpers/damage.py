"""Ways to damage a file, or to let the storage below it fail."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core import files as disk


def flip(path: Path, at: int) -> None:
    """One bit of the byte at `at` is another."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def fail_reads(
    patch: pytest.MonkeyPatch,
    *paths: Path,
    where: Callable[[int, int], bool] = lambda offset, length: True,
    number: int = errno.EIO,
) -> None:
    """Reading a file at (offset, length) fails; names are there, and what is mapped already
    stays.
    """
    pread, files = os.pread, [path.stat() for path in paths]

    def fails(file: int, length: int, offset: int) -> bytes:
        if where(offset, length) and any(os.path.samestat(os.fstat(file), each) for each in files):
            raise OSError(number, os.strerror(number))
        return pread(file, length, offset)

    patch.setattr(os, "pread", fails)
    patch.setattr(disk, "TRY_S", 0.0)
