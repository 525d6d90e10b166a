"""The batches of one rank from one file.

`BetonLoader` decodes a batch when it is asked for it. reader.py has its subclass that reads ahead
by FFCV.
"""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.errors import require_data
from pipeline.core.saved_loops import numba_config
from pipeline.data.base import Batch
from pipeline.data.ffcv.format import read_tables
from pipeline.data.ffcv.loops import Decoder
from pipeline.data.ffcv.numba_threads import require_tbb
from pipeline.data.ffcv.page_checks import SpotCheck
from pipeline.data.order import TrainOrder, ValOrder

# The samples of a batch, and the status of each (loops.py): [B,...] and [B,1].
Decoded = tuple[NDArray[np.generic], NDArray[np.int32]]


def usable_threads(threads: int) -> int:
    """Return `threads` if this process may use that many threads.

    Raises:
        DataError: `threads` is below 1, above numba's number of threads, or above 1 without TBB or
            FFCV.
    """
    # the number of cores of the CPU affinity, unless the environment variable of this name
    # overrides it (0.68.1)
    max_threads = numba_config.NUMBA_NUM_THREADS
    require_data(
        1 <= threads <= max_threads,
        f"data: threads must be in 1..{max_threads} (the cores of this process, or"
        f" NUMBA_NUM_THREADS); got {threads}",
    )
    if threads > 1:
        require_tbb()
    return threads


class BetonLoader:
    """A base.Loader that decodes each batch when it is asked for it.

    Args:
        decode: the decoder. It is parallel if `threads` is above 1.
        seed: selects the augmentation and the compared pages.
        threads: a number that `usable_threads` has accepted.
        one_in: the page of one in this many samples is compared; 0: no page (page_checks.py).

    Raises:
        DataError: the file has no field for the decoder.
    """

    def __init__(
        self,
        path: Path,
        decode: Decoder,
        order: TrainOrder | ValOrder,
        *,
        seed: int,
        threads: int,
        one_in: int = 0,
    ) -> None:
        tables = read_tables(path)
        require_data(
            decode.name == tables.kind.name,
            f"data: {path} must hold a field {decode.name!r}; got {tables.kind.name}, label; images"
            " are read by Beton, arrays by Events",
        )
        self.samples, self.steps_per_epoch = order.samples, order.steps
        self.path, self.decode, self.seed, self.num_workers = path, decode, seed, threads
        self.batch_size, self.records = order.micro_batch, tables.records
        self._order, self._one_in, self._tables = order, one_in, tables

    @contextmanager
    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Iterator[Batch]]:
        ids = self._order.epoch(epoch, start=start)
        # One number per row of a batch selects the sample and the view number (augment.py).
        rows = ids + len(self.records) * self._order.view_numbers(start=start)
        check = (
            SpotCheck(
                self.path, self._tables.addresses, one_in=self._one_in, seed=self.seed, epoch=epoch
            )
            if self._one_in
            else None
        )
        with closing(self._decoded(rows.astype(np.uint64), epoch, check)) as decoded:
            yield self._batches(ids, decoded)

    def close(self) -> None:
        """Nothing is open."""

    def _decoded(
        self, rows: NDArray[np.uint64], epoch: int, check: SpotCheck | None
    ) -> Generator[Decoded]:
        file, by_address = np.memmap(self.path, np.uint8, "r"), np.argsort(self._tables.addresses)
        storage = (file, self._tables.addresses[by_address], self._tables.sizes[by_address])
        for first in range(0, len(rows), self.batch_size):
            rows_B = rows[first : first + self.batch_size]
            x_B = np.empty((len(rows_B), *self.decode.shape), self.decode.dtype)
            keys_B2 = np.tile(np.array((self.seed, epoch), np.uint64), (len(rows_B), 1))
            status_B1 = np.zeros((len(rows_B), 1), np.int32)
            if check is not None:
                check.manifest.require_size(self.path, self.path.stat().st_size)  # see reader.py
            self.decode(rows_B, (x_B, keys_B2, status_B1), self.records, storage)
            if check is not None:
                check.check_batch(rows_B, status_B1[:, 0] != 0)
            yield x_B, status_B1

    def _batches(self, ids: NDArray[np.int64], decoded: Iterator[Decoded]) -> Iterator[Batch]:
        """The batches of the samples `ids`, as copies of the decoded arrays.

        Raises:
            DataError: a sample cannot be decoded, or a page is damaged.
            LoaderError: reading failed or hung, or the loader was closed.
        """
        table = self.decode.table
        for first, (decoded_B, status_B1) in zip(
            range(0, len(ids), self.batch_size), decoded, strict=False
        ):
            index_B = ids[first : first + self.batch_size]
            failed = index_B[status_B1[: len(index_B), 0] != 0].tolist()
            require_data(
                not failed,
                f"data: {self.path}: cannot decode {self.decode.what} of samples {failed[:10]};"
                " check the file with `spiketrain verify`",
            )
            # FFCV overwrites the array once the next batch is taken. The copy is pinned if this
            # process computes on a GPU, so that its transfer overlaps with computation. In a CPU
            # process, pinned memory would open a context on an unused GPU.
            decoded_tensor_B = torch.from_numpy(decoded_B)
            x_B = torch.empty(
                decoded_tensor_B.shape,
                dtype=decoded_tensor_B.dtype,
                pin_memory=torch.cuda.is_initialized(),
            )
            x_B.copy_(decoded_tensor_B)
            target_B = np.ascontiguousarray(self._tables.labels[index_B], np.int64)
            yield Batch(
                x_B,
                torch.from_numpy(target_B),
                torch.from_numpy(index_B.copy()),
                None if table is None else torch.from_numpy(table),
            )
