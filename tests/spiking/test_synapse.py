from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.spiking.synapse import Conv2d, Linear, apply_folded, effective_weight
from tests.helpers.rule_networks import refusals
from tests.helpers.saved import SavedBytes

GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 1, "stride": 2, "bias": False},
]


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def standardized(weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Scaled weight standardisation written out filter by filter."""
    filters = []
    for w, g in zip(weight, gain.flatten(), strict=True):
        centred = w - w.sum() / w.numel()
        unbiased = centred.square().sum() / (w.numel() - 1)
        filters.append(g * centred / torch.sqrt(unbiased * w.numel() + 1e-4))
    return torch.stack(filters)


SYNAPSES: list[tuple[Any, Any, dict, tuple[int, ...]]] = [
    *[(Conv2d, nn.Conv2d, {"out_channels": 6, **each}, (4, 9, 8)) for each in GEOMETRIES],
    (Linear, nn.Linear, {"out_features": 6}, (4,)),
    (Linear, nn.Linear, {"out_features": 6}, (5, 4)),
]
every_synapse = pytest.mark.parametrize(("build", "torchs", "geometry", "shape"), SYNAPSES)


@every_synapse
def test_it_is_torchs_at_every_step(build, torchs, geometry, shape):
    ours, theirs = build(4, **geometry), torchs(4, **geometry)
    theirs.load_state_dict(ours.state_dict())
    x_TB = torch.randn(3, 2, *shape)
    assert torch.allclose(ours(x_TB), torch.stack([theirs(x) for x in x_TB]), atol=1e-6)


def test_standardized_weights_and_their_gradients():
    conv, x = (
        Conv2d(3, 5, 3, weights="standardized").double(),
        double(2, 2, 3, 6, 6).requires_grad_(),
    )
    nn.init.normal_(conv.gain)
    weight = standardized(conv.weight, conv.gain)
    reference = apply_folded(lambda x_N: nn.functional.conv2d(x_N, weight, conv.bias), x)
    assert torch.allclose(conv(x), reference, atol=1e-13)
    upstream = torch.randn_like(reference)
    ours, expected = (gradients(conv, y, upstream, x) for y in (conv(x), reference))
    assert close(ours, expected)


def test_standardized_weights_keep_only_the_parameters():
    linear = Linear(50, 40, weights="standardized").double()
    with SavedBytes(linear) as saved:
        linear(double(1, 2, 50)).sum().backward()
    # Beside the input, the effective weight that dL/dx would need is not kept for an input without
    # gradient.
    assert saved.peak < 40 * 50 * 8


def gradients(synapse: nn.Module, y: Tensor, upstream: Tensor, x: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad(
            (y * upstream).sum(), [x, *synapse.parameters()], materialize_grads=True
        )
    )


def close(one: Sequence[Tensor], other: Sequence[Tensor], atol: float = 1e-12) -> bool:
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("weights", ["plain", "standardized"])
@every_synapse
def test_the_factor_takes_the_place_of_the_input(build, torchs, geometry, shape, weights):
    synapse = build(4, **geometry, weights=weights).double()
    x, factor = (double(3, 2, *shape).requires_grad_() for _ in range(2))
    plain = synapse(x)
    upstream = torch.randn_like(plain)
    (g_x, *_) = gradients(synapse, plain, upstream, x)
    (_, *expected) = gradients(synapse, synapse(factor), upstream, x)
    synapse.presynaptic = lambda _: factor.detach()
    y = synapse(x)
    assert torch.equal(y, plain)
    got_x, *got = gradients(synapse, y, upstream, x)
    assert close([got_x], [g_x]) and close(got, expected, 1e-12 if build is Linear else 1e-11)


@pytest.mark.parametrize("presynaptic", [None, torch.cos])
@every_synapse
def test_another_weight_carries_the_error_down(build, torchs, geometry, shape, presynaptic):
    synapse, carrier = (build(4, **geometry).double() for _ in range(2))
    x = double(3, 2, *shape).requires_grad_()
    synapse.presynaptic = presynaptic
    plain = synapse(x)
    upstream = torch.randn_like(plain)
    (_, *expected) = gradients(synapse, plain, upstream, x)
    (expected_x, *_) = gradients(carrier, carrier(x), upstream, x)
    synapse.backward_weight = lambda weight: carrier.weight.detach() + (weight - synapse.weight)
    with SavedBytes(synapse) as saved:
        y = synapse(x)
    assert torch.equal(y, plain)
    assert saved.peak == x.numel() * 8  # the factor; the other weight is made when it is needed
    assert close(gradients(synapse, y, upstream, x), [expected_x, *expected])


@every_synapse
def test_the_input_itself_may_be_the_factor(build, torchs, geometry, shape):
    synapse, x = build(4, **geometry).double(), double(2, 2, *shape).requires_grad_()
    upstream = synapse(x).detach()
    expected = gradients(synapse, synapse(x), upstream, x)
    synapse.presynaptic = lambda x_TB: x_TB
    assert close(gradients(synapse, synapse(x), upstream, x), expected)


class CountConvolutions(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


def test_the_seam_costs_one_forward_and_one_backward():
    conv = Conv2d(4, 6, 3)
    conv.presynaptic = torch.clone
    x = torch.randn(2, 2, 4, 8, 8, requires_grad=True)
    with CountConvolutions() as count, SavedBytes(conv) as saved:
        conv(x).sum().backward()
    # saved: the factor, and not the input beside it
    assert (count.calls, saved.peak) == (2, x.numel() * 4)


@pytest.mark.parametrize("weights", ["plain", "standardized"])
@pytest.mark.parametrize("geometry", [None, *GEOMETRIES])
def test_under_autocast_the_seams_are_the_plain_op_on_what_they_put_in_its_place(geometry, weights):
    """Weights learn from the factor and the error goes down by the other weight, both in fp32. bf16
    is within 1 % of that, and seen.
    """
    build, shape = (
        (lambda: Linear(40, 6, weights=weights), (3, 8, 40))
        if geometry is None
        else (lambda: Conv2d(4, 6, **geometry, weights=weights), (3, 2, 4, 9, 8))
    )
    synapse, carrier, x = build(), build(), torch.randn(*shape).requires_grad_()
    plain = synapse(x)
    upstream = torch.randn_like(plain).bfloat16().float()
    (_, *expected) = gradients(synapse, synapse(x.detach().cos()), upstream, x)
    (expected_x, *_) = gradients(carrier, carrier(x), upstream, x)
    synapse.presynaptic = torch.cos
    synapse.backward_weight = lambda weight: effective_weight(carrier).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = synapse(x)
    got = gradients(synapse, y.float(), upstream, x)
    apart = [
        float((one - other).norm() / other.norm())
        for one, other in zip([y.float(), *got], [plain, expected_x, *expected], strict=True)
    ]
    assert y.dtype == torch.bfloat16 and max(apart) < 0.01 and min(apart[:3]) > 0


def test_the_factor_is_made_without_a_graph():
    linear, modes = Linear(4, 3), []
    linear.presynaptic = lambda x: modes.append(torch.is_grad_enabled()) or x.clone()
    linear(torch.ones(2, 2, 4, requires_grad=True)).sum().backward()
    assert modes == [False]


def test_a_hook_on_the_weight_sees_the_factors_gradient():
    linear = Linear(4, 3)
    seen = []
    linear.weight.register_hook(lambda g: seen.append(g.clone()) or torch.zeros_like(g))
    linear.presynaptic = torch.zeros_like
    linear(torch.ones(2, 2, 4)).sum().backward()
    assert len(seen) == 1 and seen[0].abs().sum() == 0


def another_shape() -> None:
    linear = Linear(4, 3)
    linear.presynaptic = lambda x: x[:1]
    linear(torch.zeros(2, 2, 4))


test_refuses = refusals(
    [
        (
            lambda: Linear(4, 3)(torch.zeros(2, 4)),
            r"Linear: the input must be time first, \[T, B, \.\.\., C\]; got shape \(2, 4\)",
        ),
        (
            lambda: Conv2d(4, 3, 3)(torch.zeros(2, 4, 5, 5)),
            r"Conv2d: the input must be time first, .*\(2, 4, 5, 5\)",
        ),
        (
            lambda: Conv2d(4, 3, 3, padding="same"),
            r"Conv2d: padding must be a number of pixels; got padding='same'",
        ),
        (
            lambda: Linear(4, 3, weights="ws"),
            r"Linear: weights must be 'plain' or 'standardized'; got weights='ws'",
        ),
        (
            lambda: Conv2d(1, 3, 1, weights="standardized"),
            r"Conv2d: standardized weights need a fan-in of at least 2; got 1",
        ),
        (another_shape, r"the shape of the input, \(2, 2, 4\); got \(1, 2, 4\)"),
    ]
)
