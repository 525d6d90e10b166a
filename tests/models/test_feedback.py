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
from pipeline.rules.bptt import BPTT
from pipeline.rules.ide import IDE
from pipeline.rules.spide import SPIDE
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.encode import repeat
from pipeline.spiking.limit import FrobeniusLimit, SpectralLimit
from pipeline.spiking.neuron import IF, LIF
from pipeline.spiking.synapse import Linear
from tests.helpers.rule_networks import attached, outputs


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts():
    """Published: 3.7 M and 11.8 M."""
    with torch.device("meta"):
        assert parameters(alexnet_f()) == 3_708_139
        assert parameters(cifarnet_f()) == 11_837_579
        assert parameters(fc_feedback()) == 478_011
        assert (
            parameters(convnet_f())
            == 25 * 64 + 2 * 25 * 64 * 64 + 3 * 64 + 9 * 64 * 64 + (64 * 49 + 1) * 10
            == 274_826
        )
        assert (
            parameters(lenet_f())
            == 15 * 26 + 40 * (15 * 25 + 1) + 300 * (40 * 49 + 1) + 3010
            == 606_740
        )
        assert (
            parameters(conv_feedback())
            == 25 * 64 + 2 * 64 + 25 * 64 * 64 + 1 + (64 * 14 * 14 + 1) * 10
        )


def test_fully_connected_against_an_independent_forward():
    model = fc_feedback(4, in_features=6, hidden=9, neuron=IF(threshold=2.0)).double().eval()
    x_BCHW = 3 * torch.randn(5, 1, 2, 3, dtype=torch.float64)
    p = dict(model.named_parameters())
    V = p["equilibrium.feedback.synapse.weight"]
    W = V / torch.linalg.matrix_norm(V, 2)
    v = s = torch.zeros(5, 9, dtype=torch.float64)
    total = torch.zeros(5, 9, dtype=torch.float64)
    for _ in range(6):
        u = (
            v
            + x_BCHW.flatten(1) @ p["equilibrium.inject.weight"].T
            + p["equilibrium.inject.bias"]
            + s @ W.T
        )
        s = (u >= 2).double()
        v, total = u - 2 * s, total + s
    assert 0.05 < total.mean() / 6 < 0.8
    expected = F.linear(total / 6, p["classifier.weight"], p["classifier.bias"])
    assert torch.allclose(outputs(model, repeat(x_BCHW, 6)).mean(0), expected, atol=1e-12)


@pytest.mark.parametrize("build", [alexnet_f, cifarnet_f])
def test_the_classic_networks_train_under_ide_and_bptt(build):
    x_BCHW, target = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    for rule in (IDE(), BPTT()):
        model = build(size=16, width=0.1)
        rule.attach(model, over_time="mean")
        (objective,) = rule.loss_terms(
            model, repeat(x_BCHW, 4), lambda o: F.cross_entropy(o, target)
        )
        assert objective.backward is not None and objective.logits.shape == (4, 10)
        objective.backward.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        rule.release()


def test_the_feedback_brings_the_last_layer_to_the_first():
    model = alexnet_f(size=16, width=0.05)
    assert isinstance(model.equilibrium.feedback, SpectralLimit)
    assert model.equilibrium.feedback(torch.ones(1, 2, 13, 4, 4)).shape == (1, 2, 5, 8, 8)
    same = conv_feedback(size=12, layers=((3, 5, 2), (4, 3, 1)), limit="none", norm="none")
    assert same.equilibrium.feedback(torch.ones(1, 2, 4, 6, 6)).shape == (1, 2, 3, 6, 6)


@pytest.mark.parametrize("build", [convnet_f, lenet_f])
def test_the_networks_without_norm_fire_and_train_under_spide(build):
    model = build()
    rule, model = attached(SPIDE(100, scale=64.0), model, over_time="mean")
    x_BCHW, target = torch.randn(4, 1, 28, 28), torch.randint(10, (4,))
    (objective,) = rule.loss_terms(model, repeat(x_BCHW, 30), lambda o: F.cross_entropy(o, target))
    assert objective.backward is not None
    objective.backward.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert rule.figures()["forward_rate"] > 0.05 and rule.figures()["backward_rate"] > 0.001
    assert all(
        p.grad is not None and p.grad.norm() > 0
        for name, p in model.named_parameters()
        if name.endswith("weight")
    )


def test_dropout_on_currents_drops_the_same_inside_the_loop_and_in_the_solve():
    """As published for IDE: one mask behind each synapse, in all steps and in the equation for
    beta; none at the readout.
    """
    T, model = (
        6,
        fc_feedback(4, in_features=6, hidden=9, dropout=0.4, dropout_on="currents").double(),
    )
    masks: dict[str, torch.Tensor] = {}

    def keep(name: str, module: Dropout) -> None:
        found = module.state.read("mask")
        assert found is not None and torch.equal(masks.setdefault(name, found), found)

    for name, module in model.named_modules():
        if isinstance(module, Dropout) and module.share > 0:
            module.register_forward_hook(lambda module, _, __, name=name: keep(name, module))
    x_BC, target = 3 * torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,))
    rule, model = attached(IDE(iterations=60, tolerance=0.0), model, over_time="mean")
    loss_terms = rule.loss_terms(model, repeat(x_BC, T), lambda o: F.cross_entropy(o, target))
    objective = next(loss_terms)
    assert objective.backward is not None
    objective.backward.backward()  # inside the batch: its masks end with it
    assert list(loss_terms) == []
    assert list(masks) == ["equilibrium.inject.1", "equilibrium.feedback.1"]
    into_BC, back_BC = masks.values()
    assert 0 < (into_BC == 0).double().mean() < 1 and not torch.equal(into_BC, back_BC)

    p = {name: each.detach() for name, each in model.named_parameters()}
    V = p["equilibrium.feedback.0.synapse.weight"]
    W = V / torch.linalg.matrix_norm(V, 2)
    current_BC = into_BC * (
        x_BC @ p["equilibrium.inject.0.weight"].T + p["equilibrium.inject.0.bias"]
    )
    v = s = total = torch.zeros(5, 9, dtype=torch.float64)
    for _ in range(T):
        u = v + current_BC + back_BC * (s @ W.T)
        s = (u >= 2).double()
        v, total = u - 2 * s, total + s
    a = (total / T).requires_grad_()
    logits = F.linear(a, p["classifier.weight"], p["classifier.bias"])
    assert torch.allclose(objective.logits, logits, atol=1e-12)
    (g,) = torch.autograd.grad(F.cross_entropy(logits, target), a)
    rate = ((current_BC + back_BC * (a.detach() @ W.T)) / 2).clamp(0, 1)
    inside = ((rate > 0) & (rate < 1)).double()
    eye = torch.eye(9, dtype=torch.float64)
    beta = torch.stack(
        [torch.linalg.solve(eye - (W.T * (inside[b] * back_BC[b] / 2)), g[b]) for b in range(5)]
    )
    found = model.get_parameter("equilibrium.inject.0.bias").grad
    assert found is not None and torch.allclose(
        found, (beta * inside / 2 * into_BC).sum(0), atol=1e-9
    )
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("build", "count"), [(alexnet_f, 6), (cifarnet_f, 6), (convnet_f, 4), (lenet_f, 1)]
)
def test_dropout_stands_before_the_classifier_or_behind_the_synapses(build, count):
    with torch.device("meta"):
        for where, expected in (("readout", ["dropout"]), ("currents", ["equilibrium"] * count)):
            model = build(dropout=0.2, dropout_on=where)
            names = [
                name
                for name, each in model.named_modules()
                if isinstance(each, Dropout) and each.share == 0.2
            ]
            assert [name.split(".")[0] for name in names] == expected


def test_an_upsampling_feedback_starts_at_a_tenth_of_the_norm_of_its_outputs():
    """Published: each of its 96 (or 128) outputs has a weight of norm 0.1, so |V| is 0.98 (or
    1.13).
    """
    for first, last, published in ((96, 256, 0.98), (128, 512, 1.13)):
        model = convnet_f(size=8, layers=((first, 3, 2), (last, 3, 2)), gain=1.0)
        assert model.get_parameter(
            "equilibrium.feedback.synapse.weight"
        ).norm().item() == pytest.approx(published, rel=0.01)


def test_a_number_limits_the_frobenius_norm():
    x_TBC = torch.randn(1, 3, 7, dtype=torch.float64)
    for largest in (0.5, 100.0):
        synapse = Linear(7, 5, bias=False).double()
        V = synapse.weight.detach()
        expected = x_TBC @ (V * min(1, largest / V.square().sum().sqrt())).T
        assert torch.allclose(FrobeniusLimit(synapse, largest)(x_TBC), expected, atol=1e-14)


def test_neuron_arguments_reach_every_neuron():
    with torch.device("meta"):
        model = alexnet_f(neuron=LIF(0.9, threshold=1.5))
    neurons = [m for m in model.modules() if isinstance(m, LIF)]
    assert len(neurons) == 5 and {(n.decay, n.threshold) for n in neurons} == {(0.9, 1.5)}


@pytest.mark.parametrize(
    ("build", "message"),
    [
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
            "conv_feedback: the strides must divide the image; got size=27, strides to 2",
        ),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


@pytest.mark.parametrize("largest", [0.5, 50.0])
def test_the_frobenius_limit_is_differentiated_too(largest: float) -> None:
    synapse = Linear(3, 4, bias=False).double()
    limit = FrobeniusLimit(synapse, largest)
    x = torch.randn(2, 2, 3, dtype=torch.float64)
    weight = synapse.weight.detach().clone().requires_grad_()
    scaled = weight * (largest / weight.norm()).clamp(max=1.0)
    (expected,) = torch.autograd.grad((x @ scaled.T).square().sum(), weight)
    limit(x).square().sum().backward()
    assert torch.allclose(synapse.weight.grad, expected, atol=1e-12)
    torch.nn.init.zeros_(synapse.weight)
    assert limit(x).abs().max() == 0
