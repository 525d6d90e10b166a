"""FFCV's loader with a given order, error handling, owned batches and threads that end.

FFCV 1.0.2 itself blocks forever if its thread fails, and leaves that thread running after an early
`break`. It returns buffers that it reuses, and sets torch's number of threads. The classes here are
subclasses; FFCV still does the reading, scheduling and compilation.
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
    torch_threads_kept,
)
from pipeline.data.ffcv.loops import Decoder
from pipeline.data.ffcv.numba_threads import require_tbb
from pipeline.data.ffcv.page_checks import SpotCheck
from pipeline.data.order import TrainOrder, ValOrder

# Longest waits, in seconds. The first batch waits for compilation: 5 to 20 s on two busy cores.
FIRST_BATCH_S = 300.0
HANG_S = 30.0  # for every later batch
PATIENCE_S = 5.0  # for a thread to end on request, after at most one more batch


def usable_threads(threads: int) -> int:
    """Return `threads` if this process may use that many threads.

    Raises:
        DataError: `threads` is below 1, above numba's number (CPU affinity, or
            NUMBA_NUM_THREADS), or above 1 without TBB.
    """
    # the CPU affinity, unless the environment overrides it (0.68.1)
    most = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    require_data(
        1 <= threads <= most,
        f"data: threads must be in 1..{most} here (its cores, or NUMBA_NUM_THREADS); got {threads}",
    )
    if threads > 1:
        require_tbb()
    return threads


class BetonLoader(api.Loader):
    """The batches of one rank from one file (see base.Loader).

    FFCV's loader with one pipeline, for the decoded field, whose order is here.

    Args:
        decode: the decoder; its `parallel` and `threads` come from `usable_threads`.
        one_in: one in this many samples has its page compared; 0: none (page_checks.py).

    Raises:
        DataError, LoaderError: in the constructor and while iterating.
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
        self._open: list[_Reading] = []
        # what FFCV reads
        self.fname, self.batch_size = str(path), order.micro_batch
        self.batches_ahead, self.num_workers = 3, threads
        self.reader = Reader(self.fname)
        require_data(
            decode.name in self.reader.handlers,
            f"data: {path} must hold a field {decode.name!r}; got"
            f" {', '.join(self.reader.field_names)}; images are read by Beton, arrays by Events",
        )
        self.records, self._labels = self.reader.metadata["f0"], self.reader.metadata["f1"]
        self.memory_manager = _Pages(self.reader)
        self.graph = Graph(
            {decode.name: PipelineSpec(decode.name, decoder=decode)},
            self.reader.handlers,
            {decode.name: 0},
            self.reader.metadata,
            None,
        )
        # The loop is compiled once per process (loops.py). FFCV would also compile, for each
        # loader, the function that calls it.
        Compiler.set_enabled(False)
        try:
            with torch_threads_kept():
                Compiler.set_num_threads(threads)
            self.generate_code()
        finally:
            Compiler.set_enabled(True)

    @contextmanager
    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Iterator[Batch]]:
        ids = self._order.epoch(epoch, start=start)
        # the number of the view is encoded in the id; the compiled loop separates the two
        views = ids + len(self._labels) * self._order.copies(start=start)
        table, keys = self.reader.alloc_table, {"seed": self.seed, "epoch": epoch}
        check = SpotCheck(self.path, table, one_in=self._one_in, **keys) if self._one_in else None
        # The reading also sets torch's threads, but in its own thread, which does not affect this
        # one (torch 2.13).
        reading = _Reading(self, views, epoch=epoch, check=check)
        self._open.append(reading)
        try:
            yield reading.batches(ids, self._labels)
        finally:
            reading.close()
            self._open.remove(reading)

    def close(self) -> None:
        for reading in self._open:
            reading.close()


class _Pages(OSCacheManager):
    """The file mapped into memory, so that all ranks of a machine share the page cache.

    It omits FFCV's dictionaries of samples and pages (1.0.2). Only FFCV's own page cache needs
    them, and they hold one set per sample.
    """

    def __init__(self, reader: Reader) -> None:
        order = np.argsort(reader.alloc_table["ptr"])
        self.reader = reader
        self.ptrs = np.ascontiguousarray(reader.alloc_table["ptr"][order])
        self.sizes = np.ascontiguousarray(reader.alloc_table["size"][order])
        self.context = OSCacheContext(self)


class _Reading(api.epoch_iterator.EpochIterator):
    """One pass through an order, in a read-ahead thread."""

    loader: BetonLoader  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, loader: BetonLoader, ids: NDArray[np.int64], *, epoch: int, check: SpotCheck | None
    ) -> None:
        self._keys, self._check, self._is_first = (loader.seed, epoch), check, True
        super().__init__(loader, ids.astype(np.uint64))  # pyright: ignore[reportArgumentType]

    def start(self) -> None:
        # Called by the base class after it has allocated its memory.
        node = self.loader.graph.operation_to_node[self.loader.decode][0].id
        memory = self.memory_allocations["operation"][node]
        memory[Decoder.KEYS][...] = np.array(self._keys, np.uint64)
        self._status = memory[Decoder.STATUS]
        super().start()

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # every error must reach the consumer
            self.output_queue.put(error)

    def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Any:
        if self._check is not None:
            # the size that the opened file has now, which may be shorter than its mapping
            self._check.check_size(self.storage_state[0]._mmap.size())
        result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        if self._check is not None:
            failed_B = self._status[batch_slot][: len(batch_indices), 0] != 0
            ids = batch_indices.astype(np.int64) % len(self.metadata)  # removes the view's number
            self._check.check_batch(ids, failed_B)
        return result

    def batches(self, ids: NDArray[np.int64], labels: NDArray[Any]) -> Iterator[Batch]:
        """The batches with the samples `ids`, as copies."""
        for first in range(0, len(ids), self.loader.batch_size):
            index_B = ids[first : first + self.loader.batch_size]
            slot, (view_B,) = self._wait()
            failed = index_B[self._status[slot][: len(index_B), 0] != 0].tolist()
            require_data(
                not failed,
                f"data: {self.loader.fname}: cannot decode {self.loader.decode.what} of samples"
                f" {failed[:10]}; `spiketrain verify` it",
            )
            # The slot is overwritten two batches later. The copy is pinned if this process computes
            # on a GPU, so that the transfer can overlap. In a CPU process, pinned memory would open
            # a context on an unused card.
            x_B = torch.empty(
                view_B.shape, dtype=torch.float32, pin_memory=torch.cuda.is_initialized()
            )
            x_B.copy_(torch.from_numpy(view_B))
            target_B = np.ascontiguousarray(labels[index_B], np.int64)
            yield Batch(x_B, torch.from_numpy(target_B), torch.from_numpy(index_B.copy()))

    def close(self) -> None:
        """Stop reading ahead and wait for the thread. A hanging daemon thread is abandoned."""
        if getattr(self, "closed", True):  # without it, the base class has not started anything
            return
        self.closed = True
        self.iter_ixes = iter(())  # the thread checks the event only while the queue is full
        self.terminate_event.set()
        patience = time.monotonic() + PATIENCE_S
        while self.is_alive() and time.monotonic() < patience:
            while not self.output_queue.empty():  # the thread may wait for room in it
                self.output_queue.get_nowait()
            self.join(0.02)
        self.memory_context.__exit__(None, None, None)

    def _wait(self) -> tuple[int, Any]:
        """The next slot and its outputs. Every error of the thread is raised here."""
        who = f"data: the loader of {self.loader.fname}"
        if self.closed:
            raise LoaderError(f"{who} was closed")
        patience = FIRST_BATCH_S if self._is_first else HANG_S
        self._is_first = False
        try:
            item: Any = self.output_queue.get(timeout=patience)
        except Empty:
            item = TimeoutError(f"no batch for {patience:g} s")
        if isinstance(item, DataError):
            raise item
        if isinstance(item, BaseException):
            raise LoaderError(f"{who} failed: {type(item).__name__}: {item}") from item
        return item
