"""CPU affinity of a worker: reserved cores, or the cores near its GPU.

Reserved cores prevent runs on one machine from slowing one another. A core is a physical core with
all its logical ones (SMT siblings share its arithmetic units). A worker reserves it by locking a
file with the core's name. The kernel releases the lock when the worker dies. All runs on a machine
that reserve cores use the same files. Other programs may still use these cores.
"""

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import pynvml
import torch

from pipeline.core.errors import UserError

_MASKS = 128  # 64-bit masks of logical cores, as many as Linux may have (8192)
PATIENCE_S = 30.0  # a worker of an ended run may still be exiting


@contextmanager
def own_cores(
    count: int, *, folder: Path | None = None, patience_s: float = PATIENCE_S
) -> Iterator[tuple[int, ...]]:
    """Reserve `count` physical cores and keep all threads of this process on them.

    New threads stay on them too. The context manager yields the numbers of the logical cores, and
    restores the affinity at its end.

    Args:
        folder: the folder of the lock files; None: one folder per user of this machine.
        patience_s: the longest wait for free cores, in seconds.

    Raises:
        UserError: too few cores are free after `patience_s` seconds.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"spiketrain-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    deadline = time.monotonic() + patience_s
    there = physical_cores(os.sched_getaffinity(0))
    while (taken := _lock_cores(there, count, folder)) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"cores: a worker needs {count} of its own; too few of this machine's {len(there)}"
                " are free; --side-by-side 1 shares them"
            )
        time.sleep(0.2)
    cores, locks = taken
    with locks, _kept_on(set(cores)):
        yield cores


def near_cores(device: torch.device, *, at_least: int) -> AbstractContextManager[None]:
    """Keep all threads of this process on the cores of its GPU's NUMA node, inside the block.

    Memory is allocated on the node of the thread that touches it first. Batches then do not cross
    the link between sockets. Nothing changes on a CPU, on a machine with one node or unknown nodes,
    or if fewer than `at_least` of this process's logical cores are on that node: too few cores cost
    more time than the distance.
    """
    before = os.sched_getaffinity(0)
    near = before & _cores_near(device) if device.type == "cuda" else before
    return nullcontext() if near == before or len(near) < at_least else _kept_on(near)


def _cores_near(device: torch.device) -> set[int]:
    """Logical cores of the card's NUMA node; empty if NVML does not know it."""
    try:
        pynvml.nvmlInit()
        # CUDA numbers only the visible cards of this process; the UUID identifies the card.
        uuid = torch.cuda.get_device_properties(device).uuid
        masks = pynvml.nvmlDeviceGetCpuAffinityWithinScope(
            pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"),
            _MASKS,
            pynvml.NVML_AFFINITY_SCOPE_NODE,
        )
    except pynvml.NVMLError:
        return set()
    return {core for core in range(64 * _MASKS) if masks[core // 64] >> core % 64 & 1}


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
    there: Mapping[str, tuple[int, ...]], count: int, folder: Path
) -> tuple[tuple[int, ...], ExitStack] | None:
    """Try to lock `count` cores; None if fewer are free, and then no lock is held."""
    with ExitStack() as locks:
        mine: list[tuple[int, ...]] = []
        for name, logical in there.items():
            if len(mine) == count:
                break
            file = locks.enter_context((folder / name).open("a"))
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine.append(logical)
        if len(mine) == count:
            return tuple(core for logical in mine for core in logical), locks.pop_all()
    return None


@contextmanager
def _kept_on(cores: set[int]) -> Iterator[None]:
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
