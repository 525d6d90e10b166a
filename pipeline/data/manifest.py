"""What a .beton must look like: `<name>.beton.manifest.json` beside it, written with it, compared at every start.

FFCV (1.0.2) decodes damaged bytes without a word, so each page and each region of the file has a checksum here. The content hash
names the samples themselves, whatever page, file or number of writers brought them: it is what two studies compare.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.data import format as beton
from pipeline.data.damage import DamagedPages, Fault, Page, runs_of
from pipeline.data.errors import DataError
from pipeline.data.format import Arrays, Images, Kind
from pipeline.data.medium import look_at, read_part
from pipeline.disk import Unreadable, tried

FORMAT, VERSION = "spiketrain beton manifest", 1
SUFFIX = ".manifest.json"
CHECKERS = 4  # threads: reading and hashing both release the interpreter's lock, and a disk likes several requests


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
    skipped: list[dict[str, str]] = field(default_factory=list)  # images that could not be read, and why
    left_out: list[dict[str, Any]] = field(default_factory=list)  # what a folder holds beside: sources.LeftOut
    # Images: how many "as it is", as "jpg", as "raw", and of these "not rotated", see encode.py; else what was counted.
    stored: dict[str, int] = field(default_factory=dict)
    # By name of the grouping, one text a sample: samples with equal ones belong together, scenes of one "object" for example.
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
            temporary.write_text(json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read(path: Path) -> Manifest:
    """The manifest of the .beton at `path`.

    Raises: DataError if either is missing, or the manifest is damaged, of another version or of another file; OSError where their
    storage is away.
    """
    if not path.is_file():
        raise DataError(f"data: {path.absolute()} does not exist; write it first (`spiketrain write`), or name another folder")
    at = path.with_name(path.name + SUFFIX)
    if not at.is_file():
        raise DataError(f"data: {path} has no manifest {at.name}; write the data again, an unchecked file is not trained on")
    try:
        body = json.loads(tried(lambda: at.read_text(encoding="utf-8")))
        if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
            raise DataError(f"data: {at} is not a manifest of a .beton")
        if (version := body.pop("version", None)) != VERSION:
            raise DataError(f"data: {at} is of version {version!r}; this program reads {VERSION}")
        checksum = body.pop("checksum", None)
        known = {each.name: each.default is MISSING and each.default_factory is MISSING for each in fields(Manifest)}
        needed = {name for name, is_needed in known.items() if is_needed}
        if checksum != _checksum({"format": FORMAT, "version": VERSION, **body}) or not needed <= set(body) <= set(known):
            raise DataError(f"data: {at} is damaged: its own checksum differs; restore it or write the data again")
        manifest = Manifest(**body)
    except Unreadable as error:
        look_at(path)
        raise DataError(f"data: {at} cannot be read: {error.strerror}; restore it or write the data again") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"data: {at} is damaged: not JSON ({error})") from error
    if manifest.file != path.name:
        raise DataError(f"data: {at} belongs to another file, {manifest.file}")
    if (size := path.stat().st_size) != manifest.bytes:
        raise DataError(wrong_size(path, manifest, size))
    return manifest


def wrong_size(path: Path, manifest: Manifest, size: int) -> str:
    return f"data: {path} must have {manifest.bytes} bytes by its manifest; got {size}: truncated, or another file"


def damaged_pages(path: Path) -> list[Page]:
    """Read the file once, in a few threads, and compare each region and page with its manifest: the pages that differ.

    A page that cannot be read, on a bad sector, is one of them.

    On two cores 0.03 s for 150 MB in the page cache; otherwise as fast as the disk.

    Raises: DataError for a region that is not whole: without it nobody knows what lies where; OSError where all storage is away.
    """
    manifest = read(path)
    pool = ThreadPoolExecutor(CHECKERS, "check")
    try:
        with path.open("rb", buffering=0) as file:
            faults = pool.map(lambda region: _fault(path, file.fileno(), *region[1:]), manifest.regions)
            for (name, offset, length, _), fault in zip(manifest.regions, faults, strict=True):
                if fault is not None:
                    raise DataError(f"data: {path}: {name} (bytes {offset} to {offset + length - 1}) {fault.told()}: damaged")
            faults = pool.map(lambda number: page_fault(path, file.fileno(), manifest, number), range(len(manifest.pages)))
            damaged = {number: fault for number, fault in enumerate(faults) if fault is not None}
    finally:
        pool.shutdown(cancel_futures=True)
    if not damaged:
        return []
    of_samples = (beton.samples(path).addresses - manifest.pages_offset) // manifest.page_bytes
    return [page(path, manifest, number, np.flatnonzero(of_samples == number), fault) for number, fault in damaged.items()]


def page_fault(path: Path, file: int, manifest: Manifest, number: int) -> Fault | None:
    """What is wrong with a page of the file, which is open as `file`; None where it is as it was written.

    Raises: OSError where all storage is away.
    """
    offset = manifest.pages_offset + number * manifest.page_bytes
    return _fault(path, file, offset, manifest.page_bytes, manifest.pages[number])


def page(path: Path, manifest: Manifest, number: int, samples: NDArray[np.int64], fault: Fault) -> Page:
    """`samples`: that lie in it, ascending."""
    offset = manifest.pages_offset + number * manifest.page_bytes
    about = {"offset": offset, "size": manifest.page_bytes, "samples": runs_of(samples.tolist())}
    return Page(file=str(path), number=number, unreadable=fault.unreadable, **about)


def check(path: Path) -> Manifest:
    """Read the file once and compare all of it with its manifest.

    Raises: DataError naming the file and what differs; DamagedPages where it is pages alone.
    """
    if pages := damaged_pages(path):
        raise DamagedPages(pages)
    return read(path)


def verify(path: Path) -> list[Manifest]:
    """Everything: pages and regions, the file's sha256, the content hash. `path`: a .beton, or a folder of them.

    Raises: DataError naming the file and what is wrong with it.
    """
    path = Path(path)
    files = sorted(path.glob("*.beton")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"verify: no .beton in {path.absolute()}")
    return [_verify_file(file) for file in files]


class ContentHash:
    """sha256 over the class names and, in index order, each sample's label, what is recorded of it, and xxh3-128.

    Recorded are an image's storage code, height and width; an array has the type and shape of all, named after the classes.
    """

    def __init__(self, classes: list[str], kind: Kind = Images()) -> None:
        self._hash = hashlib.sha256(json.dumps(classes).encode())
        if isinstance(kind, Arrays):
            self._hash.update(json.dumps(asdict(kind)).encode())

    def add(self, payload: "bytes | memoryview", *, label: int, **about: int) -> None:
        recorded = [about[name] for name in ("mode", "height", "width") if name in about]
        self._hash.update(np.array([label, *recorded], "<i8").tobytes() + xxhash.xxh3_128_digest(payload))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def describe(path: Path, *, name: str, content: str, classes: list[str], labels: list[int], **more: Any) -> Manifest:
    """The manifest of a file just written, which is read back for it. `name`: what the file will be called."""
    layout = beton.layout(path)
    with path.open("rb", buffering=0) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        regions = [[r.name, r.offset, r.size, _xxh3(file.fileno(), r.offset, r.size)] for r in (*layout.front, layout.table)]
        pages = [_xxh3(file.fileno(), page.offset, page.size) for page in layout.pages]
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
    places = zip(found.records, found.addresses.tolist(), found.labels.tolist(), found.sizes.tolist(), strict=True)
    for record, address, label, size in places:
        content.add(view[address : address + size].data, label=label, **found.kind.about(record))
    return content.hexdigest()


def _verify_file(path: Path) -> Manifest:
    manifest = check(path)
    with path.open("rb", buffering=0) as file:
        if (sha256 := hashlib.file_digest(file, "sha256").hexdigest()) != manifest.sha256:
            raise DataError(f"verify: {path}: sha256 must be {manifest.sha256}; got {sha256}")
    if (content := content_of(path, manifest.classes)) != manifest.content:
        raise DataError(f"verify: {path}: content hash must be {manifest.content}; got {content}")
    return manifest


def _fault(path: Path, file: int, offset: int, length: int, expected: str) -> Fault | None:
    try:
        digest = read_part(path, file, range(offset, offset + length), lambda opened: _xxh3(opened, offset, length))
    except Unreadable as error:
        return Fault(unreadable=str(error.strerror))
    return None if digest == expected else Fault()


def _xxh3(file: int, offset: int, length: int) -> str:
    digest, end = xxhash.xxh3_64(), offset + length
    while offset < end and (block := os.pread(file, min(end - offset, 1 << 20), offset)):
        digest.update(block)  # a file shorter than promised ends the loop: its digest differs
        offset += len(block)
    return digest.hexdigest()


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
