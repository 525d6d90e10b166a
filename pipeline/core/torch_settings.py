"""torch's settings in a process: precision, threads, determinism and memory.

The precisions of matrix products, convolutions and recurrent layers:

    fp32    IEEE single precision
    tf32    fp32 operands are rounded to 10 bits of mantissa, sums are fp32; NVIDIA cards since
            Ampere
    bf16    torch's autocast; operations that it leaves in fp32 use IEEE single precision

By default torch (2.13) computes fp32 convolutions in TF32 and fp32 products in IEEE single
precision. This module sets both through torch's `fp32_precision`, and before that through the older
`allow_tf32`: torch.compile still reads the older setting, and the read fails if the two disagree.

The process keeps freed memory, as torch's caching allocator keeps a GPU's memory. By default,
glibc's malloc returns the memory of a batch's graph to the kernel and requests it again at the next
batch. This causes thousands of page faults per batch, which cost a small network up to an eighth of
its time (docs/LOG.md). All threads use the main heap, because malloc trims other heaps whatever the
thresholds are, and Ray trains in a thread. The resident set size (RSS) of a process is therefore
the most memory that it has used since `release_freed_memory`.
"""

import ctypes
import os
import platform
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

Precision = Literal["fp32", "tf32", "bf16"]

TF32_SINCE = (8, 0)  # the compute capability of Ampere


def compute_in(precision: Precision, device: torch.device) -> None:
    """Set the precision of this process, except autocast, which a forward pass enters itself.

    Raises:
        ValueError: the device does not support the precision.
    """
    check_precision("recipe", precision, device)
    _set([_FP32[precision]] * 3)


def check_precision(subject: str, precision: Precision, device: torch.device) -> None:
    """Refuse TF32 on a device without it. torch would silently compute in fp32 there.

    Raises:
        ValueError: the device has no TF32.
    """
    if precision != "tf32" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= TF32_SINCE
    ):
        return
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    raise ValueError(
        f"{subject}: precision='tf32' needs an NVIDIA card of compute capability 8.0 or newer; got"
        f" {device_name}: use 'fp32' or 'bf16'"
    )


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Set the fp32 precision of products, convolutions and recurrent layers on a GPU inside the
    block.
    """
    before = [operation.fp32_precision for operation in _operations()]
    _set([_FP32[precision]] * 3)
    try:
        yield
    finally:
        _set(before)


@contextmanager
def computing(device: torch.device, precision: Precision) -> Iterator[None]:
    """Set the fp32 precision and autocast inside the block, as in training."""
    with products_in(precision), autocast(device, precision):
        yield


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """torch's autocast to bf16. With another precision it is disabled.

    The operations that torch lists as safe (matrix products, convolutions) are computed in bf16.
    Parameters and membrane potentials stay fp32.
    """
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return without_autocast(device)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context whose operations on `device` have the precision of their operands."""
    # The meta device has no autocast, and torch refuses to disable it there.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


_FP32: dict[Precision, str] = {"fp32": "ieee", "tf32": "tf32", "bf16": "ieee"}


def _set(precisions: Sequence[str]) -> None:
    """Set the fp32 precision of each of `_operations`, in their order."""
    torch.backends.cuda.matmul.allow_tf32 = precisions[0] == "tf32"
    torch.backends.cudnn.allow_tf32 = precisions[1] == "tf32"
    for operation, precision in zip(_operations(), precisions, strict=True):
        operation.fp32_precision = precision


def _operations() -> tuple[Any, ...]:
    """The fp32 CUDA operations with a selectable precision. A CPU's settings are unchanged."""
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn


def seed_torch(seed: int) -> None:
    """Seed torch's global generators of the CPU and of NVIDIA cards.

    `torch.manual_seed` gives the same numbers. For each kind of device that is absent, it also
    formats the stack of its caller, half a millisecond in all.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


# Environment variables that make NCCL and cuBLAS sum in the same order at every start. NCCL's
# NVLS and Tree algorithms may sum in another order at each start. So may cuBLAS with another
# workspace setting.
EXACT = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

# GPU operations of this process without a deterministic form in torch
_nondeterministic: set[str] = set()


def configure_torch(threads: int, device: torch.device) -> None:
    """Set threads, memory and determinism before any computation.

    Variables in EXACT that the user has set are unchanged; `exactness` names those that differ.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    if device.type != "cuda":
        return  # torch's CPU operations for networks are deterministic
    for name, value in EXACT.items():
        os.environ.setdefault(name, value)
    torch.backends.cudnn.deterministic = True  # costs speed where cuDNN has a faster kernel
    torch.backends.cudnn.benchmark = False
    # A non-deterministic operation only causes a warning. The run's conditions name the operation.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _hook_warnings()


def exactness(device: torch.device) -> str:
    """`yes` if a restart with equally many workers gives the same bits, else `no: ` and why.

    The text is one of a run's conditions.
    """
    if device.type != "cuda":
        return "yes"
    other_settings = (
        f"{name}={os.environ.get(name)}"
        for name, value in EXACT.items()
        if os.environ.get(name) != value
    )
    reasons = [*other_settings, *sorted(_nondeterministic)]
    return f"no: {', '.join(reasons)}" if reasons else "yes"


def _hook_warnings() -> None:
    """Replace `warnings.showwarning`.

    Warnings about non-deterministic operations are recorded and not shown. torch (2.13) names these
    operations only in warnings.
    """
    show = warnings.showwarning

    def collect(message: Warning | str, *arguments: object, **options: object) -> None:
        if match := re.match(r"(.+?) does not have a deterministic implementation", str(message)):
            _nondeterministic.add(match[1])
        else:
            show(message, *arguments, **options)  # type: ignore[arg-type]

    if getattr(show, "__module__", "") != __name__:  # else already set
        warnings.showwarning = collect


def _malloc_options() -> dict[str, tuple[int, int]]:
    """malloc's options by environment variable: the number in malloc.h, and the value."""
    # glibc before 2.35 refuses an mmap threshold above 32 MiB. It then keeps the default of
    # 128 KiB, and returns each larger block to the kernel when it is freed.
    largest_mapped = 2**31 - 1 if _glibc_version() >= (2, 35) else 32 * 2**20
    return {
        "MALLOC_ARENA_MAX": (-8, 1),
        "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
        "MALLOC_MMAP_THRESHOLD_": (-3, largest_mapped),
    }


def malloc_environment() -> dict[str, str]:
    """malloc's environment variables for a new process. Values of the user are unchanged."""
    return {
        name: os.environ.get(name, str(value)) for name, (_, value) in _malloc_options().items()
    }


def keep_freed_memory() -> bool:
    """Set malloc's options in this process, preferably before it has threads.

    Returns whether malloc accepted all of them. A malloc other than glibc's is left unchanged.
    """
    if not _glibc_version():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    accepted = [mallopt(number, value) == 1 for number, value in _malloc_options().values()]
    return all(accepted)


def release_freed_memory() -> None:
    """Return freed memory to the kernel once, to exclude it from the next measurement."""
    if _glibc_version():
        ctypes.CDLL(None).malloc_trim(0)


def _glibc_version() -> tuple[int, ...]:
    """The version of glibc; `()` with another C library."""
    name, version = platform.libc_ver()
    return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else ()
