"""FFCV's loader with our order of samples, error handling, owned batches and threads that end.

FFCV 1.0.2 blocks forever if its thread fails. After an early `break` its thread keeps running. FFCV
returns buffers that it later overwrites, and it sets torch's number of threads. The classes here
are subclasses of FFCV's classes. FFCV still reads the file and schedules the batches.
"""

import time
from collections.abc import Generator
from queue import Empty
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.base import DataError, LoaderError
from pipeline.data.ffcv import api
from pipeline.data.ffcv.api import (
    AllocationQuery,
    Compiler,
    Graph,
    Operation,
    OSCacheContext,
    OSCacheManager,
    PipelineSpec,
    Reader,
    State,
    keep_torch_threads,
)
from pipeline.data.ffcv.loader import BetonLoader, Decoded
from pipeline.data.ffcv.loops import Decoder
from pipeline.data.ffcv.page_checks import SpotCheck

FIRST_BATCH_TIMEOUT_S = 300.0  # includes the compilation: 5 to 20 s on two busy cores
BATCH_TIMEOUT_S = 30.0  # for every later batch
CLOSE_TIMEOUT_S = 5.0  # for the end of a reading thread, which first finishes its batch


class FFCVLoader(BetonLoader):
    """In place of FFCV's loader: one pipeline, for the decoded field, and our order of samples."""

    def __init__(self, path: Any, decode: Decoder, order: Any, **options: Any) -> None:
        super().__init__(path, decode, order, **options)
        self._open: list[_EpochReader] = []
        # FFCV's iterator reads these attributes, and `batch_size` and `num_workers`.
        self.fname, self.batches_ahead = str(path), 3
        self.reader = Reader(self.fname)
        self.memory_manager = _MappedFile(self.reader)
        self.operation = _Decode(decode)
        self.graph = Graph(
            {decode.name: PipelineSpec(decode.name, decoder=self.operation)},
            self.reader.handlers,
            {decode.name: 0},
            self.reader.metadata,
            None,
        )
        # The loop over a batch is compiled once (loops.py). Without this line, FFCV
        # would also compile, for each loader, the function that calls the loop.
        Compiler.set_enabled(False)
        try:
            with keep_torch_threads():
                Compiler.set_num_threads(self.num_workers)
            _, code = self.graph.collect_requirements()
            self.code = self.graph.codegen_all(code)
        finally:
            Compiler.set_enabled(True)

    def close(self) -> None:
        for reader in self._open:
            reader.close()

    def _decoded(
        self, rows: NDArray[np.uint64], epoch: int, check: SpotCheck | None
    ) -> Generator[Decoded]:
        # The reader also sets torch's number of threads, but only for its own thread (torch 2.13).
        reader = _EpochReader(self, rows, epoch=epoch, check=check)
        self._open.append(reader)
        try:
            while True:
                slot, (x_B,) = reader.wait()
                yield x_B, reader.status[slot]
        finally:
            reader.close()
            self._open.remove(reader)


class _Decode(Operation):
    """FFCV's operation of a decoder.

    For each batch that is read ahead, FFCV allocates memory for the output, the pair (seed, epoch)
    and a status per sample. The pair cannot be a variable of a closure, because numba would compile
    it as a constant.
    """

    KEYS, STATUS = 1, 2  # indices into the memory

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self._decoder = decoder

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        shape, dtype = self._decoder.shape, self._decoder.dtype
        return (
            State(jit_mode=True, device=previous_state.device, shape=shape, dtype=dtype),
            (
                AllocationQuery(shape, dtype),
                AllocationQuery((2,), np.dtype(np.uint64)),
                AllocationQuery((1,), np.dtype(np.int32)),
            ),
        )

    def generate_code(self) -> Any:
        def decode(indices_B, memory, records, storage):
            self._decoder(indices_B, memory, records, storage)
            return memory[0]

        return decode


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

    loader: FFCVLoader  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, loader: FFCVLoader, rows: NDArray[np.uint64], *, epoch: int, check: SpotCheck | None
    ) -> None:
        self._keys, self._check, self._is_first = (loader.seed, epoch), check, True
        super().__init__(loader, rows)  # pyright: ignore[reportArgumentType]

    def start(self) -> None:
        # The constructor of the base class calls this method after it has allocated its memory.
        node = self.loader.graph.operation_to_node[self.loader.operation][0].id
        memory = self.memory_allocations["operation"][node]
        memory[_Decode.KEYS][...] = np.array(self._keys, np.uint64)
        self.status = memory[_Decode.STATUS]
        super().start()

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # `wait` raises it in the thread that reads the batches
            self.output_queue.put(error)

    def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Any:
        if self._check is not None:
            # A file that was truncated after it was mapped would kill this process when it is read.
            self._check.manifest.require_size(self._check.path, self.storage_state[0]._mmap.size())
        result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        if self._check is not None:
            is_failed_B = self.status[batch_slot][: len(batch_indices), 0] != 0
            self._check.check_batch(batch_indices, is_failed_B)
        return result

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

    def wait(self) -> tuple[int, Any]:
        """The next slot and its outputs. FFCV overwrites them once another slot is taken.

        Raises:
            DataError: a page is damaged.
            LoaderError: reading failed or hung, or the loader was closed.
        """
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
