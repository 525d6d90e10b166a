import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.models.feedback import (
    alexnet_f,
    cifarnet_f,
    conv_feedback,
    convnet_f,
    fc_feedback,
    lenet_f,
)
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.ide import IDE
from pipeline.rules.spide import SPIDE
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.encode import repeat
from pipeline.spiking.norm_limit import FrobeniusLimit, SpectralLimit
from pipeline.spiking.synapse import Linear
from tests.helpers.rule_networks import cross_entropy, learn, refusals


def rate_by_hand(current_BC, W, *, steps: int, mask_BC) -> torch.Tensor:
    """The mean spikes of IF neurons with threshold 2 and a feedback W."""
    v = s = total = torch.zeros(5, 9, dtype=torch.float64)
    for _ in range(steps):
        u = v + current_BC + mask_BC * (s @ W.T)
        s = (u >= 2).double()
        v, total = u - 2 * s, total + s
    return total / steps


def trained(rule: Rule, model: nn.Module, shape: tuple[int, ...], *, steps: int) -> None:
    rule.attach(model, over_time="mean")
    x_TB, target = repeat(torch.randn(4, *shape), steps), torch.randint(10, (4,))
    (objective,) = learn(rule.loss_terms(model, x_TB, cross_entropy(target)))
    assert objective.logits.shape == (4, 10)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("build", [alexnet_f, cifarnet_f])
@pytest.mark.parametrize("make_rule", [IDE, BPTT])
def test_the_classic_networks_train_under_ide_and_bptt(build, make_rule):
    trained(make_rule(), build(size=16, width=0.1), (3, 16, 16), steps=4)


@pytest.mark.parametrize("build", [convnet_f, lenet_f])
def test_the_networks_without_norm_fire_and_train_under_spide(build):
    """Two pools stand between the loss and the first layer, and an eighth passes each."""
    model, rule = build(), SPIDE(100, scale=64.0)
    trained(rule, model, (1, 28, 28), steps=30)
    assert rule.metrics()["forward_rate"] > 0.05 and rule.metrics()["backward_rate"] > 0.001
    assert all(p.grad.norm() > 0 for name, p in model.named_parameters() if name.endswith("weight"))


def test_the_feedback_brings_the_last_layer_to_the_first():
    model = alexnet_f(size=16, width=0.05)
    assert isinstance(model.equilibrium.feedback, SpectralLimit)
    assert model.equilibrium.feedback(torch.ones(1, 2, 13, 4, 4)).shape == (1, 2, 5, 8, 8)
    same = conv_feedback(size=12, layers=((3, 5, 2), (4, 3, 1)), limit="none", norm="none")
    assert same.equilibrium.feedback(torch.ones(1, 2, 4, 6, 6)).shape == (1, 2, 3, 6, 6)


def test_fully_connected_against_an_independent_network_with_dropout_on_its_currents():
    """As published for IDE: one mask behind each synapse, in all steps and in the equation for
    beta; none at the readout.
    """
    how = {"dropout": 0.4, "dropout_on": "currents"}
    model = fc_feedback(4, in_features=6, hidden=9, **how).double()
    masks: dict[str, torch.Tensor] = {}

    def keep(name: str, module: Dropout) -> None:
        found = module.state.read("mask")
        assert torch.equal(masks.setdefault(name, found), found)

    for name, module in model.named_modules():
        if isinstance(module, Dropout) and module.share > 0:
            module.register_forward_hook(lambda module, _, __, name=name: keep(name, module))
    x_BCHW, target = 3 * torch.randn(5, 1, 2, 3, dtype=torch.float64), torch.randint(4, (5,))
    rule = IDE(iterations=60, tolerance=0.0)
    rule.attach(model, over_time="mean")
    (objective,) = learn(rule.loss_terms(model, repeat(x_BCHW, 6), cross_entropy(target)))
    assert list(masks) == ["equilibrium.inject.1", "equilibrium.feedback.1"]
    into_BC, back_BC = masks.values()
    assert 0 < (into_BC == 0).double().mean() < 1 and not torch.equal(into_BC, back_BC)

    p = {name: each.detach() for name, each in model.named_parameters()}
    V = p["equilibrium.feedback.0.synapse.weight"]
    W = V / torch.linalg.matrix_norm(V, 2)
    inject = (p[f"equilibrium.inject.0.{name}"] for name in ("weight", "bias"))
    current_BC = into_BC * F.linear(x_BCHW.flatten(1), *inject)
    a = rate_by_hand(current_BC, W, steps=6, mask_BC=back_BC).requires_grad_()
    logits = F.linear(a, p["classifier.weight"], p["classifier.bias"])
    assert torch.allclose(objective.logits, logits, atol=1e-12)
    (g,) = torch.autograd.grad(F.cross_entropy(logits, target), a)
    rate = (current_BC + back_BC * (a.detach() @ W.T)) / 2
    inside = ((rate > 0) & (rate < 1)).double()
    systems = torch.eye(9, dtype=torch.float64) - W.T * (inside * back_BC / 2)[:, None]
    beta = torch.linalg.solve(systems, g)
    found = model.get_parameter("equilibrium.inject.0.bias").grad
    assert torch.allclose(found, (beta * inside / 2 * into_BC).sum(0), atol=1e-9)
    assert found.abs().max() > 1e-3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("build", "count"), [(alexnet_f, 6), (cifarnet_f, 6), (convnet_f, 4), (lenet_f, 1)]
)
@pytest.mark.parametrize("where", ["readout", "currents"])
def test_dropout_stands_before_the_classifier_or_behind_the_synapses(build, count, where):
    with torch.device("meta"):
        layers = build(dropout=0.2, dropout_on=where).named_modules()
    names = [name for name, m in layers if isinstance(m, Dropout) and m.share == 0.2]
    expected = {"readout": ["dropout"], "currents": ["equilibrium"] * count}
    assert [name.split(".")[0] for name in names] == expected[where]


@pytest.mark.parametrize(("first", "last", "published"), [(96, 256, 0.98), (128, 512, 1.13)])
def test_an_upsampling_feedback_starts_at_a_tenth_of_its_outputs_norm(first, last, published):
    """Published: each of its 96 (or 128) outputs has a weight of norm 0.1, so |V| is 0.98 (or
    1.13).
    """
    model = convnet_f(size=8, layers=((first, 3, 2), (last, 3, 2)), gain=1.0)
    weight = model.get_parameter("equilibrium.feedback.synapse.weight")
    assert weight.norm().item() == pytest.approx(published, rel=0.01)


test_refuses = refusals(
    [
        (call, re.escape(message))
        for call, message in [
            (
                lambda: fc_feedback(hidden=0),
                "fc_feedback: hidden must be a whole number >= 1; got hidden=0",
            ),
            (
                lambda: fc_feedback(dropout_on="rates"),
                "feedback: dropout_on must be 'readout' or 'currents'; got dropout_on='rates'",
            ),
            (
                lambda: fc_feedback(norm="layer"),
                "feedback: norm must be 'batch' or 'none'; got norm='layer'",
            ),
            (
                lambda: fc_feedback(limit="l2"),
                "feedback: limit must be 'spectral', 'none' or a number; got limit='l2'",
            ),
            (
                lambda: conv_feedback(layers=()),
                "conv_feedback: layers must be (width, kernel, stride), each >= 1; got ()",
            ),
            (
                lambda: fc_feedback(limit=0),
                "FrobeniusLimit: the largest norm must be > 0; got largest=0",
            ),
            (lambda: lenet_f(size=30), "lenet_f: size must be a multiple of 4; got size=30"),
            (
                lambda: conv_feedback(size=27),
                "product of the strides; got size=27, product 2",
            ),
        ]
    ]
)


@pytest.mark.parametrize("largest", [0.5, 50.0])
def test_a_number_limits_the_frobenius_norm(largest: float) -> None:
    synapse, x = Linear(3, 4, bias=False).double(), torch.randn(2, 2, 3, dtype=torch.float64)
    limit = FrobeniusLimit(synapse, largest)
    weight = synapse.weight.detach().clone().requires_grad_()
    y = x @ (weight * min(1, largest / weight.square().sum().sqrt())).T
    assert torch.allclose(limit(x), y, atol=1e-14)
    (expected,) = torch.autograd.grad(y.square().sum(), weight)
    limit(x).square().sum().backward()
    assert torch.allclose(synapse.weight.grad, expected, atol=1e-12)
    nn.init.zeros_(synapse.weight)
    assert limit(x).abs().max() == 0
