"""Files on storage that may fail or that several machines share.

Files are written so that they survive a power cut. Some errors of a file system are temporary, some
remain after a restart, and some have to be resolved by the user. A marker shows whether processes
share a folder: one process writes a file with a unique name, and the others look for it.
"""

import errno
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from pipeline.core.errors import UserError

# Errors that remain after a restart of the process.
PERMANENT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# Errors that only the user can resolve, such as a file in place of a folder. Other errors may be
# temporary.
FOR_THE_USER = (*PERMANENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
# A bad sector, or a wrong checksum of the file system. If the error remains, the bytes are lost.
UNREADABLE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
TRIES, TRY_S = 3, 1.0

T_ = TypeVar("T_")


def is_for_the_user(error: OSError) -> bool:
    """Whether the error remains until the user changes something."""
    return is_permanent(error) or error.errno in FOR_THE_USER


def is_permanent(error: OSError) -> bool:
    """Whether the error remains after a restart of the process."""
    # s3fs (2026.9) raises PermissionError without an errno.
    return isinstance(error, PermissionError) or error.errno in PERMANENT


class Unreadable(OSError):
    """The storage medium failed at every attempt; `strerror` has the reason."""


def retry_read(read: Callable[[], T_]) -> T_:
    """Call `read`, up to three times if the storage medium fails.

    Raises:
        Unreadable: every attempt failed.
        OSError: any other error; the call is then not repeated.
    """
    attempts_left = TRIES
    while True:
        try:
            return read()
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            attempts_left -= 1
            if not attempts_left:
                raise Unreadable(error.errno, os.strerror(error.errno), error.filename) from error
        time.sleep(TRY_S)


def lock_within(file: IO[Any], seconds: float) -> bool:
    """Lock an open file against other processes. Returns whether this process got the lock within
    `seconds`. Closing the file releases the lock.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
        time.sleep(0.05)


def cache_folder() -> Path:
    """The user's folder for what can be made or fetched again.

    Raises:
        RuntimeError: the user has no home, and $XDG_CACHE_HOME is not set.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spiketrain"


def is_name(text: str) -> bool:
    """Whether `text` is a plain file name, not a path to another folder."""
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


MARKER = ".shared-"
LOOKS, LOOK_S = 60, 1.0  # NFS caches names for 60 s by default (acdirmax; Linux 6, nfs(5))


@dataclass(frozen=True)
class Marker:
    """The name and the content of a marker file, which are sent to other processes."""

    name: str
    content: str

    def is_in(self, folder: Path) -> bool:
        try:
            return (folder / self.name).read_text() == self.content
        except (OSError, ValueError):  # the file does not exist, or is not text
            return False


def check_shared(
    folder: Path,
    *,
    rank: int,
    gather: Callable[[Any], list[Any]],
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Check that all ranks see the same folder for checkpoints. All ranks must call this function.

    Rank 0 creates a marker there, and every rank looks for the marker. Without this check, rank 0
    would wait forever for the files of a rank that writes to another disk.

    Args:
        gather: gathers every rank's value on every rank, in the order of ranks.
        beat: called repeatedly by a waiting rank.

    Raises:
        UserError: a rank does not see the marker, or rank 0 cannot write until the user acts.
        OSError: rank 0 cannot write for another reason, which may be temporary.
    """
    marker, code, reason = gather(_put_marker(folder) if rank == 0 else None)[0]
    try:
        if code:
            message = f"checkpoints: worker 0 must be able to write to {folder}; got {reason}"
            raise UserError(message) if code in FOR_THE_USER else OSError(code, message)
        for _ in range(LOOKS):
            if all(gather(marker.is_in(folder))):
                return
            beat()
            time.sleep(LOOK_S)
        seen, hosts = gather(marker.is_in(folder)), gather(socket.gethostname())
    finally:
        if rank == 0:
            with suppress(OSError):  # a remaining marker is cleaned up later
                (folder / marker.name).unlink()
    failing = ", ".join(f"{other} on {hosts[other]}" for other, sees in enumerate(seen) if not sees)
    raise UserError(
        f"checkpoints: all workers must see {folder} as worker 0 on {hosts[0]} does; worker"
        f" {failing} does not: set --checkpoints or --runs to storage that the nodes share"
    )


def _put_marker(folder: Path) -> tuple[Marker, int, str]:
    """Write a marker to `folder`. Return the marker, and the error's number (0: none) and text."""
    marker = Marker(f"{MARKER}{secrets.token_hex(8)}", secrets.token_hex(16))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / marker.name).write_text(marker.content)
    except OSError as error:
        return marker, error.errno or errno.EIO, f"{error.strerror or error}"
    return marker, 0, ""
