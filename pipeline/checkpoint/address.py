"""What an address of checkpoints may hold: it is written down in run folders, journals and schedulers' files."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pipeline.checkpoint.place import CheckpointError


def refuse_credentials(address: str) -> None:
    """Refuse what holds a password or may hold one, without looking whether anybody answers.

    Raises:
        CheckpointError: an address with credentials, or of several stores in a chain.
    """
    if "://" not in address:
        return
    if "::" in address:  # each address of a chain may hold credentials
        raise CheckpointError("checkpoints: an address must be of one store, without fsspec's '::'; got a chain of several")
    told = urlsplit(address)
    if "@" in told.netloc or told.query:
        raise CheckpointError("checkpoints: an address holds no credentials, which are the environment's; got one with some")


def folder_of(address: str) -> Path | None:
    """The folder that an address names, as a path or by file://; None: it is another store's."""
    if "://" not in address:
        return Path(address)
    told = urlsplit(address)
    return Path(told.path) if told.scheme in ("file", "local") else None


def absolute(address: str) -> str:
    """The address for every machine alike: a folder's path from the root on.

    Raises:
        CheckpointError: see `refuse_credentials`.
    """
    refuse_credentials(address)
    return address if "://" in address else str(Path(address).absolute())
