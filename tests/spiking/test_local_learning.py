"""Readouts, the scalar that carries signals, and the paths that gradients may take."""

import pytest
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


def test_a_readout_is_the_identity_in_a_network_and_reads_averaged_places():
    readout, s_TBCHW = Readout(3, 4, cells=2), (torch.rand(2, 5, 3, 6, 6) < 0.3).float()
    assert readout(s_TBCHW) is s_TBCHW
    mean_TBF = s_TBCHW.unflatten(-1, (2, 3)).unflatten(-3, (2, 3)).mean((-1, -3)).flatten(2)
    assert torch.allclose(readout.logits(s_TBCHW), readout.linear(mean_TBF), atol=1e-6)
    assert Readout(3, 4).logits(torch.ones(2, 5, 3)).shape == (2, 5, 4)


def test_a_readout_refuses_what_it_cannot_read():
    with pytest.raises(
        ValueError, match="Readout: classes must be a whole number >= 1; got classes=0"
    ):
        Readout(3, 0)
    with pytest.raises(
        ValueError, match=r"Readout: needs 3 channels on 2 x 2 places; got shape \(1, 1, 2, 6, 6\)"
    ):
        Readout(3, 4, cells=2).logits(torch.zeros(1, 1, 2, 6, 6))


def test_the_scalar_has_the_loss_as_value_and_the_signals_as_gradient():
    ends = [torch.randn(2, 3, requires_grad=True), torch.randn(4, requires_grad=True)]
    signals = [torch.randn(2, 3), torch.randn(4)]
    loss = torch.tensor(0.7, requires_grad=True)
    scalar = inject_gradients(loss, ends, signals)
    assert scalar.item() == loss.item()
    (3 * scalar).backward()
    assert all(torch.equal(end.grad, 3 * signal) for end, signal in zip(ends, signals, strict=True))  # type: ignore[arg-type]
    assert loss.grad is None


def test_a_closed_seam_is_the_plain_neuron_with_its_graph():
    x_TB = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for seam in (None, LocalGradient(scale=0.2, inject="spikes", distribution="gaussian")):
        neuron = LIF(reset_gradient="kept")
        neuron.gradient = seam
        with fresh_state(neuron):
            s_TB = torch.cat([neuron(x_TB[:2]), neuron(x_TB[2:])])
        found.append((s_TB, *torch.autograd.grad(s_TB.cumsum(0).sum(), x_TB)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_neuron_that_was_not_run_is_missed():
    seam = LocalGradient(scale=0.2, inject="spikes", distribution="gaussian")
    neuron = LIF()
    neuron.gradient = seam
    with (
        fresh_state(neuron),
        pytest.raises(
            ValueError, match=r"run every neuron at every time step; got one without spikes"
        ),
    ):
        seam.recorded("spikes")


def test_streams_are_refused_by_name():
    model = nn.ModuleDict({"a": Linear(2, 2), "b": Linear(2, 2), "c": Conv2d(1, 1, 1)})
    x_TBC = torch.ones(1, 1, 2)
    a, b = model["a"](x_TBC), model["b"](x_TBC)
    refuse_skip_connections("X", model, {"one": a * 2, "two": b, "none": x_TBC})
    with pytest.raises(
        ValueError, match=r"^X: a stream .* got a\.(weight|bias) with a path to one and to two$"
    ):
        refuse_skip_connections("X", model, {"one": a * 2, "two": a + b})


def test_the_first_parameter_of_a_stream_is_named_each_time():
    layers = nn.Sequential(*(Linear(2, 2) for _ in range(8)))
    value = layers(torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match=r"got 0\.weight with a path"):
        refuse_skip_connections("X", layers, {"one": value * 2, "two": value + 1})
