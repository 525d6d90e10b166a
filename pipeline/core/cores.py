"""CPU affinity of a worker: reserved cores, or the cores near its GPU.

Reserved cores prevent runs on one machine from slowing one another. A core is a physical core with
all its logical ones (SMT siblings share its arithmetic units). A worker reserves it by locking a
file with the core's name. The kernel releases the lock when the worker dies. All runs on a machine
that reserve cores use the same files. Other programs may still use these cores.
"""

import fcntl
import os
import platform
import re
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pynvml
import torch

from pipeline.core.errors import UserError

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
    before, deadline = os.sched_getaffinity(0), time.monotonic() + patience_s
    there = physical_cores(before)
    while (taken := _lock_cores(there, count, folder)) is None:
        if time.monotonic() > deadline:
            free = f"too few of this machine's {len(there)} are free; --side-by-side 1 shares them"
            raise UserError(f"cores: a worker needs {count} of its own; {free}")
        time.sleep(0.2)
    cores, locks = taken
    with locks:
        _keep_on(set(cores))
        try:
            yield cores
        finally:
            _keep_on(before)


@contextmanager
def near_cores(
    device: torch.device, *, at_least: int, devices: Path = Path("/sys/bus/pci/devices")
) -> Iterator[None]:
    """Keep all threads of this process on the cores of its GPU's NUMA node.

    Memory is allocated on the node of the thread that touches it first. Batches then do not cross
    the link between sockets. Nothing changes on a CPU, on a machine with one node or unknown nodes,
    or if fewer than `at_least` of this process's logical cores are on that node: too few cores cost
    more time than the distance.
    """
    before = os.sched_getaffinity(0)
    near = before & _cores_near(device, devices) if device.type == "cuda" else before
    if near == before or len(near) < at_least:
        yield
        return
    _keep_on(near)
    try:
        yield
    finally:
        _keep_on(before)


def _cores_near(device: torch.device, devices: Path) -> set[int]:
    """Logical cores of the card's NUMA node; empty if NVML or the kernel does not know it."""
    try:
        pynvml.nvmlInit()
        # CUDA numbers only the visible cards of this process; the UUID identifies the card.
        handle = pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        )
        domain, rest = str(pynvml.nvmlDeviceGetPciInfo(handle).busId).lower().split(":", 1)
        # NVML writes 00000000:3B:00.0, the kernel 0000:3b:00.0.
        card = devices / f"{int(domain, 16):04x}:{rest}"
        if int((card / "numa_node").read_text()) < 0:
            return set()
        return _parse_core_list((card / "local_cpulist").read_text())
    except (pynvml.NVMLError, OSError, ValueError):
        return set()


def _parse_core_list(text: str) -> set[int]:
    """Parse a list in the kernel's format, such as `0-31,64-95`."""
    spans = [each.partition("-") for each in text.strip().split(",") if each]
    return {
        number for first, _, last in spans for number in range(int(first), int(last or first) + 1)
    }


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


class NodeCores(NamedTuple):
    """The cores of one node of a cluster. Several nodes may be on one machine."""

    machine: str
    given: int
    """cores that the cluster counts on the node, logical or physical"""
    physical: int
    """physical cores of the machine that the node may use"""


def cores_of_a_node(given: int) -> NodeCores:
    """The cores of the node of this process."""
    return NodeCores(platform.node(), given, cores_here())


def cores_of_machines(nodes: Iterable[NodeCores]) -> int:
    """The number of physical cores of a cluster; a machine with several nodes counts once."""
    given: Counter[str] = Counter()
    there: dict[str, int] = {}
    for node in nodes:
        given[node.machine] += node.given
        there[node.machine] = node.physical
    return sum(min(count, there[machine]) for machine, count in given.items())


def _lock_cores(
    there: Mapping[str, tuple[int, ...]], count: int, folder: Path
) -> tuple[tuple[int, ...], ExitStack] | None:
    """Try to lock `count` cores; None if fewer are free, and then no lock is held."""
    with ExitStack() as locks:
        mine: list[tuple[int, ...]] = []
        for name, logical in there.items():
            if len(mine) < count and _take(folder / name, locks):
                mine.append(logical)
        if len(mine) == count:
            return tuple(core for logical in mine for core in logical), locks.pop_all()
    return None


def _take(file: Path, held: ExitStack) -> bool:
    handle = file.open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return False
    held.enter_context(handle)
    return True


def _keep_on(cores: set[int]) -> None:
    """Set the affinity of every thread.

    The kernel sets it per thread, and only threads started later inherit it.
    """
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:
            continue  # the thread has ended
