"""What a GPU has used, in joules, by its own counter (NVML): measured, beside the estimate of measure/energy.py.

The counter is the whole card's, idle power and whoever else computes on it included.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch


class Joules:
    """Counts on one device; `read` is None where nothing answers: a CPU, no `nvidia-ml-py`, a card before Volta."""

    def __init__(self, device: torch.device) -> None:
        self._nvml, self._card = _card(device) if device.type == "cuda" else (None, None)

    def read(self) -> float | None:
        """Joules since the driver was loaded."""
        if self._nvml is None:
            return None
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._card) / 1e3  # in mJ
        except self._nvml.NVMLError:  # a driver that stumbles must not end a training
            return None


def _card(device: torch.device) -> tuple[Any, Any]:
    """NVML and its name of the card, found by its UUID: CUDA's numbers are of the visible ones alone."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, None
    try:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(card)
    except nvml.NVMLError:
        return None, None
    return nvml, card
