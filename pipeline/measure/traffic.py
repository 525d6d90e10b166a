"""What a device has to do for one batch: operations on numbers, bytes that it moves, and how many
kernels it is asked for.

    with Traffic() as traffic: ...       # one batch
    traffic.busy(device, precision="bf16")

Of each operation that torch calls below autograd: the multiply-adds of a product, as if no number
were 0 (a GPU multiplies zeros, too), and the bytes of its inputs and outputs. By the roofline model
it takes the longer of both,

    seconds = sum over operations of max(flops / peak flops, bytes / peak bandwidth)

Nothing is known of caches, so what one kernel leaves to the next is read again; kernels that fuse
several operations do better.

Source: Williams, Waterman & Patterson 2009 (doi 10.1145/1498765.1498785) for the roofline.

What an instrument does where it is not meant to look: at a teacher's work, or an optimizer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True, kw_only=True)
class Device:
    """A card, as its data sheet has it."""

    name: str
    flops: Mapping[str, float]
    """dense, per second, by precision; a multiply-add is two"""
    bandwidth: float
    """of its memory, bytes per second"""
    memory: float
    """bytes"""
    link: float
    """to the other cards of its node, bytes per second and direction"""
    watts: float
    efficiency: float = 0.4
    """share of the roofline that training reaches: an assumption for a data sheet's figures"""
    launch: float = 5e-6
    """seconds from one kernel to the next, asked for by Python"""
    driver: str
    """its name as the driver, and so torch, tells it: another board, or another memory, has another
    one
    """
    source: str


@dataclass(frozen=True)
class Operation:
    """One kernel."""

    flops: int
    bytes: int


class Pausable:
    """A part of an instrument, which notes nothing while `is_paused`."""

    is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is noted."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False


class Traffic(Pausable, TorchDispatchMode):
    """Notes every operation while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.is_paused and not _moves_nothing(func):
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count is not None else 0
            self.operations.append(
                Operation(int(flops), _bytes(args) + _bytes(kwargs) + _bytes(result))
            )
        return result

    def busy(self, device: Device, *, precision: str) -> float:
        """Seconds by the roofline at an efficiency of 1."""
        peak = device.flops[precision]
        return sum(
            max(each.flops / peak, each.bytes / device.bandwidth) for each in self.operations
        )

    @property
    def flops(self) -> int:
        return sum(each.flops for each in self.operations)

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.operations)

    @property
    def kernels(self) -> int:
        return len(self.operations)


def _moves_nothing(func: Any) -> bool:
    """Views, and tensors that are asked about themselves."""
    if func.is_view or func.namespace == "prim":
        return True
    aten = torch.ops.aten
    return func.overloadpacket in (aten.detach, aten._unsafe_view, aten.as_strided_, aten.empty)


def _bytes(values: Any) -> int:
    """Of the numbers that are read or written: of a tensor that repeats some of its own, each
    once.
    """
    found = 0
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            own = value.numel()
            for size, stride in zip(value.shape, value.stride(), strict=True):
                if stride == 0 and size > 1:
                    own //= size
            found += own * value.element_size()
    return found
