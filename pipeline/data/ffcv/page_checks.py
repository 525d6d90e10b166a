"""Compares a .beton with its manifest: the whole file before a run, some or all pages during it.

A page is damaged if its checksum differs from the manifest, or if the disk cannot read its bytes (a
bad sector). A run stops at a damaged page with one line that names the file, the page and its
samples. If other parts of the file cannot be read either, the storage is unreachable: OSError is
raised, and the workers restart.
"""

import os
from collections.abc import Callable, Iterable, Sequence
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
# One in this many samples has its page compared.
ONE_IN: dict[Verify, int] = {"sampled": 256, "full": 1}
# Reading and hashing release the interpreter's lock, and a disk is faster with several requests.
CHECK_THREADS = 4
# If a part cannot be read, about this many single bytes elsewhere in the file are read.
PROBES = 8


def check_file(path: Path) -> Manifest:
    """Read the file once, in a few threads, and compare each region and page with its manifest.

    `benchmarks/pages.py` measures the time.

    Raises:
        DataError: the file or its manifest is missing or damaged. The message names the damaged
            parts.
        OSError: the storage is unreachable.
    """
    manifest = manifests.read(path)
    with ThreadPoolExecutor(CHECK_THREADS, "check") as pool:
        faults = pool.map(lambda region: _fault(path, *region[1:]), manifest.regions)
        for (name, offset, length, _), fault in zip(manifest.regions, faults, strict=True):
            if fault:
                raise _damaged(path, [f"{name} (bytes {offset} to {offset + length - 1}) {fault}"])
        sample_pages = _page_numbers(manifest, read_tables(path).addresses)
        _compare_pages(path, manifest, range(len(manifest.pages)), sample_pages, pool.map)
    return manifest


def verify(path: Path) -> list[Manifest]:
    """Compare files with their manifests: all regions and pages, so every byte.

    `path`: a .beton, or a folder of them.

    Raises:
        DataError: there is no .beton, or a file differs from its manifest. The message names the
            file and the difference.
        OSError: the storage is unreachable.
    """
    files = sorted(path.glob("*.beton")) if path.is_dir() else [path]
    require_data(files, f"verify: no .beton in {path.absolute()}")
    return [check_file(file) for file in files]


class SpotCheck:
    """Compares pages while the samples of one epoch are read from a file.

    It compares the pages of about one in `one_in` samples. (seed, epoch) determines these samples.
    It also compares the page of each sample that cannot be decoded. `addresses`: of each sample.
    """

    def __init__(
        self, path: Path, addresses: NDArray[Any], *, one_in: int, seed: int, epoch: int
    ) -> None:
        self.path, self.one_in, self._keys = path, one_in, (seed, epoch)
        self.manifest = manifests.read(path)
        self._sample_pages = _page_numbers(self.manifest, addresses)

    def check_batch(self, rows_B: NDArray[np.uint64], is_failed_B: NDArray[np.bool_]) -> None:
        """Compare pages of a batch that was just decoded.

        Args:
            rows_B: the number of each sample, plus a multiple of the number of samples.
            is_failed_B: whether a sample could not be decoded.

        Raises:
            DataError: a page is damaged.
            OSError: the storage is unreachable.
        """
        index_B = rows_B.astype(np.int64) % len(self._sample_pages)
        is_drawn_B = below(bits(*self._keys, index_B, PAGE), self.one_in) == 0
        pages = np.unique(self._sample_pages[index_B[is_drawn_B | is_failed_B]]).tolist()
        _compare_pages(self.path, self.manifest, pages, self._sample_pages, map)


def _compare_pages(
    path: Path,
    manifest: Manifest,
    pages: Sequence[int],
    sample_pages: NDArray[np.int64],
    map_pages: Callable[..., Iterable[str]],
) -> None:
    """Compare pages of a file with its manifest.

    Args:
        pages: the numbers of the pages to compare.
        sample_pages: the page number of each sample. The samples of a page have consecutive
            numbers, because a file is written in the order of its samples.
        map_pages: `map`, or the method `map` of a thread pool.

    Raises:
        DataError: a page is damaged. The message names the damaged pages and their samples.
        OSError: the storage is unreachable.
    """
    damaged = []
    size, offset = manifest.page_bytes, manifest.pages_offset
    faults = map_pages(
        lambda page: _fault(path, offset + page * size, size, manifest.pages[page]), pages
    )
    for page, fault in zip(pages, faults, strict=True):
        if fault:
            first, last = np.flatnonzero(sample_pages == page)[[0, -1]].tolist()
            begin = offset + page * size
            damaged.append(
                f"page {page} (bytes {begin} to {begin + size - 1}, samples {first} to {last})"
                f" {fault}"
            )
    if damaged:
        raise _damaged(path, damaged)


def _damaged(path: Path, parts: list[str]) -> DataError:
    return DataError(
        f"data: {path} is damaged: {first_few(parts)}; restore the file or write the data again"
    )


def _fault(path: Path, offset: int, length: int, expected: str) -> str:
    """What is wrong with a part of a file, or "". `expected`: its checksum.

    Raises: OSError if the storage is unreachable.
    """
    try:
        digest = retry_read(lambda: manifests.xxh3(path, offset, length))
    except Unreadable as error:
        # If a byte elsewhere in the file cannot be read either, the storage is unreachable, and
        # `pread` raises OSError.
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for probe in range(0, size, max(1, size // PROBES)):
                if not offset <= probe < offset + length:
                    os.pread(file.fileno(), 1, probe)
        return f"cannot be read ({error.strerror})"
    return "" if digest == expected else "differs from its manifest"


def _page_numbers(manifest: Manifest, addresses: NDArray[Any]) -> NDArray[np.int64]:
    return (addresses.astype(np.int64) - manifest.pages_offset) // manifest.page_bytes
