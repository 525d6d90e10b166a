"""Compares a .beton with its manifest: the whole file before a run, and pages of it during a run.

A page is damaged if its bytes differ from its checksum, or if the medium cannot read them (a bad
sector). A run refuses a damaged page in one line with the file, the page and its samples. Storage
that is unreachable as a whole raises OSError instead, and the workers are restarted.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import DataError, require_data
from pipeline.core.files import UNREADABLE, Unreadable, retry_read
from pipeline.core.random import PAGE, below, bits
from pipeline.core.units import some
from pipeline.data.ffcv import format as beton
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.manifest import Manifest

Verify = Literal["sampled", "full"]
# Samples read per sample whose page is compared. A page of 8 MiB holds about 80.
ONE_IN: dict[Verify, int] = {"sampled": 256, "full": 1}
# Number of threads. Reading and hashing release the interpreter's lock, and a disk is faster with
# several requests.
CHECKERS = 4


def check(path: Path) -> Manifest:
    """Read the file once, in a few threads, and compare each region and page with its manifest.

    It takes 0.03 s on two cores for 150 MB in the page cache; otherwise the disk limits it.

    Raises:
        DataError: names the file and its damaged parts.
        OSError: the storage is unreachable.
    """
    manifest = manifests.read(path)
    pool = ThreadPoolExecutor(CHECKERS, "check")
    try:
        with path.open("rb", buffering=0) as file:
            faults = pool.map(
                lambda region: _fault(path, file.fileno(), *region[1:]), manifest.regions
            )
            for (name, offset, length, _), fault in zip(manifest.regions, faults, strict=True):
                if fault:
                    raise _damaged(path, [f"{name} ({_bytes(offset, length)}) {fault}"])
            numbers = range(len(manifest.pages))
            faults = pool.map(
                lambda number: page_fault(path, file.fileno(), manifest, number), numbers
            )
            damaged = {number: fault for number, fault in enumerate(faults) if fault}
    finally:
        pool.shutdown(cancel_futures=True)
    if damaged:
        raise damaged_pages(
            path, manifest, damaged, _page_of(manifest, beton.samples(path).addresses)
        )
    return manifest


def verify(path: Path) -> list[Manifest]:
    """Compare pages and regions, the file's sha256 and the content hash.

    `path`: a .beton, or a folder of them.

    Raises: DataError with the file and the difference.
    """
    path = Path(path)
    files = sorted(path.glob("*.beton")) if path.is_dir() else [path]
    require_data(files, f"verify: no .beton in {path.absolute()}")
    return [_verify_file(file) for file in files]


class SpotCheck:
    """Compares pages during one pass through a file.

    One in `one_in` samples, drawn by (seed, epoch), has its page compared. So has each sample that
    cannot be decoded. `table`: FFCV's allocation table, with the location of each sample.
    """

    def __init__(self, path: Path, table: Any, *, one_in: int, seed: int, epoch: int) -> None:
        self.path, self.one_in, self._keys = path, one_in, (seed, epoch)
        self.manifest = manifests.read(path)
        self._page_of = np.empty(len(table), np.int64)
        self._page_of[table["sample_id"]] = _page_of(self.manifest, table["ptr"])

    def __enter__(self) -> Self:
        self._file = self.path.open("rb", buffering=0)
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def before(self) -> None:
        """Raises: DataError if the file became shorter.

        Reading beyond the end of a mapped file would kill the process.
        """
        size = os.fstat(self._file.fileno()).st_size
        if size < self.manifest.bytes:
            raise DataError(manifests.wrong_size(self.path, self.manifest, size))

    def after(self, index_B: NDArray[np.int64], failed_B: NDArray[np.bool_]) -> None:
        """Compare pages after a batch is decoded, so that damage at that time is detected.

        Raises:
            DataError: a page is damaged.
            OSError: the storage is unreachable.
        """
        drawn_B = below(bits(*self._keys, index_B, PAGE), self.one_in) == 0
        pages = np.unique(self._page_of[index_B[drawn_B | failed_B]]).tolist()
        faults = {
            page: page_fault(self.path, self._file.fileno(), self.manifest, page) for page in pages
        }
        if damaged := {page: fault for page, fault in faults.items() if fault}:
            raise damaged_pages(self.path, self.manifest, damaged, self._page_of)


def page_fault(path: Path, file: int, manifest: Manifest, number: int) -> str:
    """The fault of a page of the file, which is open as `file`; "" if the page is intact.

    Raises: OSError if the storage is unreachable.
    """
    offset = manifest.pages_offset + number * manifest.page_bytes
    return _fault(path, file, offset, manifest.page_bytes, manifest.pages[number])


def damaged_pages(
    path: Path, manifest: Manifest, faults: Mapping[int, str], page_of: NDArray[np.int64]
) -> DataError:
    """The error for a file. `faults`: faults by page. `page_of`: the page of each sample."""

    def named(number: int) -> str:
        samples = some(_ranges(np.flatnonzero(page_of == number).tolist()))
        offset = manifest.pages_offset + number * manifest.page_bytes
        return (
            f"page {number} ({_bytes(offset, manifest.page_bytes)}, samples {samples})"
            f" {faults[number]}"
        )

    return _damaged(path, [named(number) for number in faults])


def _damaged(path: Path, parts: list[str]) -> DataError:
    return DataError(
        f"data: {path}: {some(parts)}: damaged; restore the file or write the data again"
    )


def _fault(path: Path, file: int, offset: int, length: int, expected: str) -> str:
    try:
        digest = _digest(path, file, offset, length)
    except Unreadable as error:
        return f"cannot be read ({error.strerror})"
    return "" if digest == expected else "differs from its manifest"


def _digest(path: Path, file: int, offset: int, length: int) -> str:
    """The xxh3-64 of a part of the file.

    It is read from the open `file`, or from a new descriptor if that fails.

    Raises:
        Unreadable: the medium cannot read this part but can read others.
        OSError: the storage is unreachable; it may return before the workers restart.
    """

    def reopened() -> str:
        with path.open("rb", buffering=0) as again:
            return manifests.xxh3(again.fileno(), offset, length)

    try:
        return manifests.xxh3(file, offset, length)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
    try:
        return retry_read(reopened)
    except Unreadable:
        manifests.probe_file(path, besides=range(offset, offset + length))
        raise


def _verify_file(path: Path) -> Manifest:
    manifest = check(path)
    with path.open("rb", buffering=0) as file:
        if (sha256 := hashlib.file_digest(file, "sha256").hexdigest()) != manifest.sha256:
            raise DataError(f"verify: {path}: sha256 must be {manifest.sha256}; got {sha256}")
    if (content := manifests.content_of(path, manifest.classes)) != manifest.content:
        raise DataError(f"verify: {path}: content hash must be {manifest.content}; got {content}")
    return manifest


def _page_of(manifest: Manifest, addresses: NDArray[Any]) -> NDArray[np.int64]:
    return (addresses.astype(np.int64) - manifest.pages_offset) // manifest.page_bytes


def _bytes(offset: int, length: int) -> str:
    return f"bytes {offset} to {offset + length - 1}"


def _ranges(numbers: Iterable[int]) -> list[str]:
    """Ascending numbers as ranges: "3", "5 to 9"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return [str(first) if first == last else f"{first} to {last}" for first, last in ranges]
