"""Seconds of one act by the host's clock; on a card, until it has done what it was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds_of(act: Callable[[], object], device: torch.device) -> float:
    settle(device)
    begun = time.perf_counter()
    act()
    settle(device)
    return time.perf_counter() - begun


def settle(device: torch.device) -> None:
    """Wait for what a card was asked for; on a CPU nothing is left to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
