"""Compares a .beton with its manifest: the whole file before a run, and pages of it during a run.

A page is damaged if its bytes differ from its checksum, or if the medium cannot read them (a bad
sector). A run refuses a damaged page in one line with the file, the page and its samples. Storage
that is unreachable as a whole raises OSError instead, and the workers are restarted.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import DataError, require_data
from pipeline.core.files import Unreadable, retry_read
from pipeline.core.random import PAGE, below, bits
from pipeline.core.units import first_few
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import read_tables
from pipeline.data.ffcv.manifest import Manifest

Verify = Literal["sampled", "full"]
# The page of one in so many samples is compared. A page of 8 MiB holds about 80.
ONE_IN: dict[Verify, int] = {"sampled": 256, "full": 1}
# Number of threads. Reading and hashing release the interpreter's lock, and a disk is faster with
# several requests.
CHECKERS = 4
PROBES = 8  # bytes read elsewhere in the file if a part cannot be read


def check(path: Path) -> Manifest:
    """Read the file once, in a few threads, and compare each region and page with its manifest.

    It takes 0.03 s on two cores for 150 MB in the page cache; otherwise the disk limits it.

    Raises:
        DataError: names the file and its damaged parts.
        OSError: the storage is unreachable.
    """
    manifest = manifests.read(path)
    with ThreadPoolExecutor(CHECKERS, "check") as pool:
        faults = pool.map(lambda region: _fault(path, *region[1:]), manifest.regions)
        for (name, offset, length, _), fault in zip(manifest.regions, faults, strict=True):
            if fault:
                raise _damaged(path, [f"{name} ({_bytes(offset, length)}) {fault}"])
        page_of = _page_of(manifest, read_tables(path).addresses)
        _compare_pages(path, manifest, range(len(manifest.pages)), page_of, pool.map)
    return manifest


def verify(path: Path) -> list[Manifest]:
    """Compare pages and regions, the file's sha256 and the content hash.

    `path`: a .beton, or a folder of them.

    Raises: DataError with the file and the difference.
    """
    path, verified = Path(path), []
    files = sorted(path.glob("*.beton")) if path.is_dir() else [path]
    require_data(files, f"verify: no .beton in {path.absolute()}")
    for file in files:
        manifest = check(file)
        expected = f"sha256 {manifest.sha256}, content hash {manifest.content}"
        content = manifests.content_of(file, manifest.classes)
        got = f"sha256 {manifests.sha256_of(file)}, content hash {content}"
        require_data(got == expected, f"verify: {file} must have {expected}; got {got}")
        verified.append(manifest)
    return verified


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

    def check_size(self, size: int) -> None:
        """Raises: DataError if the opened file has another size than the manifest says.

        Reading beyond the end of a mapped file would kill the process.
        """
        self.manifest.require_size(self.path, size)

    def check_batch(self, index_B: NDArray[np.int64], failed_B: NDArray[np.bool_]) -> None:
        """Compare pages of a decoded batch, so that damage at that time is detected.

        Raises:
            DataError: a page is damaged.
            OSError: the storage is unreachable.
        """
        drawn_B = below(bits(*self._keys, index_B, PAGE), self.one_in) == 0
        pages = np.unique(self._page_of[index_B[drawn_B | failed_B]]).tolist()
        _compare_pages(self.path, self.manifest, pages, self._page_of, map)


def _compare_pages(
    path: Path,
    manifest: Manifest,
    pages: Iterable[int],
    page_of: NDArray[np.int64],
    run: Callable[..., Iterable[str]],
) -> None:
    """Compare pages. `run` is `map`, or the `map` of a pool of threads.

    `page_of`: the page of each sample. The samples of a page follow each other, because files are
    written in their order.

    Raises: DataError with each damaged page and its samples.
    """
    parts = []
    size = manifest.page_bytes
    places = [(manifest.pages_offset + page * size, size, manifest.pages[page]) for page in pages]
    faults = run(lambda place: _fault(path, *place), places)
    for page, (offset, _, _), fault in zip(pages, places, faults, strict=True):
        if fault:
            first, last = np.flatnonzero(page_of == page)[[0, -1]].tolist()
            parts.append(f"page {page} ({_bytes(offset, size)}, samples {first} to {last}) {fault}")
    if parts:
        raise _damaged(path, parts)


def _damaged(path: Path, parts: list[str]) -> DataError:
    return DataError(
        f"data: {path}: {first_few(parts)}: damaged; restore the file or write the data again"
    )


def _fault(path: Path, offset: int, length: int, expected: str) -> str:
    try:
        digest = retry_read(lambda: manifests.xxh3(path, offset, length))
    except Unreadable as error:
        # If bytes elsewhere in the file cannot be read either, the storage is unreachable.
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for at in range(0, size, max(1, size // PROBES)):
                if not offset <= at < offset + length:
                    os.pread(file.fileno(), 1, at)
        return f"cannot be read ({error.strerror})"
    return "" if digest == expected else "differs from its manifest"


def _page_of(manifest: Manifest, addresses: NDArray[Any]) -> NDArray[np.int64]:
    return (addresses.astype(np.int64) - manifest.pages_offset) // manifest.page_bytes


def _bytes(offset: int, length: int) -> str:
    return f"bytes {offset} to {offset + length - 1}"
