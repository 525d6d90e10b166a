"""FFCV's loader with our order of samples, error handling, owned batches and threads that end.

FFCV 1.0.2 blocks forever if its thread fails. After an early `break` its thread keeps running. FFCV
returns buffers that it later overwrites, and it sets torch's number of threads. The classes here
are subclasses of FFCV's classes. FFCV still reads the file and schedules the batches.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.errors import require_data
from pipeline.data.base import Batch, DataError, LoaderError
from pipeline.data.ffcv import api
from pipeline.data.ffcv.api import (
    Compiler,
    Graph,
    OSCacheContext,
    OSCacheManager,
    PipelineSpec,
    Reader,
    keep_torch_threads,
)
from pipeline.data.ffcv.loops import Decoder
from pipeline.data.ffcv.numba_threads import require_tbb
from pipeline.data.ffcv.page_checks import SpotCheck
from pipeline.data.order import TrainOrder, ValOrder

FIRST_BATCH_TIMEOUT_S = 300.0  # includes the compilation: 5 to 20 s on two busy cores
BATCH_TIMEOUT_S = 30.0  # for every later batch
CLOSE_TIMEOUT_S = 5.0  # for the end of a reading thread, which first finishes its batch


def usable_threads(threads: int) -> int:
    """Return `threads` if this process may use that many threads.

    Raises:
        DataError: `threads` is below 1, above numba's number of threads, or above 1 without TBB.
    """
    # the number of cores of the CPU affinity, unless the environment variable of this name
    # overrides it (0.68.1)
    max_threads = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    require_data(
        1 <= threads <= max_threads,
        f"data: threads must be in 1..{max_threads} (the cores of this process, or"
        f" NUMBA_NUM_THREADS); got {threads}",
    )
    if threads > 1:
        require_tbb()
    return threads


class BetonLoader(api.Loader):
    """The batches of one rank from one file (see base.Loader).

    This is FFCV's loader with one pipeline, for the decoded field. `order` replaces FFCV's order.

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
        self.samples, self.steps_per_epoch = order.samples, order.steps
        self.path, self.decode, self.seed = path, decode, seed
        self._order, self._one_in = order, one_in
        self._open: list[_EpochReader] = []
        # The base class reads these attributes, and the reader, memory_manager and graph below.
        self.fname, self.batch_size = str(path), order.micro_batch
        self.batches_ahead, self.num_workers = 3, threads
        self.reader = Reader(self.fname)
        require_data(
            decode.name in self.reader.handlers,
            f"data: {path} must hold a field {decode.name!r}; got"
            f" {', '.join(self.reader.field_names)}; images are read by Beton, arrays by Events",
        )
        self.records, self._labels = self.reader.metadata["f0"], self.reader.metadata["f1"]
        self.memory_manager = _MappedFile(self.reader)
        self.graph = Graph(
            {decode.name: PipelineSpec(decode.name, decoder=decode)},
            self.reader.handlers,
            {decode.name: 0},
            self.reader.metadata,
            None,
        )
        # The loop over a batch is compiled once per process (loops.py). Without this line, FFCV
        # would also compile, for each loader, the function that calls the loop.
        Compiler.set_enabled(False)
        try:
            with keep_torch_threads():
                Compiler.set_num_threads(threads)
            self.generate_code()
        finally:
            Compiler.set_enabled(True)

    @contextmanager
    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Iterator[Batch]]:
        ids = self._order.epoch(epoch, start=start)
        # FFCV passes one number per row to the compiled loop (augment.py), which separates the
        # sample and the view number.
        rows = ids + len(self._labels) * self._order.view_numbers(start=start)
        check = (
            SpotCheck(
                self.path, self.reader.alloc_table, one_in=self._one_in, seed=self.seed, epoch=epoch
            )
            if self._one_in
            else None
        )
        # The reader also sets torch's number of threads, but only for its own thread (torch 2.13).
        reader = _EpochReader(self, rows, epoch=epoch, check=check)
        self._open.append(reader)
        try:
            yield reader.batches(ids, self._labels)
        finally:
            reader.close()
            self._open.remove(reader)

    def close(self) -> None:
        for reader in self._open:
            reader.close()


class _MappedFile(OSCacheManager):
    """The file mapped into memory, so that all ranks of a machine share the page cache.

    The constructor does not build FFCV's dictionaries of samples and pages (1.0.2). They hold a set
    per sample, and only FFCV's own page cache needs them.
    """

    def __init__(self, reader: Reader) -> None:
        order = np.argsort(reader.alloc_table["ptr"])
        self.reader = reader
        self.ptrs = np.ascontiguousarray(reader.alloc_table["ptr"][order])
        self.sizes = np.ascontiguousarray(reader.alloc_table["size"][order])
        self.context = OSCacheContext(self)


class _EpochReader(api.epoch_iterator.EpochIterator):
    """A thread that reads ahead the samples of one epoch."""

    loader: BetonLoader  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, loader: BetonLoader, rows: NDArray[np.int64], *, epoch: int, check: SpotCheck | None
    ) -> None:
        self._keys, self._check, self._is_first = (loader.seed, epoch), check, True
        super().__init__(loader, rows.astype(np.uint64))  # pyright: ignore[reportArgumentType]

    def start(self) -> None:
        # The constructor of the base class calls this method after it has allocated its memory.
        node = self.loader.graph.operation_to_node[self.loader.decode][0].id
        memory = self.memory_allocations["operation"][node]
        memory[Decoder.KEYS][...] = np.array(self._keys, np.uint64)
        self._status = memory[Decoder.STATUS]
        super().start()

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # `_wait` raises it in the thread that reads the batches
            self.output_queue.put(error)

    def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Any:
        if self._check is not None:
            # A file that was truncated after it was mapped would kill this process when it is read.
            self._check.manifest.require_size(self._check.path, self.storage_state[0]._mmap.size())
        result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        if self._check is not None:
            is_failed_B = self._status[batch_slot][: len(batch_indices), 0] != 0
            ids = batch_indices.astype(np.int64) % len(self.metadata)  # without the view number
            self._check.check_batch(ids, is_failed_B)
        return result

    def batches(self, ids: NDArray[np.int64], labels: NDArray[Any]) -> Iterator[Batch]:
        """The batches of the samples `ids`, as copies of FFCV's buffers.

        Raises:
            DataError: a sample cannot be decoded, or a page is damaged.
            LoaderError: reading failed or hung, or the loader was closed.
        """
        table = self.loader.decode.table
        for first in range(0, len(ids), self.loader.batch_size):
            index_B = ids[first : first + self.loader.batch_size]
            slot, (buffer_B,) = self._wait()
            failed = index_B[self._status[slot][: len(index_B), 0] != 0].tolist()
            require_data(
                not failed,
                f"data: {self.loader.fname}: cannot decode {self.loader.decode.what} of samples"
                f" {failed[:10]}; check the file with `spiketrain verify`",
            )
            # FFCV overwrites the slot once the next batch is taken. The copy is pinned if this
            # process computes on a GPU, so that its transfer overlaps with computation. In a CPU
            # process, pinned memory would open a context on an unused GPU.
            slot_B = torch.from_numpy(buffer_B)
            x_B = torch.empty(
                slot_B.shape, dtype=slot_B.dtype, pin_memory=torch.cuda.is_initialized()
            )
            x_B.copy_(slot_B)
            target_B = np.ascontiguousarray(labels[index_B], np.int64)
            yield Batch(
                x_B,
                torch.from_numpy(target_B),
                torch.from_numpy(index_B.copy()),
                None if table is None else torch.from_numpy(table),
            )

    def close(self) -> None:
        """Stop reading ahead and wait for the thread. A daemon thread that hangs is abandoned."""
        if getattr(self, "closed", True):  # the base class sets it before the thread starts
            return
        self.closed = True
        # The event ends a thread whose queue is full. The empty `iter_ixes` ends any other thread.
        self.iter_ixes = iter(())
        self.terminate_event.set()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while self.is_alive() and time.monotonic() < deadline:
            while not self.output_queue.empty():  # the thread may wait for room in the queue
                self.output_queue.get_nowait()
            self.join(0.02)
        self.memory_context.__exit__(None, None, None)

    def _wait(self) -> tuple[int, Any]:
        """The next slot and its outputs. Every error of the thread is raised here."""
        error_prefix = f"data: the loader of {self.loader.fname}"
        if self.closed:
            raise LoaderError(f"{error_prefix} was closed")
        timeout_s = FIRST_BATCH_TIMEOUT_S if self._is_first else BATCH_TIMEOUT_S
        self._is_first = False
        try:
            item: Any = self.output_queue.get(timeout=timeout_s)
        except Empty:
            item = TimeoutError(f"no batch for {timeout_s:g} s")
        if isinstance(item, DataError):
            raise item
        if isinstance(item, BaseException):
            raise LoaderError(f"{error_prefix} failed: {type(item).__name__}: {item}") from item
        return item
