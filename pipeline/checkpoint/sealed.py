"""A checkpoint's manifest: the size and the sha256 of every file, and of the list of them. Without it there is no checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.disk import Unreadable, sync_file, sync_folder, tried

MANIFEST = "manifest.json"

Facts = dict[str, dict[str, Any]]
"""of files, by their names inside the checkpoint: {"bytes": ..., "sha256": ...}"""


def facts_of(folder: Path, names: Iterable[str]) -> Facts:
    """Of files that are written through to disk here."""
    facts = {}
    for name in names:
        file = folder / name
        sync_file(file)
        facts[name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return facts


def seal(folder: Path, facts: Facts) -> None:
    """Write the manifest, the last of the files."""
    write_json(folder / MANIFEST, {"version": 1, "files": facts, "sha256": _digest(facts)})
    sync_file(folder / MANIFEST)
    sync_folder(folder)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every byte is as it was written.

    Raises:
        OSError: it cannot be looked at, and may be whole: permission denied, storage that is away.
    """
    try:
        expected = read_manifest(tried((path / MANIFEST).read_bytes))
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the write was cut short"
    except Unreadable as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error)
    for name, fact in expected.items():
        try:
            said = tried(lambda file=path / name, fact=fact: _damage_of(file, fact))
        except Unreadable as error:
            said = f"cannot be read: {error.strerror}"
        if said:
            return f"{name} {said}"
    return None


def _damage_of(file: Path, fact: Mapping[str, Any]) -> str:
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != fact["bytes"]:
        return f"has {file.stat().st_size} bytes instead of {fact['bytes']}"
    return "" if _sha256(file) == fact["sha256"] else "differs from its sha256"


def read_manifest(content: bytes) -> Facts:
    """The facts that a manifest tells.

    Raises:
        ValueError: it is damaged, or names a file outside of the checkpoint.
    """
    try:
        manifest = json.loads(content)
        facts, told = manifest["files"], manifest["sha256"]
        names = [PurePosixPath(name) for name in facts]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    if told != _digest(facts) or any(name.is_absolute() or ".." in name.parts for name in names):
        raise ValueError(f"{MANIFEST} is damaged")
    return facts


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")
