"""What a .beton must look like: `<name>.beton.manifest.json` beside it, written with it, compared
at every start.

FFCV (1.0.2) decodes damaged bytes without a word, so each page and each region of the file has a
checksum here. The content hash names the samples themselves, whatever page, file or number of
writers brought them: it is what two studies compare.

What a file's medium has lost, told from storage that is away as a whole: a bad sector, or a
server that fails over.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from pipeline.core.errors import DataError
from pipeline.core.files import UNREADABLE, Unreadable, tried
from pipeline.data.ffcv import format as beton
from pipeline.data.ffcv.format import Arrays, Images, Kind

FORMAT, VERSION = "spiketrain beton manifest", 1
SUFFIX = ".manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    file: str  # name without folder
    bytes: int
    sha256: str  # of the file
    content: str  # see `ContentHash`
    samples: int
    classes: list[str]
    histogram: list[int]  # samples of each class
    regions: list[list[Any]]  # [name, offset, bytes, xxh3-64] of all but the pages, in order
    pages_offset: int
    page_bytes: int
    pages: list[str]  # xxh3-64 of each
    skipped: list[dict[str, str]] = field(
        default_factory=list
    )  # images that could not be read, and why
    left_out: list[dict[str, Any]] = field(
        default_factory=list
    )  # what a folder holds beside: sources.LeftOut
    # Images: how many "as it is", as "jpg", as "raw", and of these "not rotated", see encode.py;
    # else what was counted.
    stored: dict[str, int] = field(default_factory=dict)
    # By name of the grouping, one text a sample: samples with equal ones belong together, scenes of
    # one "object" for example.
    groups: dict[str, list[str]] = field(default_factory=dict)
    source: str = ""
    command: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    written_by: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """To `path`, under a temporary name first."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        temporary = path.with_name(f".{path.name}.part")
        try:
            temporary.write_text(
                json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n", encoding="utf-8"
            )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read(path: Path) -> Manifest:
    """The manifest of the .beton at `path`.

    Raises: DataError if either is missing, or the manifest is damaged, of another version or of
    another file; OSError where their storage is away.
    """
    if not path.is_file():
        raise DataError(
            f"data: {path.absolute()} does not exist; write it first (`spiketrain write`), or name"
            " another folder"
        )
    at = path.with_name(path.name + SUFFIX)
    if not at.is_file():
        raise DataError(
            f"data: {path} has no manifest {at.name}; write the data again, an unchecked file is"
            " not trained on"
        )
    try:
        body = json.loads(tried(lambda: at.read_text(encoding="utf-8")))
        if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
            raise DataError(f"data: {at} is not a manifest of a .beton")
        if (version := body.pop("version", None)) != VERSION:
            raise DataError(f"data: {at} is of version {version!r}; this program reads {VERSION}")
        checksum = body.pop("checksum", None)
        known = {
            each.name: each.default is MISSING and each.default_factory is MISSING
            for each in fields(Manifest)
        }
        needed = {name for name, is_needed in known.items() if is_needed}
        if checksum != _checksum(
            {"format": FORMAT, "version": VERSION, **body}
        ) or not needed <= set(body) <= set(known):
            raise DataError(
                f"data: {at} is damaged: its own checksum differs; restore it or write the data"
                " again"
            )
        manifest = Manifest(**body)
    except Unreadable as error:
        probe_file(path)
        raise DataError(
            f"data: {at} cannot be read: {error.strerror}; restore it or write the data again"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"data: {at} is damaged: not JSON ({error})") from error
    if manifest.file != path.name:
        raise DataError(f"data: {at} belongs to another file, {manifest.file}")
    if (size := path.stat().st_size) != manifest.bytes:
        raise DataError(wrong_size(path, manifest, size))
    return manifest


def wrong_size(path: Path, manifest: Manifest, size: int) -> str:
    return (
        f"data: {path} must have {manifest.bytes} bytes by its manifest; got {size}: truncated, or"
        " another file"
    )


class ContentHash:
    """sha256 over the class names and, in index order, each sample's label, what is recorded of it,
    and xxh3-128.

    Recorded are an image's storage code, height and width; an array has the type and shape of all,
    named after the classes."""

    def __init__(self, classes: list[str], kind: Kind = Images()) -> None:
        self._hash = hashlib.sha256(json.dumps(classes).encode())
        if isinstance(kind, Arrays):
            self._hash.update(json.dumps(asdict(kind)).encode())

    def add(self, payload: "bytes | memoryview", *, label: int, **about: int) -> None:
        recorded = [about[name] for name in ("mode", "height", "width") if name in about]
        self._hash.update(
            np.array([label, *recorded], "<i8").tobytes() + xxhash.xxh3_128_digest(payload)
        )

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def describe(
    path: Path, *, name: str, content: str, classes: list[str], labels: list[int], **more: Any
) -> Manifest:
    """The manifest of a file just written, which is read back for it. `name`: what the file will be
    called.
    """
    layout = beton.layout(path)
    with path.open("rb", buffering=0) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        regions = [
            [r.name, r.offset, r.size, xxh3(file.fileno(), r.offset, r.size)]
            for r in (*layout.front, layout.table)
        ]
        pages = [xxh3(file.fileno(), page.offset, page.size) for page in layout.pages]
    return Manifest(
        file=name,
        bytes=path.stat().st_size,
        sha256=sha256,
        content=content,
        samples=layout.samples,
        classes=classes,
        histogram=np.bincount(labels, minlength=len(classes)).tolist(),
        regions=regions,
        pages_offset=layout.table.offset - len(pages) * layout.page_bytes,
        page_bytes=layout.page_bytes,
        pages=pages,
        **more,
    )


def content_of(path: Path, classes: list[str]) -> str:
    """The content hash computed from a file's samples.

    Raises: DataError if the file's tables contradict each other.
    """
    found = beton.samples(path)
    content, view = ContentHash(classes, found.kind), np.memmap(path, np.uint8, "r")
    places = zip(
        found.records,
        found.addresses.tolist(),
        found.labels.tolist(),
        found.sizes.tolist(),
        strict=True,
    )
    for record, address, label, size in places:
        content.add(view[address : address + size].data, label=label, **found.kind.about(record))
    return content.hexdigest()


def xxh3(file: int, offset: int, length: int) -> str:
    digest, end = xxhash.xxh3_64(), offset + length
    while offset < end and (block := os.pread(file, min(end - offset, 1 << 20), offset)):
        digest.update(block)  # a file shorter than promised ends the loop: its digest differs
        offset += len(block)
    return digest.hexdigest()


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


PLACES = 8
"""of a file, evenly over it, that can be read where only a sector of it cannot"""

T_ = TypeVar("T_")


def read_part(path: Path, file: int, part: range, read: Callable[[int], T_]) -> T_:
    """What `read` gives of the bytes `part` of the file, from its open descriptor; where that
    fails, from a fresh one.

    Raises:
        Unreadable: the medium has lost them, and the others are there.
        OSError: the storage is away, and may be back for workers that are started again.
    """

    def afresh() -> T_:
        with path.open("rb", buffering=0) as again:
            return read(again.fileno())

    try:
        return read(file)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
    try:
        return tried(afresh)
    except Unreadable:
        probe_file(path, besides=part)
        raise


def probe_file(path: Path, *, besides: range = range(0)) -> None:
    """Read a byte here and there, outside of the bytes `besides`.

    Raises:
        OSError: one of them cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for at in range(0, size, max(1, size // PLACES)):
            if at not in besides:
                os.pread(file.fileno(), 1, at)
