import itertools
from collections import Counter

import pytest
import torch
from torch import nn

from pipeline.rules import sltt
from pipeline.rules.base import World
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT, selected_steps
from pipeline.spiking.norm import BatchNorm
from tests.helpers.references import by_autograd, summed, three_factors
from tests.helpers.rule_networks import (
    batch,
    cross_entropy,
    difference,
    gradients_on,
    lif_network,
    one_batch,
    refusals,
)


def contract_rules() -> list[SLTT]:
    return [SLTT(), SLTT(chunk=2), SLTT(1), SLTT(1, rescale=True)]


@pytest.mark.parametrize("reset_gradient", ["kept", "detached"])
def test_gradient_equals_both_references_and_is_not_bptts(reset_gradient):
    model = lif_network(decay=0.5, reset_gradient=reset_gradient)
    got, full = gradients_on(6, model, SLTT(), BPTT())
    assert difference(got, summed(three_factors(model, *batch(6)))) < 1e-12
    assert difference(got, by_autograd(model, *batch(6), cut=1)) < 1e-12
    assert all((got[name] - full[name]).abs().max() > 1e-3 for name in ("0.weight", "2.weight"))


@pytest.mark.parametrize(("steps", "k"), [(4, 1), (4, 2), (5, 3), (4, 4)])
@pytest.mark.parametrize("rescale", [False, True])
def test_mean_over_all_subsets(monkeypatch, steps, k, rescale):
    model, found = lif_network(decay=0.5), []
    (full,) = gradients_on(steps, model, SLTT())
    for subset in itertools.combinations(range(steps), k):
        monkeypatch.setattr(sltt, "selected_steps", lambda *_, subset=subset, **__: subset)
        found += gradients_on(steps, model, SLTT(k, rescale=rescale))
    mean = {name: torch.stack([g[name] for g in found]).mean(0) for name in full}
    factor = 1.0 if rescale else k / steps
    assert difference(mean, {name: factor * g for name, g in full.items()}) < 1e-15


def test_chunks_sum_their_steps():
    chunked, single = (
        [o.loss.item() for o in one_batch(rule, lif_network(), 6)]
        for rule in (SLTT(chunk=4), SLTT())
    )
    assert chunked == pytest.approx([sum(single[:4]), sum(single[4:])])


def test_unselected_steps_report_without_a_graph():
    model, rule, (x_TBC, target) = lif_network(), SLTT(2), batch(6)
    rule.attach(model, world=World(seed=3))
    learned = []
    for t, objective in enumerate(rule.loss_terms(model, x_TBC, cross_entropy(target), step=11)):
        assert torch.is_grad_enabled()
        assert not objective.loss.requires_grad and not objective.logits.requires_grad
        if objective.backward is not None:
            learned.append(t)
            assert objective.backward.item() == objective.loss.item()
            objective.backward.backward()
    assert learned == list(selected_steps(6, 2, seed=3, step=11))


def test_rescale_moves_the_gradient_and_not_the_report():
    plain, rescaled = (
        one_batch(rule, lif_network(), 6, step=0) for rule in (SLTT(2), SLTT(2, rescale=True))
    )
    assert [o.loss.item() for o in plain] == [o.loss.item() for o in rescaled]
    ratios = [
        (b.backward / a.backward).item()  # type: ignore[operator]
        for a, b in zip(plain, rescaled, strict=True)
        if a.backward is not None
    ]
    assert ratios == pytest.approx([3.0, 3.0])


def test_every_subset_is_equally_likely_and_sorted():
    draws = 6000
    counts = Counter(selected_steps(5, 2, seed=1, step=step) for step in range(draws))
    assert set(counts) == set(itertools.combinations(range(5), 2))
    expected = draws / 10
    chi_squared = sum((n - expected) ** 2 / expected for n in counts.values())
    # 0.1 % of a chi-squared with 9 degrees of freedom. The draw is fixed.
    assert chi_squared < 27.9


def test_the_subset_depends_on_seed_and_step_alone():
    one, again, other = (
        [selected_steps(12, 6, seed=seed, step=step) for step in range(20)] for seed in (0, 0, 1)
    )
    assert one == again != other and len(set(one)) > 15


def test_running_statistics_move_alike_under_every_rule():
    statistics = []
    for rule in (BPTT(), SLTT(), SLTT(1), SLTT(chunk=3)):
        first, *rest = lif_network()
        one_batch(rule, nn.Sequential(first, norm := BatchNorm(8).double(), *rest), 6)
        statistics.append(torch.cat([norm.running_mean, norm.running_var]))
    assert all(torch.allclose(statistics[0], other, atol=1e-14) for other in statistics[1:])
    fresh = torch.cat([torch.zeros(8), torch.ones(8)]).double()
    assert not torch.allclose(statistics[0], fresh, atol=0.01)


test_refuses = refusals(
    [
        (
            lambda: SLTT(rescale=True),
            r"SLTT: rescale multiplies by T/k, so it needs a k; got k=None",
        ),
        (
            lambda: one_batch(SLTT(9), lif_network(), 4),
            r"SLTT: k must be in 1\.\.T; got k=9, T=4",
        ),
        (
            lambda: one_batch(SLTT(chunk=5), lif_network(), 4),
            r"SLTT: chunk must be in 1\.\.T; got chunk=5, T=4",
        ),
        (
            lambda: one_batch(SLTT(2, chunk=2), lif_network(), 4),
            r"SLTT: chunk must be 1 if k < T, .*; got k=2, T=4, chunk=2",
        ),
        (
            lambda: SLTT().attach(lif_network(), over_time="mean"),
            r"SLTT: over_time must be 'steps', because the loss of the mean logits needs"
            r" all T steps",
        ),
        (
            lambda: SLTT().attach(nn.Linear(2, 2)),
            r"SLTT: the model must have LIF neurons, .* got Linear",
        ),
        (
            lambda: SLTT(2).attach(
                nn.Sequential(lif_network(), nn.ModuleDict({"norm": BatchNorm(3, over="time")}))
            ),
            r"SLTT-2: under a rule .* must be BatchNorm.* got over='time' at 1\.norm",
        ),
    ]
)


def test_small_leak_brings_sltt_near_bptt():
    """The paper's own decay, 1/11: the first layer's gradient points the same way (methods.md:
    cosine .99 against .74 at 0.5).
    """
    found = gradients_on(6, lif_network(decay=1 / 11), SLTT(), BPTT())
    assert nn.functional.cosine_similarity(*(g["0.weight"].flatten() for g in found), dim=0) > 0.95
