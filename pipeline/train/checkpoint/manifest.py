"""A checkpoint's manifest: size and sha256 of each file. A folder without it is no checkpoint."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.core.files import Unreadable, retry_read, write_whole

MANIFEST = "manifest.json"

Facts = dict[str, dict[str, Any]]
"""of files, by their names inside the checkpoint: {"bytes": ..., "sha256": ...}"""


class DamagedManifest(ValueError):
    """A manifest that does not list a checkpoint's files."""


def facts_of(folder: Path, names: Iterable[str]) -> Facts:
    return {name: _fact_of(folder / name) for name in names}


def seal(folder: Path, facts: Facts) -> None:
    """Write the manifest. It is the last file of a checkpoint."""
    manifest = {"version": 1, "files": facts, "sha256": _digest(facts)}
    write_whole(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def damage(path: Path) -> str | None:
    """The damage of a checkpoint, in words; None if every byte is as it was written.

    Raises:
        OSError: it cannot be read now, and may be intact: permission denied, storage that is away.
    """
    name = MANIFEST
    try:
        for name, fact in read_manifest(retry_read((path / MANIFEST).read_bytes)).items():
            actual = retry_read(partial(_fact_of, path / name))
            if actual["bytes"] != fact["bytes"]:
                return f"{name} has {actual['bytes']} bytes instead of {fact['bytes']}"
            if actual != fact:
                return f"{name} differs from its sha256"
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return f"{name} is missing"
    except Unreadable as error:
        return f"{name} cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def read_manifest(content: bytes) -> Facts:
    """The facts in a manifest.

    Raises:
        DamagedManifest: it is damaged, or names a file outside of the checkpoint.
    """
    try:
        manifest = json.loads(content)
        facts, digest = manifest["files"], manifest["sha256"]
        names = [PurePosixPath(name) for name in facts]
    except (ValueError, KeyError, TypeError):
        raise DamagedManifest(f"{MANIFEST} is damaged") from None
    if digest != _digest(facts) or any(name.is_absolute() or ".." in name.parts for name in names):
        raise DamagedManifest(f"{MANIFEST} is damaged")
    return facts


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _fact_of(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {
            "bytes": file.stat().st_size,
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
        }
