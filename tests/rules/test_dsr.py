import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pipeline.models.convnet import convnet
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateIF, RateLIF, RateNeuron, rate_readout, rate_weights
from pipeline.spiking.synapse import Linear
from tests.helpers.references import gradient_of
from tests.helpers.rule_networks import (
    attached,
    batch,
    difference,
    drawn,
    gradients_on,
    outputs,
    refusals,
)

MEAN = {"over_time": "mean"}
contract_exceptions = {
    "test_one_step_equals_bptt": (
        "the derivative is that of the rate, at one step too, and not a surrogate's"
    )
}


def smallest_model(*neurons: RateNeuron) -> nn.Sequential:
    """Two hidden layers, IF and LIF unless told otherwise, and the readout that the last one's
    rates need.
    """
    first, second = neurons or (RateIF(threshold=1.0), RateLIF(threshold=0.1, dt=0.1))
    synapses = drawn(nn.Sequential(Linear(6, 8), Linear(8, 7), Linear(7, 3)), seed=3).float()
    one, two, three = synapses  # type: ignore[misc]
    return nn.Sequential(one, first, two, second, three, rate_readout(second))


# ------------------------------------------------------------------------- one neuron, closed forms


def map_of(
    neuron: RateNeuron, x_TB: torch.Tensor, g_TB: torch.Tensor, rule: DSR | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What DSR hands back for the output gradient `g_TB`: to the input, and to the threshold."""
    rule = rule or DSR()
    rule.attach(neuron, **MEAN)
    x_TB = x_TB.clone().requires_grad_()
    out_TB = outputs(neuron, x_TB, grad=True)
    g_x_TB, g_threshold = torch.autograd.grad(out_TB, (x_TB, neuron.threshold), g_TB)
    rule.release()
    return g_x_TB, g_threshold


def drawn_batch(seed: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TB, g_TB = torch.randn(2, steps, 3, 4, generator=generator, dtype=torch.float64)
    return 8 * x_TB + 2, g_TB


def weights_of(b: float, steps: int) -> torch.Tensor:
    """b^(T-t) of every step, with the sum 1."""
    w_T = b ** torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    return (w_T / w_T.sum()).view(-1, 1, 1)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 9),
    leaky=st.booleans(),
    scale=st.sampled_from([0.001, 1.0]),
)
def test_gradient_is_autograd_through_the_clamp_of_the_mean(seed, steps, leaky, scale):
    """Whatever the input does in time, and for any upstream gradient that a function of the rate
    can give.
    """
    dt, tau = 0.2, 1.3
    neuron = (
        RateLIF(threshold=0.4, dt=dt, tau=tau, threshold_gradient=scale)
        if leaky
        else RateIF(threshold_gradient=scale)
    ).double()
    x_TB, (g_B, *_) = drawn_batch(seed, steps)
    b = math.exp(-dt / tau) if leaky else 1.0
    w_T = weights_of(b, steps)
    x, threshold = x_TB.clone().requires_grad_(), neuron.threshold.detach().clone().requires_grad_()
    height, gain = (threshold / dt, (1 - b) / dt) if leaky else (threshold, 1.0)
    rate = torch.minimum((gain * (w_T * x).sum(0)).clamp_min(0), height)
    expected_x, expected_threshold = torch.autograd.grad(rate, (x, threshold), g_B)
    got_x, got_threshold = map_of(neuron, x_TB, g_B * w_T)
    assert torch.allclose(got_x, expected_x, atol=1e-14)
    assert torch.allclose(got_threshold, scale * expected_threshold, atol=1e-12)


@pytest.mark.parametrize("neuron", [RateIF(threshold=2.0), RateLIF(threshold=0.2, dt=0.1)])
def test_any_upstream_gradient_is_summed_and_handed_back(neuron):
    """Sum over t of the returned gradient = gain G inside the ramp, 0 outside; the threshold learns
    above it alone.
    """
    neuron.double()
    generator = torch.Generator().manual_seed(0)
    share_B = torch.tensor([[-0.5, 0.3, 0.9, 1.4]], dtype=torch.float64)
    height = neuron.threshold.item() / neuron.dt
    x_TB = (share_B * height / neuron.gain).expand(6, -1, -1)
    g_TB = torch.randn(6, 1, 4, generator=generator, dtype=torch.float64)
    g_x, g_threshold = map_of(neuron, x_TB, g_TB)
    G_B = g_TB.sum(0)
    inside_B = torch.tensor([[0.0, 1, 1, 0]], dtype=torch.float64)
    assert torch.allclose(g_x.sum(0), neuron.gain * G_B * inside_B, atol=1e-14)
    assert g_threshold.item() == pytest.approx(
        neuron.threshold_gradient * G_B[0, 3].item() / neuron.dt
    )
    weights_T = rate_weights(neuron.decay, x_TB)
    assert torch.allclose(g_x, weights_T.view(-1, 1, 1) * g_x.sum(0), atol=1e-14)
    quiet_x, quiet_threshold = map_of(neuron, 0.4 * (x_TB.abs() / 1.4), g_TB)
    assert quiet_threshold.item() == 0 and (quiet_x.sum(0) != 0).all()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 9))
def test_the_published_backward_of_lif(seed, steps):
    """What the published code computes, written out: for any upstream gradient, and a threshold
    gradient times dt.
    """
    dt, tau, threshold = 0.2, 1.3, 0.4
    neuron = RateLIF(threshold=threshold, dt=dt, tau=tau).double()
    nn.init.constant_(neuron.threshold, threshold)  # as it was written, in float64
    (x_TB, g_TB), w_T = drawn_batch(seed, steps), weights_of(math.exp(-dt / tau), steps)
    mean_B, G_B = (w_T * x_TB).sum(0), steps * (w_T * g_TB).sum(0)
    top = threshold / dt * tau
    expected_x = torch.where((mean_B > 0) & (mean_B < top), G_B / tau / steps, 0.0)
    expected_threshold = torch.where(mean_B > top, G_B, 0.0).sum() * dt
    got_x, got_threshold = map_of(neuron, x_TB, g_TB, DSR(backward="published"))
    assert torch.allclose(got_x, expected_x.expand(steps, -1, -1), atol=1e-13)
    assert torch.allclose(got_threshold, expected_threshold, atol=1e-12)


# ---------------------------------------------------------------------------------------- a network


@pytest.mark.parametrize(
    "make",
    [lambda: RateIF(threshold=1.0), lambda: RateLIF(threshold=0.1, dt=0.1, threshold_gradient=1.0)],
)
def test_a_network_that_follows_its_rates_has_the_gradient_of_the_network_of_rates(make):
    """The reference knows rates only, with torch's own autograd; it is fed the rates that the
    spikes had, as otherwise the two would see other values. Then nothing is left to differ: LIF's
    weights in time are carried through every layer.
    """
    spiking, (x_TBC, target) = smallest_model(make(), make()).double(), batch(6)
    weights_T = rate_weights(spiking[1].decay, x_TBC).view(-1, 1, 1)
    # Straight-through: the value of the spikes' own rate, the gradient of the ramp's.
    out_TBC, h = x_TBC, (weights_T * x_TBC).sum(0)
    layers: Any = spiking[:5]
    for layer in layers:
        out_TBC = outputs(layer, out_TBC)
        if isinstance(layer, Linear):
            h = nn.functional.linear(h, layer.weight, layer.bias)
        else:
            rate = torch.minimum((layer.gain * h).clamp_min(0), layer.threshold / layer.dt)
            h = rate + ((weights_T * out_TBC).sum(0) - rate).detach()
    expected = gradient_of(F.cross_entropy(h, target), spiking)
    (got,) = gradients_on(6, spiking, DSR(), **MEAN)
    assert difference(got, expected) < 1e-13
    assert all(g.abs().max() > 1e-3 for g in got.values())


def test_other_rules_train_the_same_neurons_by_another_gradient():
    dsr, bptt = gradients_on(6, smallest_model().double(), DSR(), BPTT(), **MEAN)
    assert difference(dsr, bptt) > 1e-2 and all(g.abs().max() > 0 for g in bptt.values())
    model = smallest_model(RateIF(threshold=2.0), RateIF(threshold=2.0)).double()
    (sltt,) = gradients_on(6, model, SLTT())
    assert all(g.abs().max() > 0 for g in sltt.values())


def test_under_autocast_a_rate_is_held_against_its_height_in_fp32():
    """A rate of 6.015625 is above the height of 6; of eight binary digits it would be 6."""
    x_TBC = torch.tensor([5.96875, 6.0625]).view(2, 1, 1).repeat(1, 3, 4)
    assert torch.equal(x_TBC, x_TBC.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        g_x, g_threshold = map_of(RateIF(threshold=6.0), x_TBC, torch.ones_like(x_TBC))
    assert not g_x.any() and g_threshold.item() == x_TBC.numel()


# -------------------------------------------------------------------------------------- calibration


def calibrated(model: nn.Module, batches: list[torch.Tensor], **how: Any) -> Any:
    rule, model = attached(DSR(calibrate=len(batches), **how), model, **MEAN)
    rule.calibrate(model, batches)
    rule.release()
    return model


def percentile(values: torch.Tensor, *, below: float = 1.001) -> float:
    """The nearest rank of 99.9 %, which is so many times below the largest."""
    ranked = values.relu().flatten().sort().values
    found = ranked[math.ceil(0.999 * len(ranked) - 1e-9) - 1].item()
    assert ranked[-1] > below * found
    return found


@pytest.mark.parametrize(
    "make", [lambda: RateIF(threshold=1.0), lambda: RateLIF(threshold=0.1, dt=0.1)]
)
@torch.no_grad()
def test_calibration_is_the_percentile_of_the_mean_input_layer_after_layer(make):
    batches = [torch.randn(4, size, 6) for size in (40, 30, 80)]
    model, h = calibrated(smallest_model(make(), make()), batches), torch.cat(batches, 1)
    for linear, neuron in ((model[0], model[1]), (model[2], model[3])):
        h = linear(h)
        mean = (rate_weights(neuron.decay, h).view(-1, 1, 1) * h).sum(0)
        expected = percentile(neuron.gain * mean, below=1.01)
        assert neuron.threshold.item() / neuron.dt == pytest.approx(expected, rel=1e-5)
        h = outputs(neuron, h)


@pytest.mark.parametrize("still", [True, False])
def test_calibration_on_activations_is_the_percentile_of_the_anns(still):
    """As published: ReLU in the place of the neurons, batch norm by its running statistics."""
    model = convnet(3, in_channels=1, stages=((4,), (4,)), over="time", neuron=RateIF()).double()
    for norm in (m for m in model.modules() if isinstance(m, BatchNorm)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    steps = 1 if still else 3
    frames = [torch.randn(steps, size, 1, 6, 6, dtype=torch.float64) for size in (20, 45)]
    batches = [repeat(each[0], 3) for each in frames] if still else frames
    calibrated(model, batches, calibrate_on="activations")
    ann, seen = copy.deepcopy(model).eval(), {}
    for name, module in ann.named_modules():
        if isinstance(module, RateNeuron):
            module.custom_forward = lambda lif, x_TB, name=name: seen.setdefault(name, x_TB).relu()
    outputs(ann, torch.cat([each.mean(0) for each in frames]).unsqueeze(0))
    found = {name: model.get_parameter(f"{name}.threshold").item() for name in seen}
    expected = {name: percentile(x_TB) for name, x_TB in seen.items()}
    assert len(seen) == 2 and found == pytest.approx(expected, rel=1e-12)


def test_calibration_leaves_everything_else_as_it_was():
    model = convnet(3, in_channels=1, stages=((4,), (4,)), over="time", neuron=RateIF())
    norm = next(m for m in model.modules() if isinstance(m, BatchNorm))
    norm.between = "world"
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    x_TBCHW, state = 5 * torch.randn(2, 40, 1, 6, 6), torch.get_rng_state()
    calibrated(model, [x_TBCHW])
    assert torch.equal(torch.get_rng_state(), state) and norm.between == "world"
    assert {name: module.training for name, module in model.named_modules()} == modes
    after = model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.endswith("threshold")}
    # Batch norm by the batch's own statistics: the 99.9th percentile of about a normal
    # distribution, three deviations.
    assert len(moved) == 2 and all(2 < after[name].item() < 4 for name in moved)


def test_a_silent_layer_is_left_at_the_bound():
    model = smallest_model()
    nn.init.constant_(model.get_parameter("0.bias"), -100)
    assert calibrated(model, [torch.randn(4, 8, 6)])[1].threshold.item() == pytest.approx(0.01)


# ----------------------------------------------------------------------------------------- refusals


test_refuses = refusals(
    [
        (
            lambda: DSR(calibrate=-1),
            r"DSR: calibrate must be a whole number >= 0; got calibrate=-1",
        ),
        (
            lambda: DSR(calibrate=1, calibrate_on="rates"),
            r"DSR: calibrate_on must be 'spikes' or 'activations'; got .*'rates'",
        ),
        (
            lambda: DSR(calibrate_on="activations"),
            r"DSR: calibrate must be >= 1 with calibrate_on='activations'; got calibrate=0",
        ),
        (
            lambda: DSR(backward="exact"),
            r"DSR: backward must be 'rates' or 'published'; got backward='exact'",
        ),
        (
            lambda: DSR(backward="published").attach(RateIF()),
            r"DSR: backward='published' has an effect only on RateLIF, .*; got only RateIF",
        ),
        (
            lambda: DSR().attach(nn.Linear(2, 2)),
            r"DSR: the model must have rate-coded neurons, .* got Linear",
        ),
        (
            lambda: DSR().attach(nn.Sequential(RateIF(), nn.Sequential(LIF()))),
            r"DSR: every neuron must be a RateIF or RateLIF; got LIF at 1\.0",
        ),
        (
            lambda: DSR().attach(smallest_model(), over_time="steps"),
            r"DSR: over_time must be 'mean' for a model with WeightedRates, .* got"
            r" over_time='steps' and WeightedRates at",
        ),
    ]
)
