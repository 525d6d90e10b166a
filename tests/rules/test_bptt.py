import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.rules.bptt import BPTT
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import WeightedRates
from pipeline.spiking.surrogate import Triangle, spike
from pipeline.spiking.synapse import Linear
from tests.helpers.rule_networks import (
    batch,
    cross_entropy,
    difference,
    gradients,
    learn,
    lif_network,
    saved_peak,
)


def smallest_model() -> nn.Sequential:
    return lif_network()


def contract_rules() -> list[BPTT]:
    return [BPTT(), BPTT(chunk=1), BPTT(recompute=True), BPTT(truncate=2)]


def by_autograd(model: nn.Sequential, x_TBC, *, keep_reset: bool, over_time: str, target_B) -> dict:
    """BPTT of a soft-reset network, step after step, written without the pipeline's layers."""
    w1, b1, w2, b2, w3, b3 = model.parameters()
    decay = 0.5
    v1 = v2 = torch.zeros((), dtype=torch.float64)
    logits = []
    for x in x_TBC:
        u1 = decay * v1 + x @ w1.T + b1
        s1 = spike(u1 - 1, surrogate=Triangle())
        v1 = u1 - (s1 if keep_reset else s1.detach())
        u2 = decay * v2 + s1 @ w2.T + b2
        s2 = spike(u2 - 1, surrogate=Triangle())
        v2 = u2 - (s2 if keep_reset else s2.detach())
        logits.append(s2 @ w3.T + b3)
    if over_time == "mean":
        loss = F.cross_entropy(torch.stack(logits).mean(0), target_B)
    else:
        loss = torch.stack([F.cross_entropy(o, target_B) for o in logits]).mean()
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("over_time", ["steps", "mean"])
@pytest.mark.parametrize("reset_gradient", ["kept", "detached"])
def test_gradient_is_autograds_through_an_independent_loop(over_time, reset_gradient):
    model = lif_network(decay=0.5, reset_gradient=reset_gradient)
    x_TBC, target = batch(5)
    expected = by_autograd(
        model, x_TBC, keep_reset=reset_gradient == "kept", over_time=over_time, target_B=target
    )
    got = gradients(BPTT(), model, x_TBC, cross_entropy(target), over_time=over_time)
    assert difference(got, expected) < 1e-13


@pytest.mark.parametrize("over_time", ["steps", "mean"])
def test_both_losses_are_reported_as_they_are_differentiated(over_time):
    model, rule = lif_network(), BPTT()
    x_TBC, target = batch(4)
    seen_logits = []
    rule.attach(model, over_time=over_time)

    def loss_of(logits_BK):
        seen_logits.append(logits_BK.detach())
        return F.cross_entropy(logits_BK, target)

    (objective,) = learn(rule.loss_terms(model, x_TBC, loss_of))
    assert len(seen_logits) == (4 if over_time == "steps" else 1)
    assert objective.loss.item() == pytest.approx(
        sum(F.cross_entropy(o, target).item() for o in seen_logits) / len(seen_logits)
    )
    assert not objective.loss.requires_grad and not objective.logits.requires_grad
    assert torch.allclose(objective.logits, sum(seen_logits) / len(seen_logits))


def test_the_two_losses_have_different_gradients():
    model = lif_network()
    x_TBC, target = batch(5)
    steps, mean = (
        gradients(BPTT(), model, x_TBC, cross_entropy(target), over_time=o)
        for o in ("steps", "mean")
    )
    assert difference(steps, mean) > 1e-2


def test_refuses_a_chunk_out_of_range():
    with pytest.raises(
        ValueError, match=r"BPTT: chunk must be a whole number in 1\.\.T; got chunk=0"
    ):
        BPTT(chunk=0)
    rule, model = BPTT(chunk=4), lif_network()
    rule.attach(model)
    with pytest.raises(ValueError, match=r"BPTT: chunk must be in 1\.\.T; got chunk=4, T=3"):
        next(rule.loss_terms(model, batch(3)[0], torch.sum))


def test_a_model_without_neurons_is_plain_backpropagation():
    model = nn.Sequential(lif_network()[0])
    x_TBC, target = batch(3, classes=8)
    got = gradients(BPTT(), model, x_TBC, cross_entropy(target))
    loss = torch.stack([F.cross_entropy(o, target) for o in model(x_TBC)]).mean()
    assert torch.allclose(got["0.weight"], torch.autograd.grad(loss, list(model.parameters()))[0])


# --------------------------------------------------------------------------- recompute and truncate


@pytest.mark.parametrize("over_time", ["steps", "mean"])
@pytest.mark.parametrize("reset_gradient", ["kept", "detached"])
@pytest.mark.parametrize("chunk", [None, 2, 6])
def test_recomputing_gives_the_same_gradient(over_time, reset_gradient, chunk):
    model = lif_network(decay=0.5, reset_gradient=reset_gradient)
    x_TBC, target = batch(6)
    whole, twice = (
        gradients(rule, model, x_TBC, cross_entropy(target), over_time=over_time)
        for rule in (BPTT(), BPTT(chunk, recompute=True))
    )
    assert difference(whole, twice) < 1e-14


def wide_network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        Linear(6, 64),
        *(layer for _ in range(4) for layer in (LIF(0.5), Linear(64, 64))),
        LIF(0.5),
        Linear(64, 3),
    ]
    return nn.Sequential(*layers).double()


def test_recomputing_keeps_membranes_and_no_more():
    def peak(rule: BPTT, steps: int) -> int:
        return saved_peak(rule, wide_network(), *batch(steps))

    membranes = 5 * 64 * 5 * 8  # neurons, samples, bytes
    growth = peak(BPTT(recompute=True), 16) - peak(BPTT(recompute=True), 8)
    assert membranes * 8 <= growth < 1.1 * membranes * 8  # and the logits' errors
    assert growth < 0.6 * (peak(BPTT(), 16) - peak(BPTT(), 8))


def test_recomputing_moves_statistics_once_and_draws_the_same_masks():
    def network() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(
            Linear(6, 8), BatchNorm(8), LIF(0.5, threshold=0.3), nn.Dropout(0.5), Linear(8, 3)
        ).double()

    x_TBC, target = batch(4)
    found, statistics, generators = [], [], []
    for rule in (BPTT(chunk=1), BPTT(recompute=True)):
        model = network()
        torch.manual_seed(2)
        found.append(gradients(rule, model, x_TBC, cross_entropy(target)))
        statistics.append(torch.cat([model[1].running_mean, model[1].running_var]))
        generators.append(torch.get_rng_state())
    assert difference(*found) < 1e-14 and max(g.abs().max() for g in found[0].values()) > 1e-3
    assert torch.equal(*statistics) and torch.equal(*generators)


def by_pieces(model: nn.Sequential, x_TBC, target_B, *, length: int) -> dict:
    """BPTT of a soft-reset network whose membranes are cut every `length` steps, written without
    the pipeline's layers.
    """
    w1, b1, w2, b2, w3, b3 = model.parameters()
    v1, v2, losses = torch.zeros(()), torch.zeros(()), []
    for t, x in enumerate(x_TBC):
        if t % length == 0:
            v1, v2 = v1.detach(), v2.detach()
        u1 = 0.5 * v1 + x @ w1.T + b1
        s1 = spike(u1 - 1, surrogate=Triangle())
        u2 = 0.5 * v2 + s1 @ w2.T + b2
        s2 = spike(u2 - 1, surrogate=Triangle())
        v1, v2 = u1 - s1.detach(), u2 - s2.detach()
        losses.append(F.cross_entropy(s2 @ w3.T + b3, target_B))
    names = [name for name, _ in model.named_parameters()]
    return dict(
        zip(
            names,
            torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters())),
            strict=True,
        )
    )


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_truncated_is_an_independent_loop_cut_every_so_many_steps(length):
    model = lif_network(decay=0.5)
    x_TBC, target = batch(5)
    got = gradients(BPTT(truncate=length), model, x_TBC, cross_entropy(target))
    assert difference(got, by_pieces(model, x_TBC, target, length=length)) < 1e-13


def test_truncation_lies_between_sltt_and_bptt():
    model = lif_network(decay=0.5)
    x_TBC, target = batch(6)
    found = {
        name: gradients(rule, model, x_TBC, cross_entropy(target))
        for name, rule in {
            "1": BPTT(truncate=1),
            "2": BPTT(truncate=2),
            "6": BPTT(truncate=6),
            "B": BPTT(),
            "S": SLTT(),
        }.items()
    }
    assert difference(found["1"], found["S"]) < 1e-14 and difference(found["6"], found["B"]) < 1e-14
    for one, other in itertools.combinations(("S", "2", "B"), 2):
        assert difference(found[one], found[other]) > 1e-3


def test_the_options_exclude_one_another():
    for wrong in ({"recompute": True}, {"chunk": 2}):
        with pytest.raises(ValueError, match=r"BPTT: truncate excludes recompute and chunk"):
            BPTT(truncate=2, **wrong)
    for said, refused in (
        (
            r"BPTT: truncate must be a whole number in 1\.\.T; got truncate=0",
            lambda: BPTT(truncate=0),
        ),
        (
            r"BPTT-truncate-2: .* got over_time='mean'",
            lambda: BPTT(truncate=2).attach(lif_network(), over_time="mean"),
        ),
    ):
        with pytest.raises(ValueError, match=said):
            refused()
    rule, model = BPTT(truncate=4), lif_network()
    rule.attach(model)
    with pytest.raises(ValueError, match=r"BPTT: truncate must be in 1\.\.T; got truncate=4, T=3"):
        rule.loss_terms(model, batch(3)[0], torch.sum)


@pytest.mark.parametrize(
    "rule",
    [BPTT(1), BPTT(recompute=True), BPTT(truncate=2), SLTT(), OTTT(), OPZO()],
    ids=lambda rule: rule.label,
)
def test_slices_refuse_what_needs_all_of_time(rule):
    weighted = nn.Sequential(Linear(5, 8), LIF(), Linear(8, 3), WeightedRates(0.5))
    with pytest.raises(
        ValueError, match=r": a rule that runs in slices of time cannot weigh steps .* at 3$"
    ):
        rule.attach(weighted)
    BPTT().attach(weighted, over_time="mean")
