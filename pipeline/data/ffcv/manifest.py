"""The manifest of a .beton: `<name>.beton.manifest.json` beside it.

Both files are written together, and every run compares them at its start. FFCV (1.0.2) decodes
damaged bytes without an error, so the manifest has a checksum for each page and each region of the
file. The content hash depends only on the samples and the class names, not on the layout of the
file or the number of worker processes. It identifies the data of a study.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.core.errors import DataError, require_data
from pipeline.core.files import retry_read, write_whole
from pipeline.data.ffcv import format as beton
from pipeline.data.ffcv.format import Arrays, Images, Kind

FORMAT, VERSION = "spiketrain beton manifest", 1
SUFFIX = ".manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The expected content of a .beton, and how it was written."""

    file: str  # name without the folder
    bytes: int
    sha256: str  # of the file, for `sha256sum`
    content: str  # see `ContentHash`
    samples: int
    classes: list[str]
    histogram: list[int]  # number of samples per class
    regions: list[list[Any]]  # [name, offset, bytes, xxh3-64] of all regions but pages, in order
    pages_offset: int
    page_bytes: int
    pages: list[str]  # xxh3-64 of each page
    # unreadable samples, with the reason
    skipped: list[dict[str, str]] = field(default_factory=list)
    # entries of a source folder that are no samples, with the reason
    left_out: list[dict[str, str]] = field(default_factory=list)
    # Sums over all samples. Of images: the number stored "as it is", as "jpg" or as "raw", and the
    # number "rotated" or "not rotated" (images.py). Of recordings: "events" and "saturated" counts
    # (recordings.py).
    stored: dict[str, int] = field(default_factory=dict)
    # For each grouping, such as "object", the group of each sample.
    groups: dict[str, list[str]] = field(default_factory=dict)
    source: str = ""
    command: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    written_by: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        body["checksum"] = _checksum(body)
        write_whole(path, (json.dumps(body, indent=1) + "\n").encode())

    def require_size(self, path: Path, size: int) -> None:
        """Raises: DataError if `size`, in bytes, is not the size of the file that was written."""
        require_data(
            size == self.bytes,
            f"data: {path} must have {self.bytes} bytes by its manifest; got {size}: truncated, or"
            " another file",
        )


def read(path: Path) -> Manifest:
    """Read the manifest of the .beton at `path`.

    Raises:
        DataError: the file or its manifest is missing, the manifest is damaged or has another
            version, or it belongs to another file.
        OSError: the storage fails.
    """
    manifest_path = path.with_name(path.name + SUFFIX)
    for file in (path, manifest_path):
        require_data(
            file.is_file(),
            f"data: {file.absolute()} does not exist; write it first (`spiketrain write`), or name"
            " another folder",
        )
    try:
        body = json.loads(retry_read(lambda: manifest_path.read_text(encoding="utf-8")))
        require_data(body.pop("checksum") == _checksum(body), "its own checksum differs")
        found = (body.pop("format"), body.pop("version"))
        require_data(found == (FORMAT, VERSION), f"it is a {found[0]} {found[1]}")
        manifest = Manifest(**body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"data: {manifest_path} is damaged or is not a {FORMAT} {VERSION} ({error});"
            " restore it or write the data again"
        ) from error
    require_data(
        manifest.file == path.name,
        f"data: {manifest_path} must belong to {path.name}; got the manifest of {manifest.file}",
    )
    manifest.require_size(path, path.stat().st_size)
    return manifest


class ContentHash:
    """sha256 over the class names and each sample's label, attributes and xxh3-128, in index order.

    The attributes of an image are its storage code, height and width. For arrays, the dtype and the
    shape are hashed once, after the class names.
    """

    def __init__(self, classes: list[str], kind: Kind = Images()) -> None:
        self._hash = hashlib.sha256(json.dumps(classes).encode())
        if isinstance(kind, Arrays):
            self._hash.update(json.dumps(asdict(kind)).encode())

    def add(self, payload: "bytes | memoryview", *, label: int, **attributes: int) -> None:
        numbers = [attributes[name] for name in ("mode", "height", "width") if name in attributes]
        self._hash.update(
            np.array([label, *numbers], "<i8").tobytes() + xxhash.xxh3_128_digest(payload)
        )

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def describe(
    path: Path, *, name: str, content: str, classes: list[str], labels: list[int], **fields: Any
) -> Manifest:
    """Read a file that was just written and return its manifest.

    Args:
        name: the name that the file will have.
        content: the content hash of the file.
        fields: further fields of the manifest.
    """
    tables = beton.read_tables(path)
    return Manifest(
        file=name,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        content=content,
        samples=len(tables.labels),
        classes=classes,
        histogram=np.bincount(labels, minlength=len(classes)).tolist(),
        regions=[[*region, xxh3(path, *region[1:])] for region in tables.regions],
        pages_offset=tables.pages.start,
        page_bytes=tables.page_bytes,
        pages=[xxh3(path, offset, tables.page_bytes) for offset in tables.pages],
        **fields,
    )


def sha256_of(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def xxh3(path: Path, offset: int, length: int) -> str:
    """The xxh3-64 of a part of a file. Bytes beyond the end of the file are ignored."""
    digest, end = xxhash.xxh3_64(), offset + length
    with path.open("rb", buffering=0) as file:
        while offset < end and (
            block := os.pread(file.fileno(), min(end - offset, 1 << 20), offset)
        ):
            digest.update(block)
            offset += len(block)
    return digest.hexdigest()


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
