"""CPU affinity of a worker: reserved cores.

Reserved cores keep runs of one machine from competing for the same cores. A worker reserves a
physical core with all of its logical cores, because SMT siblings share arithmetic units. It
reserves the core by locking a file with the core's name. The kernel releases the lock when the
worker dies. By default, the files are in a folder of the user in TMPDIR. Runs with other files,
runs that reserve no cores, and other programs may still use these cores.
"""

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import UserError

TIMEOUT_S = 30.0  # why wait: a worker of an ended run may still hold its cores


@contextmanager
def reserve_cores(
    count: int, *, folder: Path | None = None, timeout_s: float = TIMEOUT_S
) -> Iterator[tuple[int, ...]]:
    """Reserve `count` physical cores and keep all threads of this process on them.

    New threads stay on them too. The context manager yields the numbers of the logical cores, and
    restores the affinity at its end.

    Args:
        folder: the folder of the lock files; None: one folder per user, in TMPDIR.
        timeout_s: the longest wait for free cores, in seconds.

    Raises:
        UserError: too few cores are free after `timeout_s` seconds.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"spiketrain-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    available = physical_cores(os.sched_getaffinity(0))
    while (reserved := _lock_cores(available, count, folder)) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"cores: a worker needs {count} unreserved cores; this process may use"
                f" {len(available)} cores, and fewer than {count} of them are unreserved;"
                " --side-by-side 1 reserves no cores"
            )
        time.sleep(0.2)
    cores, locks = reserved
    with locks, _affinity_to(set(cores)):
        yield cores


def physical_cores(
    logical: Collection[int], *, topology: Path = Path("/sys/devices/system/cpu")
) -> dict[str, tuple[int, ...]]:
    """The logical cores of each physical core, keyed by the first sibling.

    If the kernel does not list siblings, each logical core counts as a physical one.
    """
    cores: dict[str, tuple[int, ...]] = {}
    for core in sorted(logical):
        siblings = topology / f"cpu{core}" / "topology" / "thread_siblings_list"  # 0,64 or 0-1
        name = re.split("[,-]", siblings.read_text().strip())[0] if siblings.exists() else str(core)
        cores[name] = (*cores.get(name, ()), core)
    return cores


def cores_here() -> int:
    """The number of physical cores that this process may use."""
    return len(physical_cores(os.sched_getaffinity(0)))


def _lock_cores(
    available: Mapping[str, tuple[int, ...]], count: int, folder: Path
) -> tuple[tuple[int, ...], ExitStack] | None:
    """Try to lock `count` cores. If fewer are free, return None and hold no lock."""
    with ExitStack() as locks:
        reserved: list[tuple[int, ...]] = []
        for name, logical in available.items():
            if len(reserved) == count:
                break
            file = locks.enter_context((folder / name).open("a"))
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                reserved.append(logical)
        if len(reserved) == count:
            return tuple(core for logical in reserved for core in logical), locks.pop_all()
    return None


@contextmanager
def _affinity_to(cores: set[int]) -> Iterator[None]:
    """Keep every thread of this process on these cores; restore the affinity at the end."""
    before = os.sched_getaffinity(0)
    _set_affinity(cores)
    try:
        yield
    finally:
        _set_affinity(before)


def _set_affinity(cores: set[int]) -> None:
    # The kernel sets the affinity per thread, and only threads started later inherit it.
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(int(thread.name), cores)
