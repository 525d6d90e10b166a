"""Down to the disk: what a file system promises about names and content only once asked, and whose
business its errors are.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""what a new process meets again"""
FOR_THE_USER = (*LASTING, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
"""what a user has to change, a name in the way too, unless it is one that is drawn anew; anything
else may pass by itself
"""
UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
"""a bad sector, a checksum of the file system's: the bytes are gone, if they stay so and the
storage is there
"""
TRIES, TRY_S = 3, 1.0

T_ = TypeVar("T_")


def is_for_the_user(error: OSError) -> bool:
    """Whether a user has to change something before it can be gone."""
    return lasts(error) or error.errno in FOR_THE_USER


def lasts(error: OSError) -> bool:
    """Whether a process that is started again meets it again, until a user has changed
    something.
    """
    return (
        isinstance(error, PermissionError) or error.errno in LASTING
    )  # s3fs (2026.9) gives the former no number


class Unreadable(OSError):
    """The medium has failed at each try; `strerror` says how."""


def tried(read: Callable[[], T_]) -> T_:
    """What `read` gives, which is asked again where the medium fails.

    Raises:
        Unreadable: it has failed each time.
        OSError: another error, at once.
    """
    left = TRIES
    while True:
        try:
            return read()
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            left -= 1
            if left == 0:
                raise Unreadable(error.errno, os.strerror(error.errno), error.filename) from error
        time.sleep(TRY_S)


def is_name(text: str) -> bool:
    """Whether a file or folder of this name lies in the folder that it is made in, nowhere beside
    or above it.
    """
    return Path(text).name == text and text.strip() not in ("", ".", "..")


def sync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Makes a new file's name survive a power cut, not only its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and through to the disk.

    The name of what is not whole yet is drawn: processes of two machines may have the same number.
    """
    temp = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temp.write_bytes(content)
        sync_file(temp)
        temp.rename(path)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(path.parent)
