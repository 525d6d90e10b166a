"""Plain torch over several ranks: gradients are summed, by one collective for all of a dtype."""

import pytest
import torch
from torch import Tensor, distributed, nn

from pipeline.train.backend import plain
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
    monkeypatch.setattr(plain, "world", lambda: (0, 2))
    monkeypatch.setattr(distributed, "broadcast", lambda tensor, src: None)
    monkeypatch.setattr(distributed, "all_reduce", doubled)
    Plain(joined, lambda model: torch.optim.SGD(model.parameters(), lr=0.1)).step()
    assert sorted(sizes) == [4 * 2 + 2, 3 * 4 + 4 + 2 * 2 + 2]
    assert all(
        torch.equal(one, other)
        for one, other in zip(alone.parameters(), joined.parameters(), strict=True)
    )
