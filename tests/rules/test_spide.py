"""SPIDE's backward phase against the linear system that it solves, and its gradient against IDE's,
in float64.
"""

# B batch, N neurons, T_B steps of the backward phase

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.feedback import convnet_f, fc_feedback
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.recipe_files import load_recipe
from pipeline.rules.base import Rule
from pipeline.rules.hlop import HLOP
from pipeline.rules.ide import IDE
from pipeline.rules.spide import SPIDE, Ternary, _transposed_layer, ternary_phase
from pipeline.spiking.equilibrium import Equilibrium, Linearized, find_equilibrium
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear
from tests.helpers.rule_networks import (
    CLASSES,
    FEATURES,
    attached,
    batch,
    cross_entropy,
    difference,
    drawn,
    gradients,
    gradients_on,
    lif_network,
    one_batch,
    refusals,
    spikes_of,
)

STEPS = (50, 500, 5000)
SYMMETRIC = {"threshold": 0.5, "quantum": 1.0}


def feedback_network(*widths: int, seed: int = 8, weight: float = 0.5, **neuron) -> nn.Sequential:
    """Layers of `widths`, a feedback of spectral norm 1, and a readout, in float64."""
    neuron = {"decay": 1.0, "threshold": 1.0, "subtract": 2.0} | neuron
    feedback = Linear(widths[-1], widths[0], bias=False)
    rest = Equilibrium(
        inject=Linear(FEATURES, widths[0]),
        feedback=feedback,
        neurons=[LIF(**neuron) for _ in widths],
        synapses=[Linear(a, b) for a, b in itertools.pairwise(widths)],
    )
    model = drawn(nn.Sequential(rest, Linear(widths[-1], CLASSES)), seed=seed, scale=weight)
    feedback.weight.data.div_(torch.linalg.matrix_norm(feedback.weight, 2))
    return model  # type: ignore[return-value]


EXACT = IDE(tolerance=0, iterations=60)


def mean_gradients(model: nn.Module, *rules: Rule, steps: int = 20) -> tuple[dict, ...]:
    return gradients_on(steps, model, *rules, over_time="mean")


def smallest_model() -> nn.Sequential:
    return feedback_network(8, 7)


def contract_rules() -> list[SPIDE]:
    return [SPIDE(scale=0.25)]


contract_exceptions = {
    "test_one_step_equals_bptt": (
        "SPIDE differentiates the clamp of a rate, BPTT a spike by its surrogate"
    )
}


class Chain:
    """Random layers in a ring with masks for each sample, and the beta of each of them by a direct
    solve.
    """

    def __init__(
        self, seed: int, sizes: tuple[int, ...], *, largest: float = 0.8, batch: int = 3
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        before = (sizes[-1], *sizes[:-1])
        weights = [
            torch.randn(n, m, generator=generator, dtype=torch.float64)
            for n, m in zip(sizes, before, strict=True)
        ]
        self.weights = [0.6 * w / torch.linalg.matrix_norm(w, 2) for w in weights]
        self.masks_BN = [(torch.rand(batch, n, generator=generator) < 0.7).double() for n in sizes]
        g_BN = torch.randn(batch, sizes[-1], generator=generator, dtype=torch.float64)
        inverses = torch.stack(
            [self._inverse([mask_BN[b] for mask_BN in self.masks_BN]) for b in range(batch)]
        )
        self.norm = inverses.abs().sum(-1).max().item()  # ||(I - J^T)^-1||_inf
        beta_BN = (inverses[..., -sizes[-1] :] @ g_BN[..., None]).squeeze(-1)
        factor = largest / beta_BN.abs().max()
        self.g_BN, self.beta = factor * g_BN, (factor * beta_BN).split(sizes, 1)

    def _inverse(self, masks_N: list[Tensor]) -> Tensor:
        """(I - J^T)^-1 of all layers together: block (l - 1, l) of J^T is W_l^T D_l."""
        blocks = [
            [torch.zeros(len(row), len(column)).double() for column in masks_N] for row in masks_N
        ]
        for layer, (weight, mask_N) in enumerate(zip(self.weights, masks_N, strict=True)):
            blocks[layer - 1][layer] = weight.T * mask_N
        joint = torch.cat([torch.cat(row, 1) for row in blocks])
        return torch.linalg.inv(torch.eye(len(joint)).double() - joint)

    def solve(
        self, steps: int, *, g_BN: Tensor | None = None, rows: slice = slice(None), **neuron: float
    ) -> Ternary:
        def back(layer: int, u_BN: Tensor, s_BN: Tensor) -> None:
            u_BN.addmm_(s_BN * self.masks_BN[layer][rows], self.weights[layer])

        g_BN = self.g_BN[rows] if g_BN is None else g_BN
        maps = [
            lambda u_BN, s_BN, layer=layer: back(layer, u_BN, s_BN)
            for layer in range(len(self.weights))
        ]
        return ternary_phase(
            g_BN, maps, [mask_BN[rows].shape for mask_BN in self.masks_BN], steps=steps, **neuron
        )

    def error(self, found: Ternary) -> float:
        return max((a - b).abs().max().item() for a, b in zip(found.beta, self.beta, strict=True))


RINGS = [(seed, sizes) for sizes in ((24,), (9, 12, 7)) for seed in range(4)]


@pytest.mark.parametrize(("seed", "sizes"), RINGS)
def test_the_error_falls_as_one_over_the_steps(seed, sizes):
    ring = Chain(seed, sizes)
    errors = [ring.error(ring.solve(steps, **SYMMETRIC)) for steps in STEPS]
    assert all(error <= ring.norm / steps for error, steps in zip(errors, STEPS, strict=True))
    assert math.log10(errors[2] / errors[0]) / 2 == pytest.approx(-1, abs=0.15)


@pytest.mark.parametrize("factor", [-1, 0, 4])
def test_emissions_follow_a_factor_of_the_input_and_of_their_size(factor):
    """The sign of the input, no input, and one that is four times as large with its neurons."""
    ring, size = Chain(0, (9, 12, 7)), max(1, abs(factor))
    one = ring.solve(60, **SYMMETRIC)
    other = ring.solve(60, g_BN=factor * ring.g_BN, threshold=0.5 * size, quantum=1.0 * size)
    assert all(map(torch.equal, other.beta, [factor * beta_BN for beta_BN in one.beta]))
    assert all(beta_BN.any() for beta_BN in one.beta) and other.rate == one.rate * (factor != 0)


def one_neuron(g: float, steps: int) -> Ternary:
    g_BN = torch.tensor([[g]]).double()
    return ternary_phase(g_BN, [lambda u_BN, s_BN: None], [g_BN.shape], steps=steps, **SYMMETRIC)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_threshold_reached_is_a_spike(sign):
    """u = 0.5 and an emission, 0 and none, 0.5 and an emission."""
    found = one_neuron(0.5 * sign, 3)
    assert (found.beta[0].item(), found.rate) == pytest.approx((sign * 2 / 3, 2 / 3))


def test_saturated_is_who_holds_back_more_than_one_emission():
    assert [one_neuron(g, 100).saturated for g in (0.99, 1.008, -1.05)] == [0, 0, 1]


def test_leaky_neurons_level_off():
    """The leaky mean hears the last 1 / (1 - decay) steps, so more of them than that change
    nothing.
    """
    ring = Chain(3, (24,))
    errors = [ring.error(ring.solve(steps, decay=0.99, **SYMMETRIC)) for steps in STEPS]
    assert errors[0] < ring.norm / 50
    assert 0.001 < errors[2] < ring.norm * 0.01
    assert errors[2] == pytest.approx(errors[1], rel=0.5)


class Recorded:
    """An adjoint that keeps what it returned, as emissions: beta without the scale, the batch and
    the backend's factor.
    """

    def __init__(self, model: nn.Module) -> None:
        equilibrium = find_equilibrium("SPIDE", model)
        self.adjoint: Any = equilibrium.adjoint
        self.seen: list[Tensor] = []
        equilibrium.adjoint = self

    def __call__(self, g_B: Tensor, vjp: Linearized) -> list[Tensor]:
        betas, phase = self.adjoint(g_B, vjp), self.adjoint
        gain = phase.scale * phase.samples
        emission = 2 * phase.threshold / phase.steps * phase.loss_factor / gain
        counts = torch.cat(betas, 1) / emission
        assert (counts - counts.round()).abs().max() < 1e-9
        self.seen.append(counts.round())
        return betas


def emissions(
    x_TB: Tensor, target_B: Tensor, *, factor: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of every backward neuron, [B, N], and the gradient divided by what the backend multiplies
    by.
    """
    rule, model = attached(SPIDE(100, scale=0.25), smallest_model(), over_time="mean")
    recorded = Recorded(model)
    for objective in rule.loss_terms(model, x_TB, cross_entropy(target_B)):
        (factor * objective.backward).backward()
    return recorded.seen[0], {name: p.grad / factor for name, p in model.named_parameters()}


def fall(errors: list[float]) -> float:
    """The slope of errors at a hundredfold number of steps."""
    return math.log10(errors[-1] / errors[0]) / 2


@pytest.mark.parametrize("widths", [(12,), (8, 9, 7)])
def test_the_gradient_approaches_ide_as_one_over_the_steps(widths):
    rules = [SPIDE(steps, scale=0.25) for steps in STEPS]
    exact, *found = mean_gradients(feedback_network(*widths), EXACT, *rules)
    for rule in rules:
        assert rule.metrics()["saturated"] == 0 < rule.metrics()["backward_rate"] < 0.5
    errors = [difference(each, exact) for each in found]
    assert max(g.abs().max() for g in exact.values()) > 0.1
    assert errors[0] < 0.02 and fall(errors) == pytest.approx(-1, abs=0.15)


def test_under_bf16_each_layer_gets_its_own_solution_in_its_own_type():
    model, (x_TBC, target_B) = feedback_network(8, 7).float(), batch(20)
    loss_fn, x_TBC = cross_entropy(target_B), x_TBC.float()
    full = gradients(SPIDE(100), model, x_TBC, loss_fn, over_time="mean")
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(SPIDE(100), model, x_TBC, loss_fn, over_time="mean")
    assert all(0 < (half[name] - full[name]).norm() < 0.2 * full[name].norm() for name in full)


def test_so_it_does_on_a_convolutional_network():
    layers = ((3, 3, 2), (4, 3, 2))
    model = convnet_f(CLASSES, in_channels=2, size=8, layers=layers, dropout=0.0).double()
    x_TBCHW = 3 * torch.randn(1, 5, 2, 8, 8).double().expand(30, -1, -1, -1, -1)
    exact, few, many = (
        gradients(rule, model, x_TBCHW, cross_entropy(batch(1)[1]), over_time="mean")
        for rule in (EXACT, SPIDE(100), SPIDE(1000))
    )
    assert max(g.abs().max() for g in exact.values()) > 0.1
    assert difference(many, exact) < 0.2 * difference(few, exact) < 0.02


def test_leaky_neurons_in_either_phase():
    """A decay of the forward phase leaves the equation as it is; one of the backward phase leaves a
    remainder.
    """
    rules = [SPIDE(5000, scale=0.25, decay=decay) for decay in (1.0, 0.99)]
    exact, even, leaky = mean_gradients(feedback_network(12, decay=0.9), EXACT, *rules)
    assert max(g.abs().max() for g in exact.values()) > 0.1
    assert difference(even, exact) < 0.001 < difference(leaky, exact) < 0.05


def test_the_scale_resolves_and_does_not_multiply():
    rules = [SPIDE(100, scale=scale) for scale in (0.01, 0.25, 100.0)]
    exact, *found = mean_gradients(feedback_network(8, 7), IDE(), *rules)
    small, right, large = (difference(each, exact) for each in found)
    assert right < 0.01 < 0.05 < min(small, large)


@pytest.mark.parametrize("error", ["sign_symmetric", "feedback"])
def test_another_weight_carries_its_errors_down_as_it_does_under_ide(error):
    inner = (EXACT, SPIDE(5000, scale=0.25))
    around = [HLOP(rule, rows=((2, 2, 2, 2),), error=error) for rule in inner]
    plain, ide, spide = mean_gradients(feedback_network(8, 7), IDE(), *around)
    assert difference(ide, spide) < 1e-3 < 1e-2 < difference(ide, plain)


@pytest.mark.parametrize("limit", ["spectral", "none"])
def test_events_are_handed_down_as_a_product_is(limit):
    """Sparse sums of rows against the transposed synapse; samples without an event, the last among
    them, and none at all.
    """
    rest = fc_feedback(in_features=6, hidden=9, limit=limit).double().equilibrium
    vjp = Linearized(rest, torch.rand(1, 5, 9).double(), 2 * torch.randn(1, 5, 9).double())
    s_BN = torch.randint(-1, 2, (5, 9)).double()
    s_BN[[1, 4]] = 0
    for emitted_BN in (s_BN, torch.zeros_like(s_BN)):
        u_BN = torch.ones(5, 9).double()
        _transposed_layer(vjp, 0)(u_BN, emitted_BN)
        expected_BN = 1 + vjp.transposed(0, vjp.masks[0] * emitted_BN / 2)
        assert torch.allclose(u_BN, expected_BN, atol=1e-14)
        assert bool((expected_BN != 1).any()) == bool(emitted_BN.any())


def test_spikes_know_neither_batch_nor_backend():
    x_TBC, target = batch(20, size=6)
    counts, gradient = emissions(x_TBC, target)
    assert counts.abs().sum() > 100 and counts.abs().max() < 100
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    for rows, factor in ((slice(None), 3.0), (slice(None), 0.37), (slice(None), 1e-6), (order, 1)):
        same_counts, same = emissions(x_TBC[:, rows], target[rows], factor=factor)
        assert torch.equal(same_counts, counts[rows]) and difference(same, gradient) < 1e-14
    total, found = dict.fromkeys(gradient, 0), []
    for rows in (range(1), range(1, 3), range(3, 6)):
        part, own = emissions(x_TBC[:, rows], target[rows], factor=len(rows) / 6)
        found.append(part)
        total = {name: total[name] + g * len(rows) / 6 for name, g in own.items()}
    assert torch.equal(torch.cat(found), counts) and difference(total, gradient) < 1e-14


def test_figures_are_of_both_phases():
    model, rule = smallest_model(), SPIDE(50, scale=0.25)
    record = spikes_of(model)
    one_batch(rule, model, 12, over_time="mean")
    spikes = torch.cat([torch.cat(layer).flatten() for layer in record.values()])
    figures = rule.metrics()
    assert figures["forward_rate"] == pytest.approx(spikes.mean().item(), abs=1e-12)
    assert 0.01 < figures["backward_rate"] < 0.5 and figures["saturated"] == 0


@pytest.mark.parametrize(
    ("scale", "message"), [(1e-3, "no backward neuron fired"), (1e4, r"\d+% .* saturated")]
)
def test_warns_once_where_the_scale_is_out_of_range(scale, message):
    rule = SPIDE(50, scale=scale)
    with pytest.warns(RuntimeWarning, match=rf"^SPIDE: {message}"):
        mean_gradients(feedback_network(12), rule, steps=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean_gradients(feedback_network(12, seed=9), rule, steps=12)


def test_a_gradient_that_is_not_finite_is_handed_on_as_that():
    x_TBC, _ = batch(12)
    with pytest.warns(
        RuntimeWarning, match="Equilibrium: the gradient of the loss must be finite; got nan"
    ):
        found = gradients(
            SPIDE(), smallest_model(), x_TBC, lambda o: o.sum() * math.nan, over_time="mean"
        )
    assert all(g.isnan().any() for g in found.values())


test_refuses = refusals(
    [
        (lambda: SPIDE(0), r"SPIDE: steps must be a whole number >= 1; got steps=0"),
        (lambda: SPIDE(scale=0), r"SPIDE: scale must be > 0 and finite; got scale=0"),
        (lambda: SPIDE(scale=math.inf), r"SPIDE: scale must be > 0 and finite; got scale=inf"),
        (lambda: SPIDE(threshold=-1), r"SPIDE: threshold must be > 0; got threshold=-1"),
        (lambda: SPIDE(decay=0), r"SPIDE: decay must be > 0 and at most 1; got decay=0"),
        (
            lambda: SPIDE().attach(lif_network(), over_time="mean"),
            r"SPIDE: the model must have exactly one Equilibrium; got none in",
        ),
        (
            lambda: SPIDE().attach(smallest_model()),
            r"SPIDE: over_time must be 'mean', because the rule has only one loss, of rates",
        ),
    ]
)


def test_a_tiny_recipe_has_a_short_backward_phase():
    recipe = load_recipe(Path("recipes/fashion/spide.py"))
    assert isinstance(recipe, Recipe)
    assert recipe.rule.kwargs["steps"] == 100
    assert recipe.tiny().rule == recipe.rule.with_(steps=4)
