"""What training holds between two batches, each kind apart: bytes on one worker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """Bytes of distinct storages."""

    parameters: int
    buffers: int
    gradients: int
    """while a batch is differentiated: of every parameter that learns"""
    optimizer: int
    """what it keeps of the parameters: momentum and the like; under ZeRO of this worker's share of
    them
    """

    @property
    def total(self) -> int:
        return self.parameters + self.buffers + self.gradients + self.optimizer


def held_bytes(network: nn.Module, optimizer: torch.optim.Optimizer) -> HeldBytes:
    """After the optimizer's first step; before it, it keeps nothing."""
    learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
    kept = (
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return HeldBytes(
        parameters=bytes_of(network.parameters()),
        buffers=bytes_of(network.buffers()),
        gradients=sum(parameter.numel() * parameter.element_size() for parameter in learnt),
        optimizer=bytes_of(kept),
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each whole and once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
