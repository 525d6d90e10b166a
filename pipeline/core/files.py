"""Files that survive a power cut, and the kinds of file-system errors.

Some errors are temporary, some remain after a restart, and some have to be resolved by the user.
"""

import errno
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""errors that remain after a restart of the process"""
FOR_THE_USER = (*LASTING, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
"""errors that only the user can resolve, including existing names; other errors may be temporary"""
UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
"""a bad sector or a wrong checksum of the file system: if the error remains, the bytes are lost"""
TRIES, TRY_S = 3, 1.0

T_ = TypeVar("T_")


def is_for_the_user(error: OSError) -> bool:
    """Whether the error remains until the user changes something."""
    return is_permanent(error) or error.errno in FOR_THE_USER


def is_permanent(error: OSError) -> bool:
    """Whether the error remains after a restart of the process."""
    # s3fs (2026.9) raises PermissionError without an errno.
    return isinstance(error, PermissionError) or error.errno in LASTING


class Unreadable(OSError):
    """The storage medium failed at every attempt; `strerror` has the reason."""


def retry_read(read: Callable[[], T_]) -> T_:
    """Call `read`, up to three times if the storage medium fails.

    Raises:
        Unreadable: every attempt failed.
        OSError: any other error, at the first attempt.
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
    """Whether `text` is a plain file name, not a path that leads to another folder."""
    return Path(text).name == text and text.strip() not in ("", ".", "..")


def sync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that the names of its new files survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, and flush it to the disk.

    The temporary name is random, because processes on two machines may have the same process id.
    """
    temp = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        temp.write_bytes(content)
        sync_file(temp)
        temp.rename(path)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(path.parent)
