"""What a GPU has used, in joules, by its own counter (NVML): measured, beside the estimate of
measure/energy.py.

The counter is the whole card's, idle power and whoever else computes on it included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pynvml
import torch


class Joules:
    """Counts on one device; `read` is None where nothing answers: a CPU, a card before Volta."""

    def __init__(self, device: torch.device) -> None:
        self.card = (
            f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""
        )
        """its UUID, whatever numbers a process has for its cards; empty for a CPU"""
        self._handle = _found(self.card) if self.card else None

    def read(self) -> float | None:
        """Joules since the driver was loaded."""
        if self._handle is None:
            return None
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3  # in mJ
        except pynvml.NVMLError:  # a driver that stumbles must not end a training
            return None


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What the counter of one rank's card stood at when its share of an evaluation began, and when
    it ended, in joules.
    """

    card: str
    samples: int
    began: float | None
    ended: float | None


def inference_j(ranks: Iterable[Readings]) -> float | None:
    """Of one sample, over all ranks that had some: what their cards used while they evaluated, over
    all of their samples.

    It is the whole card's energy over the evaluation's wall time: its idle power and its waits for
    data are in it, those for slower ranks are not. Launch gives each worker a card of its own; one
    that several ranks share counts once, from the first of them that began to the last that ended.

    None: a card did not tell, or its counter, which moves in steps, stood still, as it may in a
    very short evaluation."""
    spans: dict[str, tuple[float, float]] = {}
    samples = 0
    for rank in ranks:
        if not rank.samples:
            continue
        if rank.began is None or rank.ended is None:
            return None
        began, ended = spans.get(rank.card, (rank.began, rank.ended))
        spans[rank.card] = min(began, rank.began), max(ended, rank.ended)
        samples += rank.samples
    used = [ended - began for began, ended in spans.values()]
    return sum(used) / samples if used and min(used) > 0 else None


def _found(card: str) -> Any:
    """NVML's handle of the card, found by its UUID, as CUDA's numbers are of the visible ones
    alone; None without a counter.
    """
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(card)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return handle
