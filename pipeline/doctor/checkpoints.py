"""Whether checkpoints can be kept at an address: a small object is put there, found, read and deleted, on every node.

Credentials are those of each node's environment. No text that comes back holds the value of a variable whose name says secret.
"""

from __future__ import annotations

import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pipeline.doctor.failed import named
from pipeline.marker import Marker
from pipeline.secrecy import without_secrets

PREFIX = ".doctor-"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What each node is to try."""

    address: str
    left: Marker | None = None
    """what the driver has put there, if it could"""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What came of it."""

    name: str
    """of the machine"""
    failed: str = ""
    """what could not be done there, and why"""
    sees: bool = True
    """what the driver has put there"""
    free_bytes: int | None = None
    """None: a store that tells nobody"""


def is_folder(address: str) -> bool:
    return "://" not in address or urlsplit(address).scheme in ("file", "local")


@contextmanager
def left_at(address: str) -> Iterator[Marker | str]:
    """With an object there that the nodes look for; or with what could not be done, and why."""
    marker, doing = _marker(), "be opened"
    try:
        store, root = _opened(address)
        doing = "be written to"
        store.pipe_file(f"{root}/{marker.name}", marker.content.encode())
    except Exception as error:  # each store has errors of its own
        yield _said(doing, error)
        return
    try:
        yield marker
    finally:
        with suppress(Exception):  # what may not be deleted is told by whoever tries it
            store.rm_file(f"{root}/{marker.name}")


def try_address(wanted: Wanted) -> Kept:
    """Put, find, read and delete an object of this machine's own; and look for the driver's."""
    name, mine, doing = socket.gethostname(), _marker(), "be opened"
    try:
        store, root = _opened(wanted.address)
        path = f"{root}/{mine.name}"
        doing = "be written to"
        store.pipe_file(path, mine.content.encode())
        try:
            doing = "be listed"
            names = {PurePosixPath(each).name for each in store.ls(root, detail=False)}
            doing = "be read"
            back = store.cat_file(path)
            doing = "give up what is deleted"
        finally:
            store.rm_file(path)
        if mine.name not in names or back != mine.content.encode():
            return Kept(name=name, failed="does not give back what was put there")
        doing = "be read"
        sees = wanted.left is None or _is_there(store, root, wanted.left)
        free = shutil.disk_usage(root).free if is_folder(wanted.address) else None
    except Exception as error:  # each store has errors of its own
        return Kept(name=name, failed=_said(doing, error))
    return Kept(name=name, sees=sees, free_bytes=free)


def _opened(address: str) -> tuple[Any, str]:
    """A file system of fsspec's, and the place in it. Of a folder a launch makes what is missing; nobody makes a bucket."""
    import fsspec

    store, root = fsspec.url_to_fs(address.rstrip("/"), use_listings_cache=False)
    if is_folder(address):
        store.makedirs(root, exist_ok=True)
    return store, str(root)


def _is_there(store: Any, root: str, marker: Marker) -> bool:
    try:
        return store.cat_file(f"{root}/{marker.name}") == marker.content.encode()
    except FileNotFoundError:
        return False


def _marker() -> Marker:
    return Marker(f"{PREFIX}{secrets.token_hex(8)}", secrets.token_hex(16))


def _said(doing: str, error: Exception) -> str:
    return f"cannot {doing}: {without_secrets(named(error))}"
