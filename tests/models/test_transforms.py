"""Readouts behind every neuron: nothing of the network changes."""

import pytest
import torch
from torch import nn

from pipeline.models.mlp import mlp
from pipeline.models.transforms import with_readouts
from pipeline.models.vgg import vgg_sws
from pipeline.spiking.local_learning import Readout
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear


@pytest.mark.parametrize("cells", [1, 2, (4, 2, 1)])
def test_the_network_is_as_it_was(cells):
    found = []
    for change in (lambda network: network, lambda network: with_readouts(network, 4, cells=cells)):
        torch.manual_seed(0)
        network = change(vgg_sws(4, in_channels=1, stages=((3, 5), (6,))))
        with torch.no_grad(), fresh_state(network):
            found.append((network(torch.ones(3, 2, 1, 8, 8)), network))
    (plain, before), (read, after) = found
    assert torch.equal(plain, read)
    readouts = [module for module in after.modules() if isinstance(module, Readout)]
    assert [readout.channels for readout in readouts] == [3, 5, 6]
    assert [readout.cells for readout in readouts] == list(
        cells if isinstance(cells, tuple) else (cells,) * 3
    )
    # The weights of the network are drawn first, so they do not know of the readouts.
    names = {name for name, _ in before.named_parameters()}
    assert all(
        torch.equal(value, dict(before.named_parameters())[n])
        for n, value in after.named_parameters()
        if n in names
    )
    assert len(list(after.parameters())) == len(names) + 2 * 3


def test_layers_without_an_image_have_one_place():
    network = with_readouts(mlp(4, in_features=6, hidden=(8, 7)), 4, cells=3)
    readouts = [module for module in network.modules() if isinstance(module, Readout)]
    assert [readout.linear.in_features for readout in readouts] == [8, 7]
    with torch.no_grad(), fresh_state(network):
        assert readouts[0].logits(network.layers[0](torch.ones(1, 2, 6))).shape == (1, 2, 4)  # type: ignore[index]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: with_readouts(mlp(4), 5),
            "with_readouts: classes must be those of the network; got 5, and 4 outputs",
        ),
        (
            lambda: with_readouts(mlp(4), 4, cells=(1, 1, 1)),
            (
                r"with_readouts: cells must be one number, or one for each of 2 neurons; got \[1,"
                r" 1, 1\]"
            ),
        ),
        (
            lambda: with_readouts(mlp(4, neuron=nn.ReLU()), 4),
            "with_readouts: the network must have LIF neurons; got MLP",
        ),
        (
            lambda: with_readouts(nn.Sequential(LIF(), Linear(2, 4)), 4),
            "with_readouts: a synapse must stand in front of each neuron; got none before 0",
        ),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
