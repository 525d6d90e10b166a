import pytest
import torch
from torch.nn import functional as F

from pipeline.models.vgg import vgg_sws
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.surrogate import Sigmoid


def test_parameter_count():
    with torch.device("meta"):
        assert sum(p.numel() for p in vgg_sws().parameters()) == 9_228_362


def test_against_an_independent_forward():
    torch.manual_seed(0)
    model = vgg_sws(4, in_channels=2, stages=((3, 5), (6,))).double()
    x_BCHW = 3 * torch.randn(2, 2, 8, 8, dtype=torch.float64)
    names = ["stages.0.0", "stages.0.1", "stages.1.0"]
    p = dict(model.named_parameters())
    membranes = dict.fromkeys(names, 0.0)
    expected = []
    for _ in range(3):
        h = x_BCHW
        for name in names:
            if name == "stages.1.0":
                h = F.avg_pool2d(h, 2)
            w = p[f"{name}.conv.weight"]
            scale = torch.sqrt(w.var((1, 2, 3), keepdim=True) * w[0].numel() + 1e-4)
            w = p[f"{name}.conv.gain"] * (w - w.mean((1, 2, 3), keepdim=True)) / scale
            u = 0.5 * membranes[name] + F.conv2d(h, w, p[f"{name}.conv.bias"], padding=1)
            s = (u >= 1).double()
            membranes[name] = u - s
            h = 2.74 * s
        expected.append(F.linear(h.mean((2, 3)), p["classifier.weight"], p["classifier.bias"]))
    with torch.no_grad(), fresh_state(model):
        got = model(repeat(x_BCHW, 3))
    assert got.abs().max() > 1e-3
    assert torch.allclose(got, torch.stack(expected), atol=1e-12)


def test_start_of_the_classifier():
    torch.manual_seed(0)
    weight = vgg_sws().classifier.weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_neuron_arguments_reach_every_neuron():
    with torch.device("meta"):
        model = vgg_sws(neuron=LIF(0.25, threshold=0.5, reset="zero", reset_gradient="kept", surrogate=Sigmoid()))
    neurons = [m for m in model.modules() if isinstance(m, LIF)]
    assert len(neurons) == 8
    assert {(n.leak, n.threshold, n.reset, n.reset_gradient, n.surrogate) for n in neurons} == {
        (0.25, 0.5, "zero", "kept", Sigmoid())
    }


def test_refuses():
    with pytest.raises(ValueError, match=r"VGG: each stage must hold at least one width >= 1; got stages=\(\(4,\), \(\)\)"):
        vgg_sws(stages=((4,), ()))
    with pytest.raises(ValueError, match=r"VGG: classes and in_channels must be >= 1; got classes=0, in_channels=3"):
        vgg_sws(0)
    model = vgg_sws(stages=((2,), (2,), (2,)))
    with fresh_state(model), pytest.raises(ValueError, match=r"VGG: 3 stages, .* need 4 pixels a side; got \(3, 8\)"):
        model(torch.zeros(1, 1, 3, 3, 8))
