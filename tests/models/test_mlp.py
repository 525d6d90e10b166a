import math

import torch
from torch import nn

from pipeline.models.mlp import mlp
from pipeline.spiking.neuron import LIF
from pipeline.spiking.rate import RateLIF, rate_weights
from tests.helpers.rule_networks import outputs, refusals


def test_against_an_independent_forward():
    model = mlp(3, in_features=8, hidden=(5, 4), neuron=LIF(0.25)).double()
    x = 3 * torch.randn(4, 2, 2, 2, 2, dtype=torch.float64)
    w = dict(model.named_parameters())
    v = [torch.zeros(2, n, dtype=torch.float64) for n in (5, 4)]
    logits = []
    for frame in x.flatten(2):
        h = frame
        for index, layer in enumerate(("layers.0", "layers.2")):
            u = 0.25 * v[index] + h @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
            h = (u >= 1).double()
            v[index] = u - h
        logits.append(h @ w["classifier.weight"].T + w["classifier.bias"])
    assert torch.allclose(outputs(model, x, grad=True), torch.stack(logits), atol=1e-12)


def test_leaky_rates_end_in_their_weighted_mean():
    model = mlp(3, in_features=8, hidden=(5,), neuron=RateLIF()).double()
    x = 10 * torch.rand(4, 2, 8, dtype=torch.float64)
    plain = outputs(nn.Sequential(model.layers, model.classifier), x)
    weighted = outputs(model, x).mean(0)
    expected = torch.einsum("t,tbk->bk", rate_weights(math.exp(-0.05), x), plain)
    assert torch.allclose(weighted, expected, atol=1e-12)
    assert not torch.allclose(weighted, plain.mean(0), atol=1e-4)


test_refuses = refusals(
    [({"hidden": (0,)}, r"MLP: hidden must be whole numbers >= 1; got hidden=\(0,\)")], mlp
)
