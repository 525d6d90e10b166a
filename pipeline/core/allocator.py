"""Settings of glibc's malloc for a training process: the process keeps freed memory, as torch's
caching allocator keeps a GPU's memory.

By default malloc returns the memory of a batch's graph to the kernel and asks for it again at the
next batch. That is thousands of page faults a batch, which cost a small network up to an eighth of
its time (docs/LOG.md).

All threads share the main heap, because malloc trims the heap of a single thread whatever the
thresholds are, and Ray trains in a thread.

The resident set size (RSS) of a process is therefore the most memory that it has needed since
`release_freed_memory`.
"""

from __future__ import annotations

import ctypes
import os

_LARGEST = 2**31 - 1
# glibc before 2.35 refuses more than 32 MiB, and then returns every block of 128 KiB to the kernel.
_LARGEST_BEFORE_2_35 = 32 * 2**20


def _options() -> dict[str, tuple[int, int]]:
    """Environment variables of the options, with their numbers in malloc.h and values."""
    largest_mapped = _LARGEST if _glibc() >= (2, 35) else _LARGEST_BEFORE_2_35
    return {
        "MALLOC_ARENA_MAX": (-8, 1),
        "MALLOC_TRIM_THRESHOLD_": (-1, _LARGEST),
        "MALLOC_MMAP_THRESHOLD_": (-3, largest_mapped),
    }


def environment() -> dict[str, str]:
    """Environment variables for a process to be started; values that the user has set stay."""
    return {name: os.environ.get(name, str(value)) for name, (_, value) in _options().items()}


def keep_freed_memory() -> bool:
    """Set the options in this process, best before it has threads.

    Returns whether malloc accepted all of them. A malloc other than glibc's is left as it is.
    """
    if not _glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    accepted = [mallopt(number, value) == 1 for number, value in _options().values()]
    return all(accepted)


def release_freed_memory() -> None:
    """Return freed memory to the kernel once, so that a measurement that follows excludes it."""
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _glibc() -> tuple[int, ...]:
    """The version of glibc; `()` with another C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except ValueError:
        return ()
    return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else ()
