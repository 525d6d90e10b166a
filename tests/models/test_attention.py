"""Every attention at one time step against sums over pairs of tokens, written out."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.attention import (
    Attention,
    ChannelMask,
    OverSamples,
    SelfAttention,
    TokenQK,
)
from pipeline.models.residual import BlockFactory
from pipeline.spiking.neuron import LIF, PLIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.surrogate import Sigmoid
from tests.helpers.families import spike
from tests.helpers.rule_networks import outputs, refusals

HEADS, CHANNELS = 2, 6


def lively(attention: Attention) -> Attention:
    for module in attention.modules():
        if isinstance(module, BatchNorm):
            for tensor, low, high in (
                (module.weight, 1, 3),
                (module.bias, 0.5, 1.5),
                (module.running_mean, -0.5, 0.5),
            ):
                nn.init.uniform_(tensor, low, high)
    return attention.double().eval()


def currents(layer: nn.Module, x_BCN: Tensor) -> Tensor:
    synapse: Any = layer.synapse
    norm: Any = layer.norm
    y_BCN = torch.einsum("oc,bcn->bon", synapse.weight[:, :, 0, 0], x_BCN)
    y_BCN = y_BCN if synapse.bias is None else y_BCN + synapse.bias[:, None]
    gain_C = norm.weight / (norm.running_var + norm.eps) ** 0.5
    return gain_C[:, None] * (y_BCN - norm.running_mean[:, None]) + norm.bias[:, None]


def by_hand(attention: Attention, shortcut: str, x_BCN: Tensor) -> Tensor:
    h_BCN = x_BCN if shortcut == "sew" else spike(x_BCN)
    stream = x_BCN if shortcut == "multiple_all" else 0
    found = {
        name: spike(currents(each.currents, h_BCN) + stream)
        for name, each in attention.projections.items()
    }  # type: ignore[arg-type]
    heads = {name: s_BCN.unflatten(1, (HEADS, -1)) for name, s_BCN in found.items()}
    a = torch.zeros_like(heads["q"])
    for n in range(x_BCN.shape[-1]):
        q, k = heads["q"][..., n], heads["k"]
        if isinstance(attention, TokenQK):
            a[..., n] = spike(q.sum(-1, keepdim=True), 0.5) * k[..., n]
        elif isinstance(attention, ChannelMask):
            a[..., n] = spike((k * heads["v"]).sum(-1), 0.5) * q
        else:
            a[..., n] = sum(
                0.125 * (q * k[..., m]).sum(-1, keepdim=True) * heads["v"][..., m]
                for m in range(x_BCN.shape[-1])
            )
    a_BCN = a.flatten(1, 2)
    s_BCN = spike(a_BCN, 0.5) if isinstance(attention, SelfAttention) else a_BCN
    y_BCN = currents(attention.project, s_BCN)
    if shortcut == "sew":
        return spike(y_BCN)
    return y_BCN + a_BCN if shortcut == "multiple_all" else y_BCN


@pytest.mark.parametrize(
    "kind", [partial(TokenQK, heads=HEADS), partial(SelfAttention, heads=HEADS), ChannelMask]
)
@pytest.mark.parametrize("shortcut", ["sew", "membrane", "multiple", "multiple_all"])
@torch.no_grad()
def test_its_form(kind, shortcut):
    factory = BlockFactory(shortcut=shortcut, neuron=LIF(0.5))
    attention = lively(kind(factory, CHANNELS))
    x_BCHW = 2 * torch.randn(3, CHANNELS, 3, 2, dtype=torch.float64)
    x_BCHW = spike(x_BCHW) if shortcut == "sew" else x_BCHW
    expected = by_hand(attention, shortcut, x_BCHW.flatten(2)).unflatten(2, (3, 2))
    assert expected.std() > 0.1
    assert (outputs(attention, x_BCHW[None])[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("kind", "step"), [(TokenQK, 1.0), (SelfAttention, 0.125)])
@pytest.mark.parametrize("shortcut", ["multiple", "multiple_all"])
def test_a_silent_last_norm_leaves_what_the_last_shortcut_carries(kind, step, shortcut):
    """As blocks start: nothing, but under "multiple_all" the spikes that TokenQK masks, and the
    sums of SelfAttention.
    """
    factory = BlockFactory(shortcut=shortcut, neuron=LIF(0.5))
    x_TBCHW = 2 * torch.randn(1, 3, CHANNELS, 4, 4)
    y_TBCHW = outputs(kind(factory, CHANNELS, heads=HEADS), x_TBCHW)
    assert bool(y_TBCHW.any()) == (shortcut == "multiple_all")
    assert torch.equal(y_TBCHW % step, torch.zeros_like(y_TBCHW)) and y_TBCHW.min() >= 0


NEURON = LIF(
    0.5,
    threshold=0.8,
    comparison=">",
    reset="zero",
    scale_input=True,
    surrogate=Sigmoid(3.0),
)


def test_a_neuron_over_samples_is_the_lif_on_the_samples_one_after_another() -> None:
    x_TBC, neuron = 2 * torch.randn(3, 4, 5, dtype=torch.float64), OverSamples.of(NEURON)
    v, expected = torch.zeros(5, dtype=torch.float64), []
    for x_C in x_TBC.flatten(0, 1):
        u = 0.5 * v + 0.5 * x_C
        s = (u >= 0.8).double()
        v = u * (1 - s)
        expected.append(s)
    whole_TBC = outputs(neuron, x_TBC)
    assert torch.equal(whole_TBC, torch.stack(expected).view(3, 4, 5))
    assert torch.equal(outputs(neuron, *x_TBC.split([1, 2])), whole_TBC)
    assert torch.equal(outputs(neuron, x_TBC[:, :1]), outputs(NEURON, x_TBC[:, :1]))
    assert not torch.equal(whole_TBC, outputs(NEURON, x_TBC))
    assert repr(neuron) == repr(NEURON).replace("LIF", "OverSamples")


test_refuses = refusals(
    [
        (lambda: OverSamples.of(PLIF()), "OverSamples: the neuron must be a LIF; got PLIF"),
        (lambda: OverSamples.of(nn.ReLU()), "OverSamples: the neuron must be a LIF; got ReLU"),
    ]
)
