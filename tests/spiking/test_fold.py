"""The norm behind a synapse is found by who hears it, not by its place, and takes a scale over
without a change of the output.
"""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.spiking.binary import fold, following_norms
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.rule_networks import Network

X_TBC = torch.zeros(2, 1, 4)


def two(forward_of) -> Network:
    """Two synapses and two norms, put together by `forward_of`."""
    synapses = {"one": Linear(4, 4), "other": Linear(4, 4)}
    norms = {"norm": BatchNorm(4), "norm2": BatchNorm(4)}
    return Network(forward_of, **synapses, **norms, neuron=LIF())


def found(forward_of) -> dict[str, str]:
    model = two(forward_of)
    return following_norms(model, {"one": model.one, "other": model.other}, X_TBC)


def heard_twice(m: Any, x_TBC: Tensor) -> Tensor:
    current_TBC = m.one(x_TBC)
    return m.norm(current_TBC) + current_TBC


def counted_by_a_condition(m: Any, x_TBC: Tensor) -> Tensor:
    current_TBC = m.one(x_TBC)
    return m.norm(current_TBC) if current_TBC.sum() < 1e9 else x_TBC


def by_a_neuron_too(m: Any, x_TBC: Tensor) -> Tensor:
    current_TBC = m.one(x_TBC)
    return m.norm(current_TBC) + m.neuron(current_TBC)


@pytest.mark.parametrize(
    ("forward_of", "expected"),
    [
        (
            lambda m, x: m.norm2(m.other(m.neuron(m.norm(m.one(x))))),
            {"one": "norm", "other": "norm2"},
        ),
        (
            lambda m, x: m.norm(m.other(m.norm2(m.one(x)))),
            {"one": "norm2", "other": "norm"},
        ),  # not by registration
        (lambda m, x: m.norm(nn.Identity()(m.one(x))), {"one": "norm"}),
        (lambda m, x: torch.cat([m.norm(m.one(x_1BC)) for x_1BC in x.split(1)]), {"one": "norm"}),
        (lambda m, x: m.norm(m.one(x)) + m.norm(m.other(x)), {}),  # one norm of two synapses
        (
            lambda m, x: m.norm(m.one(x)) + m.norm2(m.one(x)),
            {},
        ),  # each hears this synapse alone, but not all of it
        (lambda m, x: m.norm(m.one(x)) + m.norm(x), {}),
        (lambda m, x: m.norm(2 * m.one(x)), {}),
        (lambda m, x: m.norm(m.one(x) + m.other(x)), {}),
        (heard_twice, {}),
        (counted_by_a_condition, {}),
        (by_a_neuron_too, {}),
    ],
)
def test_only_a_norm_that_hears_all_and_nothing_else(forward_of, expected):
    assert found(forward_of) == expected


def test_the_network_is_as_before():
    model = two(lambda m, x: m.norm(m.one(x)))
    before = copy.deepcopy(model.state_dict())
    following_norms(model, {"one": model.one}, X_TBC)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("build", "shape"), [(Linear, ()), (partial(Conv2d, kernel_size=3), (6, 6))]
)
def test_a_folded_scale_changes_nothing(build, shape, bias):
    synapse, norm = build(5, 4, bias=bias).double(), BatchNorm(4).double().eval()
    for values in (norm.weight.data, norm.bias.data, norm.running_mean):
        values.normal_()
    norm.running_var.uniform_(0.1, 2)
    a_O = torch.rand(4, dtype=torch.float64) * 0.1 + 0.01
    x_TB = torch.randn(2, 3, 5, *shape, dtype=torch.float64)
    scaled = a_O.view(-1, *[1] * (synapse.weight.dim() - 1)) * synapse.weight
    expected = norm(synapse(x_TB, scaled))
    fold(a_O, synapse.bias, norm)
    assert torch.allclose(norm(synapse(x_TB)), expected, atol=1e-12)
