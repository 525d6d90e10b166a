"""The manifest of a checkpoint: size and sha256 of each file. A checkpoint without a manifest does
not verify.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.core.files import Unreadable, retry_read, write_whole

MANIFEST = "manifest.json"

# {"bytes": ..., "sha256": ...} of each file, by its path inside the checkpoint
Facts = dict[str, dict[str, Any]]


class DamagedManifest(ValueError):
    """A manifest is damaged, or names a file outside of the checkpoint."""


def facts_of(folder: Path, names: Iterable[str]) -> Facts:
    return {name: _fact_of(folder / name) for name in names}


def seal(folder: Path, facts: Facts) -> None:
    """Write the manifest, which is the last file of a checkpoint to be written."""
    manifest = {"version": 1, "files": facts, "sha256": _digest(facts)}
    write_whole(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def find_damage(path: Path) -> str | None:
    """The reason why a checkpoint is damaged, in words; None if its files match its manifest.

    Raises:
        OSError: a file cannot be read now and may be intact. For example, permission is denied, or
            the file server does not answer.
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
    """The facts in a manifest. Raises: DamagedManifest."""
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
