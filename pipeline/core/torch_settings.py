"""In what precision networks compute, for matrix products and convolutions alike.

    fp32    IEEE single precision
    tf32    TF32: operands of fp32 are rounded to 10 bits of mantissa, sums are fp32; NVIDIA cards
    since Ampere bf16    torch's autocast; what it leaves in fp32 is IEEE single precision

torch's own defaults (2.13) compute fp32 convolutions in TF32 and fp32 products in IEEE single
precision. Here both are set, by torch's `fp32_precision`, and before that by the older
`allow_tf32`, which torch.compile still reads: such a read fails where the two disagree.

How torch computes in a worker: so many threads, the same bits after a restart, on memory that it
keeps.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from pipeline.core.allocator import keep_freed_memory

Precision = Literal["fp32", "tf32", "bf16"]

TF32_SINCE = (8, 0)
"""compute capability of Ampere"""


def compute_in(precision: Precision, device: torch.device) -> None:
    """Set how this process computes from now on, but for autocast, which belongs to a forward.

    Raises:
        ValueError: as `check_precision`.
    """
    check_precision("recipe", precision, device)
    _set_products(precision)


def check_precision(who: str, precision: Precision, device: torch.device) -> None:
    """Refuse TF32 on a device that has none, where it would be fp32 without a word.

    Raises:
        ValueError: it has none.
    """
    if precision != "tf32" or (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= TF32_SINCE
    ):
        return
    got = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    raise ValueError(
        f"{who}: precision='tf32' must have an NVIDIA card of compute capability 8.0 or newer; got"
        f" {got}: take 'fp32' or 'bf16'"
    )


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Inside, fp32 products and convolutions on a card are computed in this precision; afterwards
    as before.
    """
    before = [operation.fp32_precision for operation in _operations()]
    _set_products(precision)
    try:
        yield
    finally:
        _set(before)


@contextmanager
def computing(device: torch.device, precision: Precision) -> Iterator[None]:
    """Inside, everything is computed in this precision, as in training."""
    with products_in(precision), autocast(device, precision):
        yield


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 for what torch lists as safe in it (matrix products, convolutions); parameters and
    membranes stay fp32.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _set_products(precision: Precision) -> None:
    _set(["tf32" if precision == "tf32" else "ieee"] * 3)


def _set(precisions: Sequence[str]) -> None:
    """Of each of `_operations`."""
    product, convolution, _ = precisions
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = (
        product == "tf32",
        convolution == "tf32",
    )
    for operation, precision in zip(_operations(), precisions, strict=True):
        operation.fp32_precision = precision


def _operations() -> tuple[Any, ...]:
    """What CUDA computes of fp32 in a precision that can be chosen; a CPU has settings of its own,
    which stay.
    """
    return torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn  # type: ignore[attr-defined]


EXACT = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""by which NCCL and cuBLAS take the same order of sums at every start: NVLS, trees and other
workspaces promise no order
"""

_inexact: set[str] = set()
"""operations that this process ran on a card and of which torch has no deterministic form"""


def settle(threads: int, device: torch.device) -> None:
    """Before anything is computed. What a user has set of EXACT stays; `exactness` tells of it."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    if device.type != "cuda":
        return  # torch's CPU operations that networks use are deterministic
    for name, value in EXACT.items():
        os.environ.setdefault(name, value)
    torch.backends.cudnn.deterministic = True  # costs speed where cuDNN has a faster kernel
    torch.backends.cudnn.benchmark = False
    # Warns: a network with an operation that has no such form trains all the same, and its
    # conditions name the operation.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _note_inexact()


def exactness(device: torch.device) -> str:
    """`yes` if a restart on as many workers gives the same bits, else `no: ` and what prevents it;
    for a run's conditions.
    """
    if device.type != "cuda":
        return "yes"
    others = [
        f"{name}={os.environ.get(name)}"
        for name, value in EXACT.items()
        if os.environ.get(name) != value
    ]
    return f"no: {', '.join([*others, *sorted(_inexact)])}" if others or _inexact else "yes"


def _note_inexact() -> None:
    """Keep the names that torch (2.13) warns of: it offers them no other way."""
    show = warnings.showwarning

    def note(message: Warning | str, *about: object, **more: object) -> None:
        if found := re.match(r"(.+?) does not have a deterministic implementation", str(message)):
            _inexact.add(found[1])
        else:
            show(message, *about, **more)  # type: ignore[arg-type]

    if getattr(show, "__module__", "") != __name__:  # another run in this process has it already
        warnings.showwarning = note
