"""Checks an address of checkpoints, which is written into run folders, journals and job files."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pipeline.train.checkpoint.place import CheckpointError


def refuse_credentials(address: str) -> None:
    """Refuse an address that has or may have a password; nothing is opened.

    Raises:
        CheckpointError: an address with credentials, or of several stores in a chain.
    """
    if "://" not in address:
        return
    if "::" in address:  # each address of a chain may hold credentials
        raise CheckpointError(
            "checkpoints: an address must be of one store, without fsspec's '::'; got a chain of"
            " several"
        )
    parts = urlsplit(address)
    if "@" in parts.netloc or parts.query:
        raise CheckpointError(
            "checkpoints: an address holds no credentials, which are the environment's; got one"
            " with some"
        )


def folder_of(address: str) -> Path | None:
    """The folder of an address that is a path or begins with file://; None for any other."""
    if "://" not in address:
        return Path(address)
    parts = urlsplit(address)
    return Path(parts.path) if parts.scheme in ("file", "local") else None


def absolute(address: str) -> str:
    """The address, with a path made absolute.

    Raises:
        CheckpointError: see `refuse_credentials`.
    """
    refuse_credentials(address)
    return address if "://" in address else str(Path(address).absolute())
