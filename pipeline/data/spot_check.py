"""Pages compared with their checksums while a run reads them: what was whole at its start may fail later."""

import os
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.data import manifest as manifests
from pipeline.data.damage import DamagedPages
from pipeline.data.errors import DataError
from pipeline.random import PAGE, below, bits


class SpotCheck:
    """Of one run through a file. Drawn are samples, one in `one_in`, by (seed, epoch): each has its page compared.

    So has each one that could not be decoded. `table`: FFCV's, of which sample lies where. `asked`: see Files.
    """

    def __init__(self, path: Path, table: Any, *, one_in: int, seed: int, epoch: int, asked: NDArray[np.int64]) -> None:
        self.path, self.one_in, self.asked, self._keys = path, one_in, asked, (seed, epoch)
        self.manifest = manifests.read(path)
        self._page_of = np.empty(len(table), np.int64)
        self._page_of[table["sample_id"]] = (table["ptr"] - self.manifest.pages_offset) // self.manifest.page_bytes

    def __enter__(self) -> Self:
        self._file = self.path.open("rb", buffering=0)
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def before(self) -> None:
        """A mapped file that became shorter kills who reads beyond its end.

        Raises: DataError for a file that did.
        """
        size = os.fstat(self._file.fileno()).st_size
        if size < self.manifest.bytes:
            raise DataError(manifests.wrong_size(self.path, self.manifest, size))

    def after(self, index_B: NDArray[np.int64], failed_B: NDArray[np.bool_]) -> None:
        """Once the samples were decoded, but for those that failed: what was damaged by then still is.

        Raises: DamagedPages; OSError where all storage is away.
        """
        drawn_B = below(bits(*self._keys, index_B, PAGE), self.one_in) == 0
        pages = np.unique(self._page_of[index_B[drawn_B | failed_B]]).tolist()
        found = {page: manifests.page_fault(self.path, self._file.fileno(), self.manifest, page) for page in pages}
        about = [(page, np.flatnonzero(self._page_of == page), fault) for page, fault in found.items() if fault is not None]
        if about:
            is_asked = np.isin(self._page_of[self.asked], [page for page, *_ in about]).any()
            raise DamagedPages([manifests.page(self.path, self.manifest, *each) for each in about], may_go=not is_asked)
