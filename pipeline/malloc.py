"""How glibc's malloc serves a training process: what it freed stays with it, as torch's own allocator keeps a GPU's memory.

Left alone, it hands the memory of a batch's graph back to the kernel and is given it again, page by page and cleared, at the
next: 1,900 (SLTT) to 3,100 (BPTT) page faults a batch cost a sixth of its time on a small network (docs/LOG.md). And there is
one heap for all threads: a thread's own, in which Ray trains, is given back however it is told.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

LARGEST = 2**31 - 1


class _Option(NamedTuple):
    number: int
    """in malloc.h"""
    variable: str
    value: int


_OPTIONS = (
    _Option(-8, "MALLOC_ARENA_MAX", 1),
    _Option(-3, "MALLOC_MMAP_THRESHOLD_", LARGEST),
    _Option(-1, "MALLOC_TRIM_THRESHOLD_", LARGEST),
)
ENVIRONMENT = {option.variable: str(option.value) for option in _OPTIONS}
"""what a process to be started has to find"""


def keep_freed_memory() -> bool:
    """Tell this process's malloc, best before it has threads; whether it listens: glibc's does, musl's has no such switch."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option.number, option.value) == 1 for option in _OPTIONS)
