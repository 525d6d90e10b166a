"""Additions to fsspec for a place at an address: its failures as OSErrors, and a folder for fetched
checkpoints.
"""

import atexit
import contextlib
import errno
import fcntl
import functools
import shutil
import uuid
from pathlib import Path
from typing import IO, Any

_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # botocore's
_LOCK = ".lock"
_locks: dict[Path, IO[str]] = {}  # the locked file beside this process's folder, by staging folder


class WithOSErrors:
    """A file system of fsspec whose failures are OSErrors.

    s3fs (2026.9) raises botocore's own errors for missing credentials and for a server that is
    down.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._fs, name)

        @functools.wraps(method)
        def called(*given: Any, **more: Any) -> Any:
            try:
                return method(*given, **more)
            except PermissionError as error:
                if "RequestTimeTooSkewed" in repr(error.__cause__):  # a clock may be set right
                    raise OSError(errno.EIO, str(error)) from error
                raise
            except (OSError, ValueError):
                raise
            except Exception as error:
                if type(error).__name__ in _NO_CREDENTIALS:
                    raise PermissionError(
                        "checkpoints: the environment must hold credentials (AWS_ACCESS_KEY_ID,"
                        f" ...): {error}"
                    ) from error
                raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error

        return called


def own_folder(staging: Path) -> Path:
    """An empty folder of this process in `staging`, for fetched checkpoints. It is deleted when the
    process ends.

    If a process was killed, the kernel has released its lock, and the next `sweep_fetched` deletes
    its folder.
    """
    if staging not in _locks:
        staging.mkdir(parents=True, exist_ok=True)
        handle = (staging / f".fetched-{uuid.uuid4().hex}{_LOCK}").open("w")
        fcntl.flock(handle, fcntl.LOCK_EX)
        _locks[staging] = handle
        atexit.register(_remove_fetched, Path(handle.name))
    folder = Path(_locks[staging].name).with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def sweep_fetched(staging: Path) -> None:
    """Delete the folders of processes that have ended. A folder that cannot be deleted stays."""
    for lock in staging.glob(f".fetched-*{_LOCK}"):
        # BlockingIOError: its process lives. NFS locks only files that are open for writing.
        with contextlib.suppress(OSError), lock.open("r+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_fetched(lock)


def _remove_fetched(lock: Path) -> None:
    folder = lock.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():  # else the next sweep finds it by its lock
        lock.unlink(missing_ok=True)
