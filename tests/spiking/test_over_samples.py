import re

import pytest
import torch
from torch import nn

from pipeline.spiking.carryover import record
from pipeline.spiking.neuron import IF, LIF
from pipeline.spiking.over_samples import OverSamples
from pipeline.spiking.plif import PLIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.surrogate import Sigmoid

NEURON = LIF(0.5, threshold=0.8, reset="zero", decay_input=True, surrogate=Sigmoid(3.0))


def run(neuron: nn.Module, *slices: torch.Tensor) -> torch.Tensor:
    with fresh_state(neuron):
        return torch.cat([neuron(each) for each in slices])


def test_it_is_the_lif_on_the_samples_one_after_another() -> None:
    x_TBC = 2 * torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v, expected = torch.zeros(5, dtype=torch.float64), []
    for t in range(3):
        for b in range(4):
            u = 0.5 * v + 0.5 * x_TBC[t, b]
            s = (u >= 0.8).double()
            v = u * (1 - s)
            expected.append(s)
    neuron = OverSamples.of(NEURON)
    assert torch.equal(run(neuron, x_TBC), torch.stack(expected).view(3, 4, 5))
    assert torch.equal(run(neuron, *x_TBC.split([1, 2])), run(neuron, x_TBC))
    assert torch.equal(run(neuron, x_TBC[:, :1]), run(NEURON, x_TBC[:, :1]))
    assert not torch.equal(run(neuron, x_TBC), run(NEURON, x_TBC))
    assert repr(neuron) == repr(NEURON).replace("LIF", "OverSamples")


def test_refuses_what_it_cannot_hold() -> None:
    for neuron in (PLIF(), nn.ReLU()):
        with pytest.raises(ValueError, match=re.escape(f"OverSamples: the neuron must be a LIF; got {type(neuron).__name__}")):
            OverSamples.of(neuron)
    with pytest.raises(ValueError, match="carry-over: a membrane must be one sample's; got OverSamples"):
        record(nn.Sequential(OverSamples.of(IF())), torch.zeros(2, 3, 4))
