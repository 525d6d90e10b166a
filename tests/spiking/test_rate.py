import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.spiking.neuron import LIF, named_neurons
from pipeline.spiking.rate import RateIF, RateLIF, RateNeuron, rate_readout
from tests.helpers.rule_networks import outputs, refusals


def constant(steps: int, value: float) -> torch.Tensor:
    return torch.full((steps, 1, 1), value, dtype=torch.float64)


def exact(neuron: RateNeuron, threshold: float) -> RateNeuron:
    """In float64, with the threshold as it was written."""
    nn.init.constant_(neuron.double().threshold, threshold)
    return neuron


def by_hand(x, *, threshold, alpha, b=None, dt=1.0):
    """The equations at the head of spiking/rate.py over numbers; the outputs, and how near a
    potential came to firing.
    """
    v, out, closest = 0.0, [], math.inf
    for current in x:
        u = v + current if b is None else b * v + (1 - b) * current
        closest = min(closest, abs(u - alpha * threshold))
        fires = u >= alpha * threshold
        v = u - threshold * fires
        out.append(threshold / dt * fires)
    return out, closest


@settings(max_examples=60, deadline=None)
@given(
    x=st.lists(st.floats(-3, 9, width=32), min_size=1, max_size=12),
    threshold=st.sampled_from([0.3, 1.0, 6.0]),
    alpha=st.sampled_from([0.3, 0.5, 1.0]),
    leaky=st.booleans(),
)
def test_equations_against_a_loop_over_numbers(x, threshold, alpha, leaky):
    dt, tau = 0.25, 1.5
    neuron = (
        RateLIF(threshold=threshold, alpha=alpha, dt=dt, tau=tau)
        if leaky
        else RateIF(threshold=threshold, alpha=alpha)
    )
    more = {"b": math.exp(-dt / tau), "dt": dt} if leaky else {}
    expected, closest = by_hand(x, threshold=threshold, alpha=alpha, **more)
    if 0 < closest < 1e-9:
        return  # one rounding decides whether it fires
    got = outputs(neuron.double(), torch.tensor(x, dtype=torch.float64).view(-1, 1, 1))
    assert got.flatten().tolist() == pytest.approx(
        expected, abs=1e-6
    )  # the threshold itself was rounded to fp32


@settings(max_examples=150, deadline=None)
@given(
    share=st.floats(0, 1),
    threshold=st.floats(0.1, 10),
    alpha=st.floats(0.05, 1),
    steps=st.integers(1, 200),
)
def test_if_rate_of_a_constant_input(share, threshold, alpha, steps):
    """|r - clamp(I)| <= max(alpha, 1 - alpha) threshold / T."""
    neuron, x = exact(RateIF(threshold=threshold, alpha=alpha), threshold), share * threshold
    error = abs(outputs(neuron, constant(steps, x)).mean().item() - x)
    assert error <= max(alpha, 1 - alpha) * threshold / steps + 1e-9


@settings(max_examples=150, deadline=None)
@given(
    share=st.floats(0, 1),
    alpha=st.floats(0.05, 1),
    dt=st.sampled_from([0.01, 0.05, 0.2, 1.0]),
    tau=st.sampled_from([0.7, 1.0, 3.0]),
    steps=st.integers(1, 200),
)
def test_lif_rate_of_a_constant_input(share, alpha, dt, tau, steps):
    """|r - gain I| <= max(alpha, 1 - alpha) height (1 - b) / (1 - b^T): T is no help, dt is."""
    threshold, b = 0.3, math.exp(-dt / tau)
    height, gain = threshold / dt, (1 - b) / dt
    neuron = exact(RateLIF(threshold=threshold, alpha=alpha, dt=dt, tau=tau), threshold)
    w_T = b ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    out_T = outputs(neuron, constant(steps, share * height / gain)).flatten()
    error = abs((w_T @ out_T / w_T.sum()).item() - share * height)
    assert error <= max(alpha, 1 - alpha) * height * (1 - b) / (1 - b**steps) + 1e-9


def mean_error(neuron: RateNeuron, steps: int) -> float:
    """Mean |weighted rate - ramp| / height over constant inputs spread over the ramp."""
    share_B = torch.linspace(0, 1, 501, dtype=torch.float64)
    height = neuron.threshold.item() / neuron.dt
    out_TB = outputs(neuron.double(), (share_B * height / neuron.gain).expand(steps, 1, -1))
    rate_B = outputs(rate_readout(neuron), out_TB).mean(0)
    return ((rate_B - share_B * height).abs().mean() / height).item()


def test_if_error_falls_with_t_and_lif_error_with_dt_alone():
    by_t = [mean_error(RateIF(), steps) for steps in (10, 100, 1000)]
    assert by_t[0] > 8 * by_t[1] > 64 * by_t[2]
    levels = [mean_error(RateLIF(), steps) for steps in (100, 1000)]
    assert levels[1] == pytest.approx(levels[0], rel=0.1) and levels[1] > 0.01
    by_dt = [mean_error(RateLIF(dt=dt), 2000) for dt in (0.1, 0.05, 0.025)]
    assert by_dt[0] > 1.8 * by_dt[1] > 3.2 * by_dt[2]


def test_weighted_rates_are_the_weighted_mean():
    x_TBK, readout = torch.randn(5, 2, 3, dtype=torch.float64), rate_readout(RateLIF())
    w_T = torch.exp(-0.05 * torch.arange(4, -1, -1, dtype=torch.float64))
    expected = torch.einsum("t,tbk->bk", w_T / w_T.sum(), x_TBK)
    for _ in range(2):  # the next batch is a first slice again
        assert torch.allclose(outputs(readout, x_TBK).mean(0), expected, atol=1e-15)
    plain = (RateIF(), LIF(), nn.ReLU())
    assert all(isinstance(rate_readout(neuron), nn.Identity) for neuron in plain)


@pytest.mark.parametrize("make", [RateIF, RateLIF])
def test_slices_continue_one_another(make):
    neuron, x_TB = make().double(), 4 * torch.rand(6, 2, 4, dtype=torch.float64) + 1
    sliced = outputs(neuron, *x_TB.split([1, 3, 2]))
    assert torch.equal(outputs(neuron, x_TB), sliced) and sliced.count_nonzero() > 0


def test_surrogate_gradients_of_one_step():
    """out = height H(u / threshold - alpha): by x the surrogate alone, by the threshold the height
    of a spike beside it.
    """
    x, threshold, alpha, dt = 3.0, 1.2, 0.5, 0.5
    height, b = threshold / dt, math.exp(-dt)
    neuron = exact(
        RateLIF(threshold=threshold, alpha=alpha, dt=dt, threshold_gradient=0.1), threshold
    )
    x_TBC = constant(1, x).requires_grad_()
    out = outputs(neuron, x_TBC, grad=True)
    u = (1 - b) * x
    psi = 1 - abs(u / threshold - alpha)
    assert psi > 0 and out.item() == pytest.approx(height)
    g_x, g_threshold = torch.autograd.grad(out.sum(), (x_TBC, neuron.threshold))
    assert g_x.item() == pytest.approx(height * psi * (1 - b) / threshold)
    expected = 0.1 * (1 / dt + height * psi * -u / threshold**2)
    assert g_threshold.item() == pytest.approx(expected)


def test_the_threshold_is_held_by_a_view():
    neuron = RateIF(threshold=1.0, bound=0.5, threshold_gradient=2.0)
    neuron.threshold.data.fill_(0.1)
    assert outputs(neuron, torch.full((4, 1, 1), 0.5)).flatten().tolist() == [0.5] * 4
    neuron.clamped_threshold().sum().backward()
    assert neuron.threshold.item() == pytest.approx(0.1)
    assert neuron.threshold.grad.tolist() == [2.0]  # type: ignore[union-attr]


def test_it_is_a_neuron_as_others_are():
    model = nn.Sequential(RateIF(), copy.deepcopy(RateLIF()))
    assert [name for name, _ in named_neurons(model)] == ["0", "1"]
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == [
        ("0.threshold", (1,)),
        ("1.threshold", (1,)),
    ]
    assert model[1].threshold_gradient == pytest.approx(0.0025)
    assert "alpha=0.3" in repr(model[1])


test_refuses = refusals(
    [
        (
            lambda: outputs(rate_readout(RateLIF()), *torch.ones(4, 2, 3).split(2)),
            "one call must have all T steps, because the weights depend on T; got a second slice",
        ),
        (lambda: RateIF(alpha=0), r"RateIF: alpha must be above 0 and at most 1; got alpha=0"),
        (
            lambda: RateLIF(alpha=1.5),
            r"RateLIF: alpha must be above 0 and at most 1; got alpha=1\.5",
        ),
        (
            lambda: RateIF(threshold=0.001),
            r"RateIF: bound must be above 0 and at most the threshold; got bound=0\.01, thresh",
        ),
        (
            lambda: RateIF(threshold_gradient=-1),
            r"RateIF: threshold_gradient must be >= 0; got threshold_gradient=-1",
        ),
        (lambda: RateLIF(dt=0), r"RateLIF: tau and dt must be > 0; got tau=1\.0, dt=0"),
    ]
)
