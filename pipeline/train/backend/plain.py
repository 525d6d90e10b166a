"""Plain torch without DeepSpeed, on any number of ranks. It is the reference for DeepSpeed in
tests, and serves for debugging.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from pipeline.core.torch_settings import Precision, autocast
from pipeline.train.backend.base import (
    Backend,
    OptimizerOf,
    cpu_copy,
    fuse,
    group_by_dtype_and_device,
    optimizer_reset,
    skipping,
)
from pipeline.train.backend.collectives import rank_and_world_size

STATE_FILE = "state.pt"


class _Autocast(nn.Module):
    """The network in the recipe's precision. It is a module, so `fresh_state` finds the neurons."""

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.network = network
        self.precision: Precision = precision

    def forward(self, x_TB: Tensor) -> Tensor:
        with autocast(x_TB.device, self.precision):
            return self.network(x_TB)


class Plain(Backend):
    """A `Backend` in plain torch. The process group must exist if there are several ranks."""

    name = "plain"

    def __init__(
        self,
        network: nn.Module,
        optimizer_of: OptimizerOf,
        *,
        precision: Precision = "fp32",
        clip_norm: float = 0.0,
    ) -> None:
        self.network = network
        self.model = _Autocast(network, precision)
        self.optimizer = optimizer_of(network)
        self.skips_on_device = fuse(self.optimizer)
        self.reset_optimizer = optimizer_reset(self.optimizer)
        self.clip_norm = clip_norm
        self.rank, self.world_size = rank_and_world_size()
        if self.world_size > 1:
            for tensor in (*network.parameters(), *network.buffers()):
                distributed.broadcast(tensor.detach(), src=0)

    def backward(self, loss: Tensor, share: float) -> None:
        (loss * share).backward()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.network.parameters() if p.grad is not None]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, bad: Tensor | bool = False) -> None:
        if bad is True:
            self.zero_grad()
            return
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        if self.world_size > 1:
            for p in parameters:  # every rank must sum the same parameters
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            _sum_over_ranks([p.grad for p in parameters if p.grad is not None])
        if self.clip_norm > 0:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        with skipping(self.optimizer, bad):
            self.optimizer.step()
        self.zero_grad()

    def capture(self) -> dict[str, Any]:
        if self.rank > 0:
            return {}
        return {
            STATE_FILE: cpu_copy(
                {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
            )
        }

    def load(self, folder: Path) -> None:
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


def _sum_over_ranks(tensors: list[Tensor]) -> None:
    """Sum each tensor over ranks, in place. One collective sums all tensors of a dtype."""
    for indices in group_by_dtype_and_device(dict(enumerate(tensors))):
        group = [tensors[index] for index in indices]
        flat = torch.cat([tensor.flatten() for tensor in group])
        distributed.all_reduce(flat)
        sums = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(
            group, [total.view_as(tensor) for total, tensor in zip(sums, group, strict=True)]
        )
