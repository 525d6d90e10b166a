"""The manifest of a .beton: `<name>.beton.manifest.json` beside it.

It is written with the file and compared at every start. FFCV (1.0.2) decodes damaged bytes without
an error, so the manifest has a checksum for each page and each region of the file. The content hash
depends only on the samples, not on pages, file or number of writers; studies are compared by it.
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
    sha256: str  # of the file
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
    # Other entries of a source folder: the number of each kind, and an example. They are text for
    # people, which no program reads; older files hold records in their place.
    left_out: list[Any] = field(default_factory=list)
    # Counts over the samples. For images: those stored "as it is", as "jpg" and as "raw", and those
    # "not rotated" (images.py).
    stored: dict[str, int] = field(default_factory=dict)
    # The group of each sample by name of the grouping, such as the "object" of a scene.
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
        """Raises: DataError if `size`, the bytes of the file at `path`, is another."""
        require_data(
            size == self.bytes,
            f"data: {path} must have {self.bytes} bytes by its manifest; got {size}: truncated, or"
            " another file",
        )


def read(path: Path) -> Manifest:
    """Read the manifest of the .beton at `path`.

    Raises:
        DataError: file or manifest is missing, or the manifest is damaged, of another version or
            of another file.
        OSError: the storage fails.
    """
    at = path.with_name(path.name + SUFFIX)
    for file in (path, at):
        require_data(
            file.is_file(),
            f"data: {file.absolute()} does not exist; write it first (`spiketrain write`), or name"
            " another folder",
        )
    try:
        body = json.loads(retry_read(lambda: at.read_text(encoding="utf-8")))
        if body.pop("checksum") != _checksum(body):
            raise ValueError("its own checksum differs")
        if (kind := (body.pop("format"), body.pop("version"))) != (FORMAT, VERSION):
            raise ValueError(f"it is a {kind[0]} {kind[1]}")
        manifest = Manifest(**body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"data: {at} is damaged or no {FORMAT} {VERSION} ({error}); restore it or write the"
            " data again"
        ) from error
    require_data(manifest.file == path.name, f"data: {at} belongs to another file, {manifest.file}")
    manifest.require_size(path, path.stat().st_size)
    return manifest


class ContentHash:
    """sha256 over the class names and each sample's label, attributes and xxh3-128, in index order.

    The attributes of an image are its storage code, height and width. The dtype and shape of arrays
    are hashed once, after the class names.
    """

    def __init__(self, classes: list[str], kind: Kind = Images()) -> None:
        self._hash = hashlib.sha256(json.dumps(classes).encode())
        if isinstance(kind, Arrays):
            self._hash.update(json.dumps(asdict(kind)).encode())

    def add(self, payload: "bytes | memoryview", *, label: int, **attributes: int) -> None:
        recorded = [attributes[name] for name in ("mode", "height", "width") if name in attributes]
        self._hash.update(
            np.array([label, *recorded], "<i8").tobytes() + xxhash.xxh3_128_digest(payload)
        )

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def describe(
    path: Path, *, name: str, content: str, classes: list[str], labels: list[int], **more: Any
) -> Manifest:
    """The manifest of a file that was just written. It reads the file. `name`: the final name."""
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
        **more,
    )


def sha256_of(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_of(path: Path, classes: list[str]) -> str:
    """Compute the content hash from the samples of a whole file."""
    tables, view = beton.read_tables(path), np.memmap(path, np.uint8, "r")
    content = ContentHash(classes, tables.kind)
    names = ("mode", "width", "height") if isinstance(tables.kind, Images) else ()
    for record, address, label, size in zip(
        tables.records, tables.addresses, tables.labels, tables.sizes, strict=True
    ):
        attributes = {name: record[name] for name in names}
        content.add(view[address : address + size].data, label=label, **attributes)
    return content.hexdigest()


def xxh3(path: Path, offset: int, length: int) -> str:
    """The xxh3-64 of a part of a file; it differs if the file is shorter."""
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
