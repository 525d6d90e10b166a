"""The work of one batch on a device: floating-point operations, moved bytes, and kernels.

    with Traffic() as traffic: ...       # one batch
    traffic.flops, traffic.bytes, traffic.kernels

For each operation that torch calls below autograd this counts the multiply-adds of a product, zeros
included (a GPU multiplies them), and the bytes of inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Operation:
    """One kernel."""

    flops: int
    bytes: int


class Pausable:
    """Base of instruments that ignore the work of a teacher or an optimizer."""

    is_paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is recorded."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False


class Traffic(Pausable, TorchDispatchMode):
    """Records every operation while it is entered."""

    def __init__(self, operations: Iterable[Operation] = ()) -> None:
        super().__init__()
        self.operations = list(operations)

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
            moved = _bytes(args) + _bytes(kwargs) + _bytes(result)
            self.operations.append(Operation(int(flops), moved))
        return result

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
    """Whether an operation is a view or a query of a tensor's properties."""
    if func.is_view or func.namespace == "prim":
        return True
    aten = torch.ops.aten
    return func.overloadpacket in (aten.detach, aten._unsafe_view, aten.as_strided_, aten.empty)


def _bytes(values: Any) -> int:
    """Bytes of the numbers that are read or written; an expanded tensor's numbers count once."""
    found = 0
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            own = value.numel()
            for size, stride in zip(value.shape, value.stride(), strict=True):
                if stride == 0 and size > 1:
                    own //= size
            found += own * value.element_size()
    return found
