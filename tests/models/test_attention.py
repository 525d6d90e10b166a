"""Both attentions at one time step against sums over pairs of tokens, written out."""

import re

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.attention import Attention, OverSamples, SelfAttention, TokenQK
from pipeline.models.residual import BlockFactory
from pipeline.spiking.neuron import LIF, PLIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state
from pipeline.spiking.surrogate import Sigmoid
from tests.helpers.rule_networks import outputs

HEADS, CHANNELS = 2, 6


def spike(x: Tensor, threshold: float = 1.0) -> Tensor:
    """A neuron at its first time step."""
    return (x >= threshold).to(x.dtype)


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
    """1x1 synapse and norm."""
    synapse, norm = layer.synapse, layer.norm
    y_BCN = torch.einsum("oc,bcn->bon", synapse.weight[:, :, 0, 0], x_BCN)  # type: ignore[index]
    y_BCN = y_BCN if synapse.bias is None else y_BCN + synapse.bias[:, None]  # type: ignore[index]
    gain_C = norm.weight / (norm.running_var + norm.eps) ** 0.5  # type: ignore[operator]
    return gain_C[:, None] * (y_BCN - norm.running_mean[:, None]) + norm.bias[:, None]  # type: ignore[index]


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
        else:
            a[..., n] = sum(
                0.125 * (q * k[..., m]).sum(-1, keepdim=True) * heads["v"][..., m]
                for m in range(x_BCN.shape[-1])
            )
    a_BCN = a.flatten(1, 2)
    y_BCN = currents(
        attention.project, a_BCN if isinstance(attention, TokenQK) else spike(a_BCN, 0.5)
    )
    if shortcut == "sew":
        return spike(y_BCN)
    return y_BCN + a_BCN if shortcut == "multiple_all" else y_BCN


@pytest.mark.parametrize("kind", [TokenQK, SelfAttention])
@pytest.mark.parametrize("shortcut", ["sew", "membrane", "multiple", "multiple_all"])
def test_its_form(kind, shortcut):
    attention = lively(
        kind(BlockFactory(shortcut=shortcut, neuron=LIF(0.5)), CHANNELS, heads=HEADS)
    )
    x_BCHW = 2 * torch.randn(3, CHANNELS, 3, 2, dtype=torch.float64)
    x_BCHW = spike(x_BCHW) if shortcut == "sew" else x_BCHW
    with torch.no_grad():
        got = outputs(attention, x_BCHW[None], grad=True)[0]
        expected = by_hand(attention, shortcut, x_BCHW.flatten(2)).unflatten(2, (3, 2))
    assert expected.std() > 0.1
    assert (got - expected).abs().max() < 1e-12


def test_a_silent_last_norm_leaves_what_the_last_shortcut_carries():
    """As blocks start: nothing, but under "multiple_all" the spikes that TokenQK masks, and the
    sums of SelfAttention.
    """
    x_TBCHW = 2 * torch.randn(1, 3, CHANNELS, 4, 4)
    for kind, step in ((TokenQK, 1.0), (SelfAttention, 0.125)):
        for shortcut in ("multiple", "multiple_all"):
            attention = kind(
                BlockFactory(shortcut=shortcut, neuron=LIF(0.5)), CHANNELS, heads=HEADS
            )
            y_TBCHW = outputs(attention, x_TBCHW)
            assert bool(y_TBCHW.any()) == (shortcut == "multiple_all")
            assert torch.equal(y_TBCHW % step, torch.zeros_like(y_TBCHW)) and y_TBCHW.min() >= 0


NEURON = LIF(0.5, threshold=0.8, reset="zero", scale_input=True, surrogate=Sigmoid(3.0))


def run_slices(neuron: nn.Module, *slices: torch.Tensor) -> torch.Tensor:
    with fresh_state(neuron):
        return torch.cat([neuron(each) for each in slices])


def test_a_neuron_over_samples_is_the_lif_on_the_samples_one_after_another() -> None:
    x_TBC = 2 * torch.randn(
        3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    v, expected = torch.zeros(5, dtype=torch.float64), []
    for t in range(3):
        for b in range(4):
            u = 0.5 * v + 0.5 * x_TBC[t, b]
            s = (u >= 0.8).double()
            v = u * (1 - s)
            expected.append(s)
    neuron = OverSamples.of(NEURON)
    assert torch.equal(run_slices(neuron, x_TBC), torch.stack(expected).view(3, 4, 5))
    assert torch.equal(run_slices(neuron, *x_TBC.split([1, 2])), run_slices(neuron, x_TBC))
    assert torch.equal(run_slices(neuron, x_TBC[:, :1]), run_slices(NEURON, x_TBC[:, :1]))
    assert not torch.equal(run_slices(neuron, x_TBC), run_slices(NEURON, x_TBC))
    assert repr(neuron) == repr(NEURON).replace("LIF", "OverSamples")


def test_over_samples_refuses_other_neurons() -> None:
    for neuron in (PLIF(), nn.ReLU()):
        with pytest.raises(
            ValueError,
            match=re.escape(f"OverSamples: the neuron must be a LIF; got {type(neuron).__name__}"),
        ):
            OverSamples.of(neuron)
