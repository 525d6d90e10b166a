"""1-bit weights: two values for each filter, the straight-through gradients written out, seams and
state as of any synapse.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.binary import (
    Binarizer,
    binarize,
    binary_synapses,
    latent_parameters,
    unbinarize,
)
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.norm_limit import SpectralLimit
from pipeline.spiking.synapse import Conv2d, Linear, effective_weight
from tests.helpers.rule_networks import gradients_on
from tests.helpers.saved import SavedBytes

VARIANTS = ["scaled", "centred", "ir", "learnable"]
SHAPES = {"linear": (2, 3, 20), "conv": (2, 3, 4, 6, 6), "groups": (2, 3, 4, 6, 6)}


def binary(weights: str, kind: str = "linear") -> Any:
    """In float64, with latent weights on both sides of the clip and a scale that has moved."""
    torch.manual_seed(0)
    conv = Conv2d(4, 6, 3, padding=1, groups=2 if kind == "groups" else 1)
    synapse: Any = (Linear(20, 5) if kind == "linear" else conv).double()
    nn.init.normal_(synapse.weight, mean=0.1, std=0.8)
    binarize(synapse, weights)
    if weights == "learnable":
        synapse.binarizer.scale.data.mul_(torch.linspace(0.5, 1.5, len(synapse.weight)))
    return synapse


def by_hand(
    weights: str, W: Tensor, scale: Tensor | None, g: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(W_b, dL/dW, dL/dscale) weight by weight, from g = dL/dW_b."""
    rows = []
    for o, (w, g_o) in enumerate(zip(W.flatten(1), g.flatten(1), strict=True)):
        n = len(w)
        mean = sum(w) / n
        sd = (sum((w - mean) ** 2) / (n - 1) + 1e-8) ** 0.5
        v = {"scaled": w, "centred": w - mean, "ir": (w - mean) / sd, "learnable": w}[weights]
        a = 1.0 if weights == "ir" else sum(abs(v)) / n if scale is None else scale[o]
        window = {"ir": float("inf"), "learnable": a}.get(weights, 1.0)
        sign = torch.where(v >= 0, 1.0, -1.0).to(W.dtype)
        passed = torch.where(abs(v) <= window, g_o, 0.0)
        if weights == "centred":
            passed = passed - sum(passed) / n
        elif weights == "ir":  # of (w - mean) / sd
            passed = (passed - sum(passed) / n) / sd - v * sum(passed * v) / ((n - 1) * sd)
        rows.append((a * sign, passed, sum(g_o * sign) / n**0.5))
    W_b, g_W, g_scale = (torch.stack(each) for each in zip(*rows, strict=True))
    return W_b.view_as(W), g_W.view_as(W), None if scale is None else g_scale


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("weights", VARIANTS)
def test_weights_and_gradients_are_those_written_out(weights, kind):
    synapse = binary(weights, kind)
    assert (synapse.weight.abs() > 1).any() and (synapse.weight.abs() < 1).any()
    g = torch.randn_like(synapse.weight)
    W_b = effective_weight(synapse)
    found = torch.autograd.grad((W_b * g).sum(), list(latent_parameters(synapse)))
    expected, *of = by_hand(
        weights, synapse.weight.detach(), getattr(synapse.binarizer, "scale", None), g
    )
    assert torch.allclose(W_b, expected, atol=1e-14)
    for ours, theirs in zip(found, [each for each in of if each is not None], strict=True):
        assert theirs.abs().max() > 0.1 and torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("weights", VARIANTS)
def test_a_filter_has_exactly_two_values(weights, kind):
    synapse = binary(weights, kind).float()
    for w_b in effective_weight(synapse).flatten(1):
        low, high = w_b.unique().tolist()
        assert low == -high < 0
    is_positive, scale_O = synapse.binarizer.split(synapse.weight)
    a = torch.ones(len(is_positive)) if scale_O is None else scale_O
    signs = 2.0 * is_positive - 1
    assert torch.equal(signs * a.view(-1, *[1] * (signs.dim() - 1)), effective_weight(synapse))
    assert (scale_O is None) == (weights == "ir")


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("weights", VARIANTS)
def test_the_sign_of_zero_is_plus(weights, zero):
    synapse = Linear(3, 1, bias=False)
    synapse.weight.data.copy_(torch.tensor([[zero, 1.0, -1.0]]))
    binarize(synapse, weights)
    assert effective_weight(synapse).sign().tolist() == [[1.0, 1.0, -1.0]]


def test_a_learnable_scale_begins_at_twice_the_mean_size_and_leaves_its_floor():
    synapse: Any = Linear(4, 2).double()
    binarize(synapse, "learnable")
    scale = synapse.binarizer.scale
    assert scale.shape == (2,) and torch.allclose(scale, 2 * synapse.weight.abs().mean(1))
    with torch.no_grad():
        scale.fill_(-3.0)
    W_b = effective_weight(synapse)
    assert torch.allclose(W_b.abs(), torch.full_like(W_b, 1e-5))
    (g,) = torch.autograd.grad((W_b * W_b.sign().detach()).sum(), scale)
    assert torch.allclose(g, torch.full_like(g, 4 / 4**0.5))


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("weights", VARIANTS)
def test_seams_see_the_binary_weight(weights, kind):
    """The factor reaches the latent weight through the same straight-through gradient, and the
    error goes down through W_b.
    """
    synapse = binary(weights, kind)
    x_TB = torch.randn(*SHAPES[kind], dtype=torch.float64).requires_grad_()
    factor_TB = torch.randn_like(x_TB)
    upstream = torch.randn_like(synapse(x_TB))
    learnt = [*synapse.parameters()]
    (g_x,) = torch.autograd.grad((synapse(x_TB) * upstream).sum(), x_TB)
    expected = torch.autograd.grad((synapse(factor_TB) * upstream).sum(), learnt)
    plain = synapse(x_TB)
    synapse.presynaptic = lambda _: factor_TB.detach()
    y_TB = synapse(x_TB)
    found_x, *found = torch.autograd.grad((y_TB * upstream).sum(), [x_TB, *learnt])
    assert torch.equal(y_TB, plain) and torch.allclose(found_x, g_x, atol=1e-12)
    assert all(
        torch.allclose(ours, theirs, atol=1e-11)
        for ours, theirs in zip(found, expected, strict=True)
    )


def network(weights: str, *, normed: bool = True) -> Any:
    torch.manual_seed(1)
    norms = [BatchNorm(width) if normed else nn.Identity() for width in (8, 7)]
    model = nn.Sequential(
        Linear(6, 8), norms[0], LIF(), Linear(8, 7), norms[1], LIF(), Linear(7, 3)
    ).double()
    binarize(model[3], weights)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("rule", [BPTT(), SLTT(k=2), OTTT()], ids=lambda rule: rule.label)
@pytest.mark.parametrize("weights", VARIANTS)
def test_latent_weights_learn_under_every_kind_of_rule(weights, rule):
    (found,) = gradients_on(4, network(weights, normed=not isinstance(rule, OTTT)), rule)
    for name in ("3.weight", *(["3.binarizer.scale"] if weights == "learnable" else [])):
        assert found[name].isfinite().all() and found[name].abs().max() > 1e-6


@pytest.mark.parametrize("weights", VARIANTS)
def test_the_state_dict_is_that_of_full_precision(weights):
    plain, synapse = Linear(4, 3), Linear(4, 3)
    binarize(synapse, weights)
    more = ["binarizer.scale"] if weights == "learnable" else []
    assert sorted(synapse.state_dict()) == sorted([*plain.state_dict(), *more])
    assert all(parameter.dim() > 0 for parameter in synapse.parameters())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda synapse: pickle.loads(pickle.dumps(synapse))]
)
@pytest.mark.parametrize("weights", VARIANTS)
def test_copies_are_whole_and_apart(weights, copied):
    synapse, x_TB = binary(weights), torch.randn(*SHAPES["linear"], dtype=torch.float64)
    before, other = synapse(x_TB), copied(synapse)
    assert torch.equal(other(x_TB), before) and list(binary_synapses(nn.Sequential(other))) == ["0"]
    for parameter in other.parameters():
        parameter.data.neg_()
    assert torch.equal(synapse(x_TB), before) and not torch.equal(other(x_TB), before)


@pytest.mark.parametrize("weights", VARIANTS)
def test_under_autocast_the_latent_weight_stays_in_full_precision(weights):
    synapse = binary(weights).float()
    x_TB, parameters = torch.randn(*SHAPES["linear"]), list(synapse.parameters())
    W_b, full_TB = effective_weight(synapse), synapse(x_TB)
    upstream = torch.randn_like(full_TB).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(effective_weight(synapse), W_b)
        half_TB = synapse(x_TB)
    assert half_TB.dtype == torch.bfloat16
    full, half = (
        torch.autograd.grad((y_TB * upstream).float().sum(), parameters)
        for y_TB in (full_TB, half_TB)
    )
    assert all(
        (one - other).norm() < 0.02 * other.norm() for one, other in zip(half, full, strict=True)
    )


@pytest.mark.parametrize("weights", ["scaled", "learnable"])
def test_nothing_of_the_weights_size_is_kept_but_parameters(weights):
    synapse = Linear(50, 40)
    binarize(synapse, weights)
    with SavedBytes(synapse) as saved:
        synapse(torch.randn(1, 2, 50)).sum().backward()
    assert saved.peak <= (2 * 50 + 40) * 4  # the input and the scales


def test_a_fixed_synapse_is_plain_and_multiplies_by_its_weight():
    synapse = Linear(4, 3, bias=False)
    binarize(synapse)
    unbinarize(synapse)
    assert synapse.weights == "plain" and not binary_synapses(synapse)
    assert torch.equal(synapse(torch.eye(4).unsqueeze(0))[0].T, synapse.weight)


NARROW = Conv2d(1, 3, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: binarize(Linear(4, 3), "xnor"),
            r"binarize: weights must be 'scaled', .* or 'learnable'; got weights='xnor'",
        ),
        (
            lambda: binarize(nn.Linear(4, 3)),
            r"must be a Linear or Conv2d of pipeline\.spiking\.synapse; got Linear",
        ),
        (
            lambda: binarize(Linear(4, 3, weights="standardized")),
            r"plain before they are 1-bit; got standardized weights",
        ),
        (lambda: binarize(binary("scaled")), r"plain before they are 1-bit; got 1-bit weights"),
        (
            lambda: binarize(NARROW, "centred"),
            r"weights='centred' need a fan-in of at least 2; got 1",
        ),
        (
            lambda: SpectralLimit(binary("scaled")),
            r"SpectralLimit: the synapse must be one of .*, with plain weights and without bias",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert NARROW.weights == "plain" and NARROW.binarizer is None


def test_a_binarizer_says_what_it_is():
    assert repr(Binarizer(torch.randn(2, 3), "centred")) == "Binarizer('centred')"
