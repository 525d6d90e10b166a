"""How glibc's malloc serves a training process: what it freed stays with it, as torch's own
allocator keeps a GPU's memory.

Left alone, it hands the memory of a batch's graph back to the kernel and is given it again, page by
page and cleared, at the next: thousands of page faults a batch, which cost a small network up to an
eighth of its time (docs/LOG.md). And there is one heap for all threads: a thread's own, in which
Ray trains, is given back however it is told.

So what a process holds (RSS) is the most that it has needed since `release_freed_memory`.
"""

from __future__ import annotations

import ctypes
import os
from typing import NamedTuple

_LARGEST = 2**31 - 1
_LARGEST_BEFORE_2_35 = (
    32 * 2**20
)  # refused above it, which would leave blocks of 128 KiB to the kernel


class _Option(NamedTuple):
    number: int
    """in malloc.h"""
    variable: str
    value: int


def _options() -> tuple[_Option, ...]:
    return (
        _Option(-8, "MALLOC_ARENA_MAX", 1),
        _Option(-1, "MALLOC_TRIM_THRESHOLD_", _LARGEST),
        _Option(
            -3, "MALLOC_MMAP_THRESHOLD_", _LARGEST if _glibc() >= (2, 35) else _LARGEST_BEFORE_2_35
        ),
    )


def environment() -> dict[str, str]:
    """What a process that is to be started has to find, where the user has not said otherwise."""
    return {
        option.variable: os.environ.get(option.variable, str(option.value)) for option in _options()
    }


def keep_freed_memory() -> bool:
    """Tell this process's malloc, best before it has threads; whether it listens. Another than
    glibc's is left as it is.
    """
    if not _glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    heard = [
        mallopt(option.number, option.value) == 1 for option in _options()
    ]  # each, whatever became of another
    return all(heard)


def release_freed_memory() -> None:
    """Hand what is free back to the kernel, once: what was held is not part of what is measured
    next.
    """
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _glibc() -> tuple[int, ...]:
    """Its version; nothing where the C library is another."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except ValueError:
        return ()
    return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else ()
