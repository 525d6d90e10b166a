"""Copies of a batch's state: bit for bit, in memory of their own, and one kernel for all of a
dtype.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.train.backend.base import cloned


class Calls(TorchDispatchMode):
    """Counts the operations of torch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_clones_are_made_by_one_kernel_for_each_dtype() -> None:
    values: dict[str, Tensor] = {f"mean {index}": torch.randn(3, 4) for index in range(20)}
    values |= {f"batches {index}": torch.tensor(index) for index in range(20)}
    values["learnt"] = (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    )
    with Calls() as calls:
        clones = cloned(values)
    assert (
        calls.names["_foreach_copy_"] == 2 and not calls.names["clone"] and not calls.names["copy_"]
    )
    assert list(clones) == list(values)
    for name, value in values.items():
        assert torch.equal(clones[name], value) and clones[name].dtype == value.dtype
        assert (
            clones[name].stride() == value.stride() and clones[name].data_ptr() != value.data_ptr()
        )
        assert not clones[name].requires_grad
    assert cloned({}) == {}
