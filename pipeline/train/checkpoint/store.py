"""Checkpoints at any address that fsspec knows (s3://bucket/prefix, gs://..., memory://...).

A store has no rename. So a checkpoint is a folder with a manifest: the manifest is the last file
that is put there, and the first that is deleted. The folder's name ends in the attempt's, as in
step_00000120-ATTEMPT: late uploads of an abandoned attempt reach no other checkpoint. A step that
is saved again has a number too, step_00000120.1-ATTEMPT, then .2. Of the folders with a manifest
the highest number counts, and the others are deleted.

Files are put from a sealed folder of the run and compared by size; their sha256 is checked once
they are fetched. Credentials come from the environment (AWS_ACCESS_KEY_ID, ...).
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import functools
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pipeline.core.run_folder import RunFolder
from pipeline.train.checkpoint.address import folder_of, refuse_credentials
from pipeline.train.checkpoint.folder import Folder
from pipeline.train.checkpoint.manifest import MANIFEST, read_manifest
from pipeline.train.checkpoint.place import WRITING, CheckpointError

_FOLDER = re.compile(r"(step_\d+)(?:\.(\d+))?-.+")
"""the folder of a checkpoint: its name, how often its step had been saved before, its attempt"""
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # botocore's


def place_at(address: str, run: Path) -> Folder | Store:
    """The place of a run's checkpoints, by path or address; an empty one is RUN/checkpoints.

    Raises:
        CheckpointError: nothing opens the address, it is a chain of several, or has a password.
    """
    inside = RunFolder(run).checkpoints
    if not address:
        return Folder(inside)
    refuse_credentials(address)
    folder = folder_of(address)
    return Store(address, staging=inside) if folder is None else Folder(folder.absolute())


class Store:
    """The checkpoints of one run at `address`; `staging` is a folder that every rank sees."""

    def __init__(self, address: str, *, staging: Path) -> None:
        import fsspec

        self.url, self.staging = address.rstrip("/"), staging
        try:
            fs, self.root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:  # "Install s3fs to ..."
            raise CheckpointError(
                f"checkpoints: an address must be one that fsspec can open; got {address}: {error}"
            ) from error
        self.fs = _WithOSErrors(fs)

    def names(self) -> list[str]:
        return list(self._whole())

    def address(self, name: str) -> str:
        return f"{self.url}/{self._folder(name)}"

    def finish(self, temp: Path, name: str, check: Callable[[], None] = lambda: None) -> str:
        """See `Place`; `check` is called before the last step."""
        before = self._whole().get(name)
        again = "" if before is None else f".{int(before[2] or 0) + 1}"
        attempt = temp.name.removeprefix(WRITING).removesuffix(f"-{name}")
        folder = f"{name}{again}-{attempt}"
        for file in temp.rglob("*"):
            if file.is_file() and file.name != MANIFEST:
                self._put(file, self._path(folder, file.relative_to(temp).as_posix()))
        check()
        self._put(temp / MANIFEST, self._path(folder, MANIFEST))
        shutil.rmtree(temp, ignore_errors=True)  # the next attempt sweeps what stays
        return f"{self.url}/{folder}"

    def tidy(self, name: str) -> None:
        counts = self._folder(name)
        for found in self._folders():
            if found[1] == name and found[0] != counts:
                self._remove(found[0])

    def fetch(self, name: str) -> Path:
        folder, there = own_folder(self.staging) / name, self._folder(name)
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):  # `damage` finds what is missing
            self._get(there, MANIFEST, folder)
            try:
                files = read_manifest((folder / MANIFEST).read_bytes())
            except ValueError:
                return folder  # `damage` finds that, too
            for file in files:
                self._get(there, file, folder)
        return folder

    def read(self, file: str) -> bytes:
        name, slash, rest = file.partition("/")
        return self.fs.cat_file(self._path(f"{self._folder(name) if slash else name}{slash}{rest}"))

    def write(self, file: str, content: bytes) -> None:
        self.fs.pipe_file(self._path(file), content)

    def delete(self, name: str) -> None:
        for found in self._folders():  # oldest first, or one that was replaced would count again
            if found[1] == name:
                self._remove(found[0])

    def set_aside(self, name: str, aside: str) -> None:
        self.fs.copy(self._path(self._folder(name)) + "/", self._path(aside) + "/", recursive=True)
        self.delete(name)

    def sweep(self) -> None:
        Folder(self.staging).sweep()
        sweep_fetched(self.staging)
        whole = {found[0] for found in self._whole().values()}
        for found in self._folders():
            if found[0] not in whole:
                with contextlib.suppress(OSError):
                    self._remove(found[0])

    def _folders(self) -> list[re.Match[str]]:
        """The folders of checkpoints, whole or not, oldest first, as `_FOLDER` matches them."""
        try:
            paths = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        found = filter(None, (_FOLDER.fullmatch(PurePosixPath(path).name) for path in paths))
        return sorted(found, key=lambda each: (each[1], int(each[2] or 0), each[0]))

    def _whole(self) -> dict[str, re.Match[str]]:
        """The folder that counts of each checkpoint, by its name, oldest first."""
        return {found[1]: found for found in self._folders() if self._has_manifest(found[0])}

    def _folder(self, name: str) -> str:
        found = self._whole().get(name)
        return name if found is None else found[0]

    def _has_manifest(self, folder: str) -> bool:
        """Not by `exists`, which is False after a failed request (fsspec 2026.9; sftp, webhdfs).

        Raises:
            OSError: the store does not answer.
        """
        try:
            self.fs.info(self._path(folder, MANIFEST))
        except FileNotFoundError:
            return False
        return True

    def _remove(self, folder: str) -> None:
        if self._has_manifest(folder):
            self.fs.rm_file(self._path(folder, MANIFEST))
        with contextlib.suppress(FileNotFoundError):  # it held nothing else
            self.fs.rm(self._path(folder), recursive=True)

    def _put(self, file: Path, path: str) -> None:
        self.fs.put_file(str(file), path)
        there, here = self.fs.info(path)["size"], file.stat().st_size
        if there != here:
            raise OSError(errno.EIO, f"{there} of {here} bytes arrived", path)

    def _get(self, there: str, file: str, folder: Path) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self._path(there, file), str(folder / file))

    def _path(self, *names: str) -> str:
        return "/".join((self.root, *names))


class _WithOSErrors:
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
                if "RequestTimeTooSkewed" in repr(error.__cause__):  # a clock comes right
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


_LOCK = ".lock"
_locks: dict[Path, IO[str]] = {}
"""the locked file beside this process's folder, by the staging folder"""


def own_folder(staging: Path) -> Path:
    """An empty folder of this process in `staging`, for what it fetches; it goes with the process.

    The next `sweep_fetched` deletes that of a killed process, whose lock the kernel has released.
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
    """Delete the folders of processes that have ended; what cannot be deleted stays."""
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
