"""How fast a GPU is: what it is brought by its host in a second, and what it multiplies. The sick one is told by its like."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.doctor.failed import failed

COPIED = 16 << 20
"""numbers in float32 that are copied: 64 MiB, some batches of images"""
SIDE = 4096
"""of the two square matrices that are multiplied in float32"""
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU."""

    name: str
    """or what was in the way, beginning with `failed`"""
    copied_bytes_per_s: float = 0.0
    """from the host's pinned memory"""
    multiplied_per_s: float = 0.0
    """multiplications and additions of a product"""


def cards() -> tuple[Card, ...]:
    """Those of this machine, one after another: together they would share the host's memory."""
    return tuple(_card(index) for index in range(torch.cuda.device_count()))


def _card(index: int) -> Card:
    try:
        name = torch.cuda.get_device_name(index)
        copied, multiplied = speeds(f"cuda:{index}")
    except Exception as error:  # whatever it is, it is what this machine has to tell
        return Card(name=failed(error))
    return Card(name=name, copied_bytes_per_s=copied, multiplied_per_s=multiplied)


def speeds(device: str) -> tuple[float, float]:
    """Bytes per second from the host to `device`, and operations per second of a product there.

    Raises:
        RuntimeError: what came out is not what was copied, or not the product.
    """
    here = torch.ones(COPIED, pin_memory=device != "cpu")
    there = torch.empty(COPIED, device=device)
    copying = _seconds("a copy of ones", 1.0, lambda: there.copy_(here))
    ones = torch.ones(SIDE, SIDE, device=device)
    multiplying = _seconds("a product of ones", float(SIDE), lambda: ones @ ones)
    return 4 * COPIED / copying, 2 * SIDE**3 / multiplying


def _seconds(what: str, wanted: float, work: Callable[[], Tensor]) -> float:
    """Of the median round; the first, which looks for memory and kernels, does not count."""
    taken: list[float] = []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        least, most = (float(each) for each in work().aminmax())  # waits for the device
        taken.append(time.perf_counter() - began)
        if (least, most) != (wanted, wanted):
            raise RuntimeError(f"{what} must be {wanted:g} everywhere; it is {least:g} to {most:g}")
    return statistics.median(taken[1:])
