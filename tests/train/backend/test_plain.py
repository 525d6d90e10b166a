"""Tensors of a dtype together: gradients are summed by one collective, and one kernel copies a
batch's state, bit for bit, to memory of its own.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.train.backend import plain
from pipeline.train.backend.base import clone_tensors
from pipeline.train.backend.plain import Plain


def network() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    made[1].to(torch.float64)
    return made


def test_gradients_are_summed_by_one_collective_for_each_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two ranks that compute the same; one layer is without a gradient."""
    sizes: list[int] = []

    def doubled(tensor: Tensor) -> None:
        sizes.append(tensor.numel())
        tensor.mul_(2)

    alone, joined = network(), network()
    for made in (alone, joined):
        for parameter in (*made[0].parameters(), *made[1].parameters()):  # type: ignore[index]
            parameter.grad = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            ).to(parameter)
    Plain(alone, lambda model: torch.optim.SGD(model.parameters(), lr=0.2)).step()
    monkeypatch.setattr(plain, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, src: None)
    monkeypatch.setattr(distributed, "all_reduce", doubled)
    Plain(joined, lambda model: torch.optim.SGD(model.parameters(), lr=0.1)).step()
    assert sorted(sizes) == [4 * 2 + 2, 3 * 4 + 4 + 2 * 2 + 2]
    assert all(
        torch.equal(one, other)
        for one, other in zip(alone.parameters(), joined.parameters(), strict=True)
    )


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
        clones = clone_tensors(values)
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
    assert clone_tensors({}) == {}
