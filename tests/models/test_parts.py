import math

import pytest
import torch
from torch import nn

from pipeline.models.mlp import mlp
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.parts import RELU_GAIN, SPIKE_GAIN, copy_neuron
from pipeline.models.vgg import vgg_sws
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state


def test_gains_restore_unit_variance():
    p = 0.5 * math.erfc(1 / math.sqrt(2))
    assert round(1 / math.sqrt(p * (1 - p)), 2) == SPIKE_GAIN
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (RELU_GAIN * x.relu()).var().item() == pytest.approx(1, abs=0.01)


def test_one_more_neuron_shares_nothing():
    prototype = LIF(0.25)
    copy = copy_neuron(prototype)
    assert copy.state is not prototype.state and copy.decay == 0.25


@pytest.mark.parametrize(
    "build",
    [
        lambda n: vgg_sws(stages=((4,), (4,)), neuron=n),
        lambda n: nf_resnet18_small(width=4, blocks=(1, 1), neuron=n),
        lambda n: mlp(in_features=3 * 8 * 8, neuron=n),
    ],
)
def test_the_ann_has_the_same_layers(build):
    spiking, ann = build(LIF()), build(nn.ReLU())
    assert {k: v.shape for k, v in spiking.state_dict().items()} == {
        k: v.shape for k, v in ann.state_dict().items()
    }
    x = torch.randn(2, 3, 3, 8, 8)
    with fresh_state(ann):
        together = ann(x)
        assert torch.allclose(together[1], ann(x[1:])[0], atol=1e-6)  # no memory anywhere
    assert sum(isinstance(m, nn.ReLU) for m in ann.modules()) == sum(
        isinstance(m, LIF) for m in spiking.modules()
    )
