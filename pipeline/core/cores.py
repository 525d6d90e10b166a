"""Which cores a worker computes on: some that no other has, so that runs do not slow one another
unseen, or those near its card.

A core is a physical one, with all the logical ones that the kernel shows of it (SMT siblings share
its arithmetic). It is taken by a lock on a file of its name, which the kernel lets go when its
holder dies. All of this machine's runs that ask for cores of their own see the same files; others,
which do not ask, are not kept away.
"""

from __future__ import annotations

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

PATIENCE_S = 30.0  # a worker that ended may take a while to die


@contextmanager
def own_cores(
    count: int, *, folder: Path | None = None, patience_s: float = PATIENCE_S
) -> Iterator[tuple[int, ...]]:
    """Take `count` cores and keep every thread of this process on them, those to come included,
    until the end.

    Gives the logical cores that they are.

    Args:
        folder: where the locks lie; None: one for each user of this machine.

    Raises:
        UserError: others hold so many that too few are left, after `patience_s` seconds.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"spiketrain-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    before, deadline = os.sched_getaffinity(0), time.monotonic() + patience_s
    there = physical_cores(before)
    while (taken := _taken(there, count, folder)) is None:
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
    """Inside, every thread of this process is on cores of the NUMA node that its card hangs on.

    Memory lies on the node of the thread that touches it first, so that batches pass no link
    between sockets. Nothing changes on a CPU, on a machine of one node or that tells of none, and
    where fewer than `at_least` of this process's logical cores are near: waiting for cores costs
    more than distance.
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
    """Logical cores of the card's NUMA node; none where NVML or the kernel does not tell."""
    try:
        pynvml.nvmlInit()
        # By its UUID: CUDA's numbers are of the cards that this process sees alone.
        handle = pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        )
        domain, rest = str(pynvml.nvmlDeviceGetPciInfo(handle).busId).lower().split(":", 1)
        card = (
            devices / f"{int(domain, 16):04x}:{rest}"
        )  # NVML writes 00000000:3B:00.0, the kernel 0000:3b:00.0
        if int((card / "numa_node").read_text()) < 0:
            return set()
        return _listed((card / "local_cpulist").read_text())
    except (pynvml.NVMLError, OSError, ValueError):
        return set()


def _listed(text: str) -> set[int]:
    """The numbers of a kernel's list, such as `0-31,64-95`."""
    spans = [each.partition("-") for each in text.strip().split(",") if each]
    return {
        number for first, _, last in spans for number in range(int(first), int(last or first) + 1)
    }


def physical_cores(
    logical: Collection[int], *, topology: Path = Path("/sys/devices/system/cpu")
) -> dict[str, tuple[int, ...]]:
    """The logical cores of each physical one, by its first sibling; each is one by itself where the
    kernel tells nothing.
    """
    found: dict[str, tuple[int, ...]] = {}
    for core in sorted(logical):
        siblings = (
            topology / f"cpu{core}" / "topology" / "thread_siblings_list"
        )  # such as 0,64 or 0-1
        name = re.split("[,-]", siblings.read_text().strip())[0] if siblings.exists() else str(core)
        found[name] = (*found.get(name, ()), core)
    return found


def cores_here() -> int:
    """Physical ones that this process may use."""
    return len(physical_cores(os.sched_getaffinity(0)))


class NodeCores(NamedTuple):
    """Of a cluster, which may have several nodes on one machine."""

    machine: str
    given: int
    """that the cluster counts there, logical or physical"""
    physical: int
    """of the machine, as far as the node may use them"""


def cores_of_a_node(given: int) -> NodeCores:
    """Of the one that this process is on."""
    return NodeCores(platform.node(), given, cores_here())


def cores_of_machines(nodes: Iterable[NodeCores]) -> int:
    """Physical ones that are given to the cluster, each once."""
    given: Counter[str] = Counter()
    there: dict[str, int] = {}
    for node in nodes:
        given[node.machine] += node.given
        there[node.machine] = node.physical
    return sum(min(count, there[machine]) for machine, count in given.items())


def _taken(
    there: Mapping[str, tuple[int, ...]], count: int, folder: Path
) -> tuple[tuple[int, ...], ExitStack] | None:
    """So many of them, and what holds them; None, and none held, where fewer are free."""
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
    """Every thread: what the kernel calls a process's affinity is that of one thread, which later
    ones inherit.
    """
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:
            continue  # it ended meanwhile
