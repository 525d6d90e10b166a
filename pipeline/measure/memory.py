"""Memory: the bytes that backward keeps alive, the peaks of process and device, and the machine
they were measured on.

What the control groups of this process leave it of their limits of memory: a container's, a
pod's, a job's of Slurm.

    room = limit - used + page cache that the kernel can give back

A group's limit holds for all inside it, so that the least room of the process's own group and those
above it counts. Where a container sees its own group as the root of the mount, as Docker shows it,
the path of the process's group leads nowhere there, or is "/", and the root is what counts.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.units import counted

__all__ = [
    "SavedBytes",
    "device_here",
    "free_bytes",
    "hardware",
    "hardware_over",
    "is_out_of_memory",
    "memory_now_bytes",
    "hardware_differences",
    "peak_device_bytes",
    "peak_reserved_bytes",
    "peak_rss_bytes",
    "pss_bytes",
    "release_reserved_bytes",
    "reserved_bytes",
    "reset_peak_device_bytes",
    "reset_peak_rss",
    "rss_bytes",
    "format_hardware",
]


class SavedBytes:
    """Counts the bytes held for backward while it is entered: `with SavedBytes(model) as saved:
    ...; saved.peak`.

    `now` and `peak` are bytes of distinct storages that autograd's saved tensors hold at one
    moment: each storage whole and once, however many nodes or views save it; the storages of
    `parameters` (a model, or an iterable of tensors), and so their views, are left out. A storage
    counts from the first node that saves it until the last one is freed: by backward, or later
    where the graph is retained. Copies of a weight (autocast, standardised weights) are not
    parameters and count.

    The parameters' storages are taken when it is entered, because an engine such as DeepSpeed moves
    parameters into flat buffers. A graph that outlives the context is still subtracted from `now`
    as it is freed. Tensors that hooks of somebody else keep are not seen: torch.utils.checkpoint
    with use_reentrant=False hides what it recomputes (torch 2.13), while use_reentrant=True, or a
    recomputation inside a Function's backward, is counted.
    """

    def __init__(self, parameters: nn.Module | Iterable[Tensor] = ()) -> None:
        self._parameters = (
            list(parameters.parameters()) if isinstance(parameters, nn.Module) else list(parameters)
        )
        self._excluded: dict[
            int, torch.UntypedStorage
        ] = {}  # values: so that no other storage gets the key
        self._held: dict[int, list[int]] = {}  # storage -> [saved tensors in it, bytes]
        # Reentrant: the garbage collector may free a saved tensor while this thread saves another.
        # A lock at all: autograd runs one thread for each device.
        self._lock = threading.RLock()
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self.now = 0
        self.peak = 0

    def __enter__(self) -> SavedBytes:
        if self._hooks is not None:
            raise RuntimeError("SavedBytes: entered twice; make one for each nesting")
        storages = [parameter.untyped_storage() for parameter in self._parameters]
        self._excluded = {storage._cdata: storage for storage in storages}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__(*exc)
        self._excluded = {}

    @property
    def storages(self) -> Collection[int]:
        """`_cdata` of each that is held now."""
        return self._held.keys()

    def _pack(self, tensor: Tensor) -> _Saved:
        storage = tensor.untyped_storage()
        key = storage._cdata  # the StorageImpl: no other one has its address while it is held here
        if key in self._excluded:
            return _Saved(tensor, None, 0)
        saved = _Saved(tensor, self, key)
        with self._lock:
            entry = self._held.get(key)
            if entry is None:
                nbytes = storage.nbytes()
                self._held[key] = [1, nbytes]
                self.now += nbytes
                if self.now > self.peak:
                    self.peak = self.now
            else:
                entry[0] += 1
        return saved

    def _release(self, key: int) -> None:
        with self._lock:
            entry = self._held[key]
            entry[0] -= 1
            if entry[0] == 0:
                del self._held[key]
                self.now -= entry[1]


class _Saved:
    """What autograd holds in place of a tensor; freed exactly when autograd frees the tensor, and
    says so.

    It holds a detached alias: an output saved by its own node would otherwise hold that node, a
    cycle that nothing frees."""

    __slots__ = ("key", "owner", "tensor", "version")

    def __init__(self, tensor: Tensor, owner: SavedBytes | None, key: int) -> None:
        self.tensor = tensor.detach()  # shares the version counter of the original
        self.version = tensor._version
        self.owner = owner
        self.key = key

    def __del__(self) -> None:
        if self.owner is not None:
            self.owner._release(
                self.key
            )  # before the storage goes, so that its key is free when it is given again


def _unpack(saved: _Saved) -> Tensor:
    # torch 2.13 skips its version check where hooks are set (saved_variable.cpp), so it is made
    # here: a measured batch must fail where a plain one does.
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace"
            f" operation: [{saved.tensor.type()} {list(saved.tensor.shape)}] is at version"
            f" {saved.tensor._version}; expected version {saved.version} instead"
        )
    return saved.tensor


def peak_rss_bytes() -> int:
    """The highest resident memory of this process, in bytes, since its start or `reset_peak_rss`.

    From VmHWM where there is a Linux /proc: getrusage's maximum survives exec, so a small child of
    a large parent reports the parent's.
    """
    kilobytes = _proc_kilobytes("/proc/self/status", "VmHWM:")
    if kilobytes is not None:
        return kilobytes * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_rss() -> bool:
    """Start the peak of `peak_rss_bytes` anew; False where the kernel does not offer it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def pss_bytes() -> int:
    """Resident memory of this process now, pages that n processes share counted as an n-th; 0 where
    the kernel does not tell.
    """
    return (_proc_kilobytes("/proc/self/smaps_rollup", "Pss:") or 0) * 1024


def rss_bytes() -> int:
    """Resident memory of this process now; 0 where the kernel does not tell."""
    return (_proc_kilobytes("/proc/self/status", "VmRSS:") or 0) * 1024


def device_here() -> torch.device:
    """On which a command computes that is told no device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_now_bytes(device: torch.device) -> int:
    """What training occupies now: the allocator's bytes on a GPU, resident memory on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else rss_bytes()


def free_bytes(device: torch.device) -> int:
    """What the device could still hold: a GPU's free memory; on a CPU what the kernel has available
    and a container may take.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = (_proc_kilobytes("/proc/meminfo", "MemAvailable:") or 0) * 1024
    room = room_bytes()
    return available if room is None else min(available, room)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or this machine, had no more memory to give.

    torch (2.13) raises `OutOfMemoryError` where its own allocator on a GPU fails. Everywhere else
    it raises a RuntimeError with the text of whoever failed: its allocator on a CPU, cuBLAS, cuDNN,
    NCCL, the driver.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    said = str(error).lower()
    return any(text in said for text in _OUT_OF_MEMORY) or (
        any(text in said for text in _PERHAPS) and _is_card_full()
    )


_OUT_OF_MEMORY = (
    # "CUDA out of memory", "CUDA error: out of memory", NCCL's "Cuda failure 2 'out of memory'"
    "out of memory",
    "cuda_error_out_of_memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED and ..._HOST_ALLOCATION_FAILED
    "allocation_failed",
    "can't allocate memory",  # torch's DefaultCPUAllocator
    "cannot allocate memory",  # the kernel's text, of a mapping
)
_PERHAPS = (
    "cudnn_status_internal_error",
    "cudnn_status_not_initialized",
    "cublas_status_not_initialized",
    "unable to find a valid cudnn algorithm",
    "unable to find an engine to execute this computation",
)
"""These have other causes, too. A full card is the common one: their workspaces and handles are not
of torch's allocator.
"""
_FULL = 0.05
"""of a card's memory is free, or less"""


def _is_card_full() -> bool:
    try:
        free, total = torch.cuda.mem_get_info()
    except (
        RuntimeError,
        AssertionError,
    ):  # no card, a torch without CUDA, or a card that answers no more
        return False
    return free <= _FULL * total


def reset_peak_device_bytes(device: torch.device) -> None:
    """Start the peaks of the device anew; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_bytes(device: torch.device) -> int:
    """The most bytes torch's allocator held for tensors on the device since the reset; 0 on a
    CPU.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def peak_reserved_bytes(device: torch.device) -> int:
    """Likewise what the allocator had taken from the device, held by tensors or kept for the next:
    what must fit the card.
    """
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def release_reserved_bytes(device: torch.device) -> None:
    """Hand what torch's allocator keeps for the next tensors back to the device; nothing to do on a
    CPU.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reserved_bytes(device: torch.device) -> int:
    """What torch's allocator has taken from the device now; 0 on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def hardware(device: torch.device) -> dict[str, Any]:
    """What speed and memory on `device` were measured on, flat, without the host's name: two equal
    machines compare equal.
    """
    return {
        "cpu": _cpu_model(),
        "cores": (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        ),
        "memory_gib": round((_proc_kilobytes("/proc/meminfo", "MemTotal:") or 0) / 2**20),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def hardware_differences(
    machine: Mapping[str, Any], *, own_cores: bool
) -> list[tuple[str, Any, Any]]:
    """What differs of a worker's `hardware()` from that of `device_here`: each name, what is here,
    and what was there.

    Threads are told by themselves. A worker on cores of its own saw those alone, and one on a card
    those near to it."""
    device = device_here()
    unlike = {"threads", *(("cores",) if own_cores or device.type == "cuda" else ())}
    here = hardware(device)
    return [
        (name, mine, machine.get(name))
        for name, mine in here.items()
        if name not in unlike and mine != machine.get(name)
    ]


def hardware_over(machines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the workers' machines one: what they differ in is told with how many have it, whichever of
    them is rank 0.
    """

    def over(values: list[Any]) -> Any:
        counts = sorted(Counter(values).items(), key=str)
        if len(counts) == 1:
            return values[0]
        return " + ".join(f"{each} ({count} of {len(values)} workers)" for each, count in counts)

    return {name: over([machine[name] for machine in machines]) for name in machines[0]}


def format_hardware(machine: Mapping[str, Any]) -> str:
    """What computed, of a `hardware()`: the GPU, or the CPU and torch's threads."""
    return (
        machine["gpu"]
        if machine["gpu"] != "none"
        else f"{machine['cpu']}, {counted(machine['threads'], 'thread')}"
    )


def _cpu_model() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _proc_kilobytes(path: str, field: str) -> int | None:
    try:
        with Path(path).open() as file:
            for line in file:
                if line.startswith(field):
                    return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""files of the limit and of what is used, and the field of memory.stat that holds the cache, of the
groups inside too
"""


def room_bytes(
    *, mount: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> int | None:
    """None where no group has a limit, or none can be read. `groups` says which this process is
    in.
    """
    rooms = [
        room
        for folder, files in _folders(mount, groups)
        if (room := _room(folder, *files)) is not None
    ]
    return min(rooms, default=None)


def _folders(mount: Path, groups: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Of each group that may limit memory, from the process's own to the root of the mount."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, files = mount, _V2
        elif "memory" in controllers.split(","):
            root, files = mount / "memory", _V1
        else:
            continue
        own = root / path.lstrip("/")
        yield from (
            (folder, files) for folder in (own, *own.parents) if folder.is_relative_to(root)
        )


def _room(folder: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(
            0,
            int((folder / limit).read_text())
            - int((folder / used).read_text())
            + int(stat.get(cache, 0)),
        )
    except (OSError, ValueError):  # no such group here, or no limit: "max"
        return None
