"""The parts of FFCV that this package builds on, imported without FFCV's side effects.

The import of FFCV 1.0.2 creates a numba dictionary, which takes numba 3 s to compile. Only Python
code reads the dictionary, so a plain one replaces it.

FFCV sets torch's number of threads when it is imported and when a loader is made.
`keep_torch_threads` restores the number. If torch finds a GPU, FFCV's loader thread creates CUDA
streams. A new thread starts on device 0, so every rank would open a context on that GPU. Our
loaders compute only on the CPU and need no stream, so this module sets FFCV's `IS_CUDA` to False.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numba.typed
import torch

from pipeline.data.ffcv.numba_threads import load_tbb


@contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Restore torch's number of threads after the block."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


with suppress(ImportError, OSError):  # one loader thread does not need TBB
    load_tbb()  # before the import of FFCV, which starts numba's threads
typed: Any = numba.typed
typed_dictionary, typed.Dict = typed.Dict, dict
try:
    with keep_torch_threads():
        from ffcv.libffcv import ctypes_imdecode, ctypes_resize
        from ffcv.loader import epoch_iterator
        from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
        from ffcv.pipeline import Compiler, PipelineSpec
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.graph import Graph
        from ffcv.pipeline.operation import Operation
        from ffcv.pipeline.state import State
        from ffcv.reader import Reader
finally:
    typed.Dict = typed_dictionary
epoch_iterator.IS_CUDA = False

__all__ = [
    "AllocationQuery",
    "Compiler",
    "Graph",
    "OSCacheContext",
    "OSCacheManager",
    "Operation",
    "PipelineSpec",
    "Reader",
    "State",
    "ctypes_imdecode",
    "ctypes_resize",
    "epoch_iterator",
]
