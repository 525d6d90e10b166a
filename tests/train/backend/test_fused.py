"""torch's fused optimizers, which a GPU uses, on a CPU: they can skip a step by a flag."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.spiking.synapse import Conv2d
from pipeline.train.backend.base import fuse, skipping
from pipeline.train.transfer import use_channels_last

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters, **how: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, **how),
    "AdamW": lambda parameters, **how: torch.optim.AdamW(parameters, lr=0.1, **how),
}


def moved(name: str, *, fused: bool, flags: list[float], late: int) -> list[torch.Tensor]:
    """Two parameters after steps, of which those with a flag of 1 are skipped. The second has its
    first gradient at step `late`.
    """
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    optimizer = OPTIMIZERS[name](parameters, fused=fused)
    assert fuse(optimizer) is fused
    for step, flag in enumerate(flags):
        for index, parameter in enumerate(parameters):
            has = index == 0 or step >= late
            parameter.grad = torch.full_like(parameter, step + 1.0) if has else None
        if fused:
            with skipping(optimizer, torch.tensor(flag)):
                optimizer.step()
        elif not flag:
            optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("flags", [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]], ids=str)
@pytest.mark.parametrize("late", [0, 2])
def test_a_flag_skips_a_step_and_gradients_may_come_late(
    name: str, flags: list[float], late: int
) -> None:
    """A step that is skipped leaves no trace, the first one neither."""
    about: Any = {"flags": flags, "late": late}
    for found, expected in zip(
        moved(name, fused=True, **about), moved(name, fused=False, **about), strict=True
    ):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_an_optimizer_without_a_flag_says_so() -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    assert not fuse(torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5, fused=True))
    assert not fuse(torch.optim.RMSprop(parameters))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_takes_the_weights_order_of_memory_and_the_way_of_this_device(name: str) -> None:
    """A checkpoint of a CPU is continued on a GPU."""
    networks = [Conv2d(3, 4, 3), Conv2d(3, 4, 3)]
    use_channels_last(networks[1])
    made = [
        OPTIMIZERS[name](network.parameters(), fused=fused)
        for network, fused in zip(networks, (False, True), strict=True)
    ]
    for optimizer in made:
        fuse(optimizer)
    for parameter in networks[0].parameters():
        parameter.grad = torch.randn_like(parameter)
    made[0].step()
    made[1].load_state_dict(made[0].state_dict())
    assert all(group["fused"] for group in made[1].param_groups)
    weights = [network.weight for network in networks]
    states = [optimizer.state[weight] for optimizer, weight in zip(made, weights, strict=True)]
    moments = [key for key, value in states[0].items() if value.shape == weights[0].shape]
    assert moments
    for key in moments:
        assert torch.equal(states[0][key], states[1][key])
        assert states[1][key].stride() == weights[1].stride() != weights[0].stride()
