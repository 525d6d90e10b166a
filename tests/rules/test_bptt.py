import pytest
import torch
from torch import nn

from pipeline.rules.bptt import BPTT
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import WeightedRates
from pipeline.spiking.synapse import Linear
from tests.helpers.references import by_autograd
from tests.helpers.rule_networks import (
    batch,
    cross_entropy,
    difference,
    gradients,
    gradients_on,
    lif_network,
    one_batch,
    refusals,
    saved_peak,
)


def contract_rules() -> list[BPTT]:
    return [BPTT(), BPTT(chunk=1), BPTT(recompute=True), BPTT(truncate=2)]


@pytest.mark.parametrize("over_time", ["steps", "mean"])
@pytest.mark.parametrize("reset_gradient", ["kept", "detached"])
def test_gradient_is_autograds_through_an_independent_loop(over_time, reset_gradient):
    model = lif_network(decay=0.5, reset_gradient=reset_gradient)
    how = {"keep_reset": reset_gradient == "kept", "over_time": over_time}
    (got,) = gradients_on(5, model, BPTT(), over_time=over_time)
    assert difference(got, by_autograd(model, *batch(5), **how)) < 1e-13


def test_a_model_without_neurons_is_plain_backpropagation():
    model = nn.Sequential(lif_network()[0])
    x_TBC, target = batch(3, classes=8)
    got = gradients(BPTT(), model, x_TBC, cross_entropy(target))
    loss = torch.stack([nn.functional.cross_entropy(o, target) for o in model(x_TBC)]).mean()
    assert torch.allclose(got["0.weight"], torch.autograd.grad(loss, list(model.parameters()))[0])


# --------------------------------------------------------------------------- recompute and truncate


@pytest.mark.parametrize("over_time", ["steps", "mean"])
@pytest.mark.parametrize("reset_gradient", ["kept", "detached"])
@pytest.mark.parametrize("chunk", [None, 2, 6])
def test_recomputing_gives_the_same_gradient(over_time, reset_gradient, chunk):
    model = lif_network(decay=0.5, reset_gradient=reset_gradient)
    rules = (BPTT(), BPTT(chunk, recompute=True))
    assert difference(*gradients_on(6, model, *rules, over_time=over_time)) < 1e-14


def wide_network() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [layer for _ in range(4) for layer in (LIF(0.5), Linear(64, 64))]
    return nn.Sequential(Linear(6, 64), *hidden, LIF(0.5), Linear(64, 3)).double()


def test_recomputing_keeps_membranes_and_no_more():
    def peak(rule: BPTT, steps: int) -> int:
        return saved_peak(rule, wide_network(), *batch(steps))

    membranes = 5 * 64 * 5 * 8  # neurons, samples, bytes
    growth = peak(BPTT(1, recompute=True), 16) - peak(BPTT(1, recompute=True), 8)
    assert membranes * 8 <= growth < 1.1 * membranes * 8  # and the logits' errors
    assert growth < 0.6 * (peak(BPTT(), 16) - peak(BPTT(), 8))


@pytest.mark.parametrize(("steps", "half"), [(1, 1), (4, 2), (5, 3)])
def test_slices_of_half_the_steps_are_recomputed_by_default(steps: int, half: int):
    calls, model = [], lif_network(decay=0.5)
    model.register_forward_pre_hook(lambda module, x: calls.append(len(x[0])))
    (got,) = gradients_on(steps, model, BPTT(recompute=True))
    slices = [half, steps - half][: 1 + (steps > half)]
    assert calls == [*slices, *reversed(slices)] and BPTT(recompute=True).steps_per_forward(4) == 2
    assert difference(got, by_autograd(model, *batch(steps), cut=steps)) < 1e-13


def test_recomputing_moves_statistics_once_and_draws_the_same_masks():
    found, others = [], []
    for rule in (BPTT(chunk=1), BPTT(recompute=True)):
        torch.manual_seed(1)
        norm, neuron = BatchNorm(8), LIF(0.5, threshold=0.3)
        model = nn.Sequential(Linear(6, 8), norm, neuron, nn.Dropout(0.5), Linear(8, 3)).double()
        torch.manual_seed(2)
        found += gradients_on(4, model, rule)
        others.append((norm.running_mean, norm.running_var, torch.get_rng_state()))
    assert difference(*found) < 1e-14 and max(g.abs().max() for g in found[0].values()) > 1e-3
    assert all(map(torch.equal, *others))


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_truncated_is_an_independent_loop_cut_every_so_many_steps(length):
    model = lif_network(decay=0.5)
    (got,) = gradients_on(5, model, BPTT(truncate=length))
    assert difference(got, by_autograd(model, *batch(5), cut=length)) < 1e-13


def weighted() -> nn.Sequential:
    return nn.Sequential(Linear(5, 8), LIF(), Linear(8, 3), WeightedRates(0.5))


test_refuses = refusals(
    [
        (
            lambda: one_batch(BPTT(chunk=4), lif_network(), 3),
            r"BPTT: chunk must be in 1\.\.T; got chunk=4, T=3",
        ),
        (
            lambda: one_batch(BPTT(truncate=4), lif_network(), 3),
            r"BPTT: truncate must be in 1\.\.T; got truncate=4, T",
        ),
        (
            lambda: BPTT(truncate=2, recompute=True),
            "BPTT: truncate must not be combined with recompute or chunk",
        ),
        (
            lambda: BPTT(truncate=2, chunk=2),
            "BPTT: truncate must not be combined with recompute or chunk",
        ),
        (
            lambda: BPTT(truncate=2).attach(lif_network(), over_time="mean"),
            r"BPTT-truncate-2: .* got over_time='mean'",
        ),
        *[
            (
                lambda rule=rule: rule.attach(weighted()),
                r": under a rule that passes slices .* must not have WeightedRates, .* at 3$",
            )
            for rule in (BPTT(1), BPTT(recompute=True), BPTT(truncate=2), SLTT(), OTTT(), OPZO())
        ],
    ]
)


def test_steps_may_be_weighed_where_all_come_at_once():
    BPTT().attach(weighted(), over_time="mean")
