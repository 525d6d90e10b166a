"""Checkpoints under any address that fsspec knows (s3://bucket/prefix, gs://..., memory://...): the manifest goes there last.

An object store has no rename: a folder without a manifest is no checkpoint, and the manifest is the first to go when one is
deleted. Its folder carries its attempt's name, step_00000120-ATTEMPT: what an abandoned one still uploads reaches no other's. A
step that is saved again has a number too, step_00000120.1-ATTEMPT, then .2: of those that have a manifest the one with the
highest counts, and the others are deleted once it is there. Files are written and summed on the run's own
storage, brought to the address, and compared by size there; their sha256 is looked at when they come back. Credentials are the
environment's (AWS_ACCESS_KEY_ID, ...), never part of an address.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.checkpoint import fetched
from pipeline.checkpoint.address import folder_of, refuse_credentials
from pipeline.checkpoint.folder import Folder
from pipeline.checkpoint.place import TRAINER, WRITING, CheckpointError, Place, told_by
from pipeline.checkpoint.sealed import MANIFEST, read_manifest

_FOLDER = re.compile(r"(step_\d+)(?:\.(\d+))?(?:-.+)?")
"""of a checkpoint: its name, how many times its step had been saved before, and its attempt, which old ones do not name"""
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
"""botocore's, which no other store needs"""


def place_at(address: str, run: Path) -> Place:
    """The place of one run's checkpoints: a folder's path or file:// address, one of fsspec's, or "" for RUN/checkpoints.

    Raises:
        CheckpointError: an address that nothing here can open, of several stores in a chain, or that holds a password.
    """
    inside = run / "checkpoints"
    if not address:
        return Folder(inside)
    refuse_credentials(address)
    folder = folder_of(address)
    if folder is not None:
        return Folder(folder.absolute())
    return Store(address, staging=inside)


class Store:
    """`address`: of one run's checkpoints; `staging`: a folder of the run's that every rank sees."""

    def __init__(self, address: str, *, staging: Path) -> None:
        import fsspec

        self.url, self.staging = address.rstrip("/"), staging
        try:
            fs, self.root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:  # "Install s3fs to access S3", "Protocol not known: ..."
            raise CheckpointError(f"checkpoints: an address must be one that fsspec can open; got {address}: {error}") from error
        self.fs = _WithOSErrors(fs)

    def names(self) -> list[str]:
        return list(self._whole())

    def address(self, name: str) -> str:
        return f"{self.url}/{self._whole().get(name, name)}"

    def put(self, temp: Path, name: str, files: Iterable[str]) -> None:
        folder = self._next(temp, name)  # the same on every rank: only `finish`, which needs all parts, makes it another
        for file in files:
            self._put(temp / file, self._path(folder, file))

    def finish(self, temp: Path, name: str) -> str:
        folder = self._next(temp, name)
        self._put(temp / MANIFEST, self._path(folder, MANIFEST))
        shutil.rmtree(temp, ignore_errors=True)  # what stays is swept by the next attempt
        return f"{self.url}/{folder}"

    def tidy(self, name: str) -> None:
        counts = self._whole().get(name)
        for other in self._folders():
            if _name(other) == name and other != counts:
                self._remove(other)

    def fetch(self, name: str) -> Path:
        there = self._whole().get(name, name)
        folder = fetched.own_folder(self.staging) / name
        folder.mkdir()
        if not self._get(there, MANIFEST, folder):
            return folder
        try:
            files = read_manifest((folder / MANIFEST).read_bytes())
        except ValueError:
            return folder  # `damage` says so
        for file in files:
            self._get(there, file, folder)
        return folder

    def trainer(self, name: str) -> dict[str, Any]:
        return told_by(self.fs.cat_file(self._path(self._whole().get(name, name), TRAINER)))

    def delete(self, name: str) -> None:
        for folder in self._folders():  # the one that counts last, or one that it replaced would count again
            if _name(folder) == name:
                self._remove(folder)

    def set_aside(self, name: str, aside: str) -> None:
        folder = self._whole().get(name, name)
        self.fs.copy(self._path(folder) + "/", self._path(aside) + "/", recursive=True)
        self.delete(name)

    def read(self, file: str) -> bytes:
        return self.fs.cat_file(self._path(file))

    def write(self, file: str, content: bytes) -> None:
        self.fs.pipe_file(self._path(file), content)

    def is_pinned(self, name: str) -> bool:
        return self._is_there(f"{name}.pinned")

    def sweep(self) -> None:
        Folder(self.staging).sweep()
        fetched.sweep(self.staging)
        whole = set(self._whole().values())
        for folder in self._folders():
            if folder not in whole:
                with contextlib.suppress(OSError):
                    self._remove(folder)

    def _whole(self) -> dict[str, str]:
        """The folder of each checkpoint, by its name, oldest first."""
        return {_name(folder): folder for folder in self._folders() if self._is_there(folder, MANIFEST)}

    def _is_there(self, *names: str) -> bool:
        """Not `exists`, which says no of a request that failed (fsspec 2026.9, of stores without async code: sftp, webhdfs).

        Raises:
            OSError: the store does not tell.
        """
        try:
            self.fs.info(self._path(*names))
        except FileNotFoundError:
            return False
        return True

    def _next(self, temp: Path, name: str) -> str:
        """The folder for a checkpoint that is not whole yet."""
        before = self._whole().get(name)
        again = "" if before is None else f".{_number(before) + 1}"
        return f"{name}{again}-{temp.name.removeprefix(WRITING).removesuffix(f'-{name}')}"

    def _remove(self, folder: str) -> None:
        if self._is_there(folder, MANIFEST):
            self.fs.rm_file(self._path(folder, MANIFEST))
        with contextlib.suppress(FileNotFoundError):  # it held nothing else, and is gone with it
            self.fs.rm(self._path(folder), recursive=True)

    def _folders(self) -> list[str]:
        """Of checkpoints, whole or not, oldest first."""
        try:
            found = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        names = (PurePosixPath(path).name for path in found)
        return sorted(filter(_FOLDER.fullmatch, names), key=lambda name: (_name(name), _number(name), name))

    def _put(self, file: Path, path: str) -> None:
        self.fs.put_file(str(file), path)
        there, here = self.fs.info(path)["size"], file.stat().st_size
        if there != here:
            raise OSError(errno.EIO, f"{there} of {here} bytes arrived", path)

    def _get(self, there: str, file: str, folder: Path) -> bool:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            self.fs.get_file(self._path(there, file), str(folder / file))
        except FileNotFoundError:
            return False
        return True

    def _path(self, *names: str) -> str:
        return "/".join((self.root, *names))


class _WithOSErrors:
    """A file system of fsspec's that fails with OSErrors alone.

    Of credentials that are not there, and of a server that is down, s3fs (2026.9) raises botocore's own.
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
                if "RequestTimeTooSkewed" in repr(error.__cause__):  # a clock that was set back comes right again
                    raise OSError(errno.EIO, str(error)) from error
                raise
            except (OSError, ValueError):
                raise
            except Exception as error:
                if type(error).__name__ in _NO_CREDENTIALS:
                    said = f"checkpoints: the environment must hold credentials (AWS_ACCESS_KEY_ID, ...): {error}"
                    raise PermissionError(said) from error
                raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error

        return called


def _name(folder: str) -> str:
    return _told(folder)[1]


def _number(folder: str) -> int:
    """How many times its step had been saved before."""
    return int(_told(folder)[2] or 0)


def _told(folder: str) -> re.Match[str]:
    found = _FOLDER.fullmatch(folder)
    assert found is not None, "it is one of _folders"
    return found
