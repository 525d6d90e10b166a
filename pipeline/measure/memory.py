"""Memory of this process, its device and its machine, and the hardware description of results.

On a CPU the free memory is limited by the control groups of a container, a pod or a Slurm job:

    room = limit - used + page cache that the kernel can reclaim

The limits of the process's own group and of all parent groups hold, so the smallest room counts.
With Docker a container may see its own group as the root of the mount. The path of the process's
group then does not exist or is "/", and only the root counts.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux.
"""

import os
import platform
import re
import resource
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.core.units import counted
from pipeline.spiking.kernels.operators import kernels_of

DEVICES = Path("/dev")  # the driver has a file for each GPU there

# ----------------------------------------------------------------------------------------- process


def peak_rss_bytes() -> int:
    """The highest resident memory of this process since its start or `reset_peak_rss`.

    It is Linux' VmHWM, or getrusage's maximum in a sandbox without VmHWM. getrusage's maximum
    survives exec, so a small child process of a large parent reports the parent's maximum.
    """
    return (
        _proc_bytes("/proc/self/status", "VmHWM:")
        or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def reset_peak_rss() -> bool:
    """Reset the peak of `peak_rss_bytes`; False if the kernel does not support it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def pss_bytes() -> int:
    """Resident memory now, with a page shared by n processes as 1/n of a page; 0 if unknown."""
    return _proc_bytes("/proc/self/smaps_rollup", "Pss:")


def rss_bytes() -> int:
    """Resident memory of this process now; 0 if unknown."""
    return _proc_bytes("/proc/self/status", "VmRSS:")


# ------------------------------------------------------------------------------------------ device


def unusable_gpus() -> str | None:
    """The reason why torch cannot use the GPUs of this machine, and the remedy, in one line.

    None if torch can use them, if there are none, or if CUDA_VISIBLE_DEVICES hides them. Ray counts
    GPUs through NVML, which works with every driver. Without this check, workers would get GPUs and
    fail.
    """
    # CUDA uses the GPUs before the first unknown name, so "", -1 and Slurm's NoDevFiles hide all.
    if re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0")) is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own message of several lines
        if torch.cuda.is_available():
            return None
    gpus = len(list(DEVICES.glob("nvidia[0-9]*")))
    if not gpus:
        return None
    return (
        f"torch {torch.__version__}, for CUDA {torch.version.cuda or '(none)'}, cannot use the"
        f" {counted(gpus, 'GPU')} here; compare with the driver's CUDA in nvidia-smi: update the"
        " driver, install a torch for it (https://pytorch.org/get-started), or train on the CPU"
        " (--device cpu); a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    )


def device_here() -> torch.device:
    """The default device of a command: a GPU if torch can use one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_now_bytes(device: torch.device) -> int:
    """Memory of training now: the allocator's bytes on a GPU, resident memory on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else rss_bytes()


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of this machine within the limits of its control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available, room = _proc_bytes("/proc/meminfo", "MemAvailable:"), room_bytes()
    return available if room is None else min(available, room)


def reset_peak_device_bytes(device: torch.device) -> None:
    """Reset the peaks of a GPU's memory. On a CPU, do nothing."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_bytes(device: torch.device) -> int:
    """Peak bytes of tensors on a GPU since the reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def peaks(device: torch.device) -> dict[str, int]:
    """The peaks of this process and of its device, by the names of `Totals`.

    torch's allocator reserves more memory than the tensors need. All reserved memory must fit on
    the card.
    """
    return {
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(device),
        "peak_reserved_bytes": (
            torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
        ),
    }


# ----------------------------------------------------------------------------------- out of memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or this machine has no memory left.

    torch (2.13) raises `OutOfMemoryError` if its own allocator on a GPU fails. In all other cases
    it raises a RuntimeError with the text of the failing library: its allocator on a CPU, cuBLAS,
    cuDNN, NCCL, the driver.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(text in message for text in _OUT_OF_MEMORY) or (
        any(text in message for text in _POSSIBLY_OUT_OF_MEMORY) and _is_card_full()
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
    "cannot allocate memory",  # the kernel, for a mapping
)
# These errors have several causes. The most common cause is a full card, because the libraries
# allocate their handles and workspaces outside torch's allocator.
_POSSIBLY_OUT_OF_MEMORY = (
    "cudnn_status_internal_error",
    "cudnn_status_not_initialized",
    "cublas_status_not_initialized",
    "unable to find a valid cudnn algorithm",
    "unable to find an engine to execute this computation",
)
_FULL_CARD = 0.05  # a card is full if at most this share of its memory is free


def _is_card_full() -> bool:
    try:
        free, total = torch.cuda.mem_get_info()
    except (RuntimeError, AssertionError):  # no card, no CUDA, or an unresponsive card
        return False
    return free <= _FULL_CARD * total


# ---------------------------------------------------------------------------------------- hardware


def hardware(device: torch.device) -> dict[str, Any]:
    """The hardware and the torch version behind a measurement.

    It excludes the host name, so that two equal machines compare equal.
    """
    return {
        "cpu": (
            _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
        ),
        # The widest that torch's kernels use. Machines of one model name may differ in them.
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_proc_bytes("/proc/meminfo", "MemTotal:") / 2**30),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "torch": str(torch.__version__),
        "kernels": kernels_of(device),
        "threads": torch.get_num_threads(),
    }


def hardware_differences(
    machine: Mapping[str, Any], *, own_cores: bool
) -> list[tuple[str, Any, Any]]:
    """Differences of a worker's `hardware()` from this machine's: (name, here, there).

    Threads are ignored. Cores are ignored with `own_cores`: the worker sees only the cores that are
    reserved for it.
    """
    ignored = {"threads", *(("cores",) if own_cores else ())}
    return [
        (name, here, machine.get(name))
        for name, here in hardware(device_here()).items()
        if name not in ignored and here != machine.get(name)
    ]


def combine_hardware(machines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One description of all workers' machines.

    Where machines differ, each value is followed by its number of workers. The values are sorted,
    so the description does not depend on the order of ranks.
    """
    description = dict(machines[0])
    for name in description:
        counts = Counter(machine[name] for machine in machines)
        if len(counts) > 1:
            description[name] = " + ".join(
                f"{value} ({count} of {len(machines)} workers)"
                for value, count in sorted(counts.items(), key=str)
            )
    return description


def format_hardware(machine: Mapping[str, Any]) -> str:
    """Name the main part of a `hardware()`: the GPU, or the CPU and torch's threads."""
    cpu = f"{machine['cpu']}, {counted(machine['threads'], 'thread')}"
    return cpu if machine["gpu"] == "none" else machine["gpu"]


def _proc_field(path: str, field: str) -> str:
    """The text after a field name and its colon; "" if the field is missing."""
    try:
        with Path(path).open() as file:  # read up to the field: a whole cpuinfo may be long
            line = next((line for line in file if line.startswith(field)), "")
    except OSError:
        return ""
    return line.removeprefix(field).strip(": \t\n")


def _proc_bytes(path: str, field: str) -> int:
    """The bytes of a field whose unit is kB; 0 if the field is missing."""
    return int(_proc_field(path, field).removesuffix("kB") or 0) * 1024


# ---------------------------------------------------------------------------------- control groups

# The file of the limit, the file of the usage, and the field of memory.stat for the page cache. The
# field includes nested groups.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def room_bytes(
    *, mount: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Memory that the control groups leave to this process; None without a limit.

    `groups`: the file that lists the groups of this process.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # no control groups, or a sandbox that hides them
        return None
    rooms: list[int | None] = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        root, files = (mount, _V2) if number == "0" else (mount / "memory", _V1)
        if number == "0" or "memory" in controllers.split(","):
            own = root / path.lstrip("/")
            rooms += [
                _room(folder, *files)
                for folder in (own, *own.parents)
                if folder.is_relative_to(root)
            ]
    return min((room for room in rooms if room is not None), default=None)


def _room(folder: Path, limit: str, used: str, cache: str) -> int | None:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        in_use = int((folder / used).read_text()) - int(stat.get(cache, 0))
        return max(0, int((folder / limit).read_text()) - in_use)
    except (OSError, ValueError):  # no such group here, or no limit ("max")
        return None
