"""Readouts, the scalar that carries signals, and the paths that gradients may take."""

from typing import Any

import torch
from torch import nn

from pipeline.spiking.local_learning import (
    LocalGradient,
    Readout,
    inject_gradients,
    refuse_skip_connections,
)
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Conv2d, Linear
from tests.helpers.rule_networks import outputs, refusals


def test_a_readout_is_the_identity_in_a_network_and_reads_averaged_places():
    readout, s_TBCHW = Readout(3, 4, cells=2), (torch.rand(2, 5, 3, 6, 6) < 0.3).float()
    assert readout(s_TBCHW) is s_TBCHW
    mean_TBF = s_TBCHW.unflatten(-1, (2, 3)).unflatten(-3, (2, 3)).mean((-1, -3)).flatten(2)
    assert torch.allclose(readout.logits(s_TBCHW), readout.linear(mean_TBF), atol=1e-6)
    assert Readout(3, 4).logits(torch.ones(2, 5, 3)).shape == (2, 5, 4)


def test_the_scalar_has_the_loss_as_value_and_the_signals_as_gradient():
    ends = [torch.randn(2, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    signals = [torch.randn(2, 3), torch.randn(4)]
    loss = torch.tensor(0.7, requires_grad=True)
    scalar = inject_gradients(loss, ends, signals)
    assert scalar.item() == loss.item()
    (3 * scalar).backward()
    gradients: Any = [end.grad for end in ends]
    assert all(map(torch.equal, gradients, [3 * signal for signal in signals]))
    assert loss.grad is None


def test_a_closed_seam_is_the_plain_neuron_with_its_graph():
    x_TB = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for seam in (None, LocalGradient(**SEAM)):
        neuron = LIF(reset_gradient="kept")
        neuron.custom_forward = seam
        s_TB = outputs(neuron, *x_TB.split([2, 3]), grad=True)
        found.append((s_TB, *torch.autograd.grad(s_TB.cumsum(0).sum(), x_TB)))
    assert all(map(torch.equal, *found))


SEAM = {"scale": 0.2, "inject": "spikes", "distribution": "gaussian"}
MODEL = nn.ModuleDict({"a": Linear(2, 2), "b": Linear(2, 2), "c": Conv2d(1, 1, 1)})
ONES = torch.ones(1, 1, 2)


def test_layers_in_a_row_are_no_stream():
    a, b = MODEL["a"](ONES), MODEL["b"](ONES)
    refuse_skip_connections("X", MODEL, {"one": a * 2, "two": b, "none": ONES})


def one_stream(layers: nn.Module, first: nn.Module) -> None:
    value = first(ONES)
    refuse_skip_connections("X", layers, {"one": value * 2, "two": value + MODEL["b"](ONES)})


def a_neuron_that_was_not_run() -> None:
    neuron, seam = LIF(), LocalGradient(**SEAM)
    neuron.custom_forward = seam
    with fresh_state(neuron):
        seam.recorded("spikes")


DEEP = nn.Sequential(*(Linear(2, 2) for _ in range(8)))
test_refuses = refusals(
    [
        (lambda: Readout(3, 0), "Readout: classes must be a whole number >= 1; got classes=0"),
        (
            lambda: Readout(3, 4, cells=2).logits(torch.zeros(1, 1, 2, 6, 6)),
            r"the spikes must have 3 channels, .* got shape \(1, 1, 2, 6, 6\) with cells=2",
        ),
        (
            a_neuron_that_was_not_run,
            r"run every neuron at every time step; got a neuron that has no recorded spikes",
        ),
        (
            lambda: one_stream(MODEL, MODEL["a"]),
            r"^X: the model must not have skip connections .* got a\.(weight|bias) with a path to"
            r" one and to two$",
        ),
        (lambda: one_stream(DEEP, DEEP), r"got 0\.weight with a path"),
    ]
)
