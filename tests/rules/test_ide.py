"""IDE against what it stands for: autograd through the iteration that it never runs, and
differences of its own fixed point.
"""

# T time, B batch

import itertools
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.feedback import fc_feedback
from pipeline.recipe.recipe import spec
from pipeline.rules.hlop import HLOP
from pipeline.rules.ide import DIVERGED_RESIDUAL, IDE, Solution, broyden, fixed_point
from pipeline.spiking.encode import repeat
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.neuron import IF, LIF
from pipeline.spiking.norm_limit import SpectralLimit
from pipeline.spiking.synapse import Conv2d, Linear
from pipeline.track.journal import read
from tests.helpers.rule_networks import (
    CLASSES,
    FEATURES,
    Network,
    attached,
    batch,
    cross_entropy,
    difference,
    drawn,
    gradients,
    gradients_on,
    learn,
    lif_network,
    outputs,
    refusals,
)
from tests.helpers.small import same_weights, small_recipe, train_inline

ITERATIONS = 400


def seeded(model: nn.Sequential, *, seed: int, scale: float = 0.9) -> nn.Sequential:
    for module in drawn(model, seed=seed, scale=scale).modules():
        if isinstance(module, SpectralLimit):
            nn.init.constant_(module.gain, 0.9)  # inside the clamp, where it learns
    return model


def smallest_model() -> nn.Sequential:
    """Two layers of IF, the feedback limited."""
    equilibrium = Equilibrium(
        inject=Linear(FEATURES, 8),
        feedback=SpectralLimit(Linear(7, 8, bias=False)),
        neurons=[IF(), IF()],
        synapses=[Linear(8, 7)],
    )
    return seeded(nn.Sequential(equilibrium, Linear(7, CLASSES)), seed=3)


def contract_rules() -> list[IDE]:
    return [IDE(), IDE(solver="fixed_point")]


contract_exceptions = {
    "test_one_step_equals_bptt": (
        "IDE differentiates the clamp of a rate at rest, BPTT the surrogate of a spike; at T ="
        " 1 too"
    )
}


def fully_connected(*, decay: float = 1.0) -> nn.Sequential:
    equilibrium = Equilibrium(
        inject=Linear(FEATURES, 9),
        feedback=Linear(9, 9, bias=False),
        neurons=[LIF(decay, threshold=2.0)],
    )
    model = seeded(nn.Sequential(equilibrium, Linear(9, CLASSES)).double(), seed=6)
    with torch.no_grad():
        feedback: Tensor = equilibrium.feedback.weight  # type: ignore[assignment]
        feedback.div_(torch.linalg.matrix_norm(feedback, 2))
    return model


def two_layers(*, decay: float = 1.0) -> nn.Sequential:
    equilibrium = Equilibrium(
        inject=Linear(FEATURES, 9),
        feedback=SpectralLimit(Linear(7, 9, bias=False)),
        neurons=[LIF(decay, threshold=1.0), LIF(decay, threshold=1.0, subtract=1.5)],
        synapses=[Linear(9, 7)],
    )
    return seeded(nn.Sequential(equilibrium, Linear(7, CLASSES)).double(), seed=4)


FLAT = Network(lambda m, x_TB: x_TB.flatten(2))


def convolutional(*, decay: float = 1.0) -> nn.Sequential:
    equilibrium = Equilibrium(
        inject=Conv2d(2, 4, 3, 2, 1),
        feedback=Conv2d(3, 4, 3, 1, 1, bias=False),
        neurons=[LIF(decay), LIF(decay)],
        synapses=[Conv2d(4, 3, 3, 1, 1)],
    )
    return seeded(
        nn.Sequential(equilibrium, FLAT, Linear(3 * 3 * 3, CLASSES)).double(), seed=5, scale=0.25
    )


Reference = Callable[[dict[str, Tensor], Tensor, Tensor], tuple[Tensor, list[Tensor]]]


def fully_connected_map(
    p: dict[str, Tensor], x_B: Tensor, a_B: Tensor
) -> tuple[Tensor, list[Tensor]]:
    c = (x_B @ p["0.inject.weight"].T + p["0.inject.bias"] + a_B @ p["0.feedback.weight"].T) / 2
    return c.clamp(0, 1), [c]


def two_layers_map(p: dict[str, Tensor], x_B: Tensor, a_B: Tensor) -> tuple[Tensor, list[Tensor]]:
    V = p["0.feedback.synapse.weight"]
    W = p["0.feedback.gain"] * V / torch.linalg.matrix_norm(V, 2)
    c1 = x_B @ p["0.inject.weight"].T + p["0.inject.bias"] + a_B @ W.T
    c2 = (c1.clamp(0, 1) @ p["0.synapses.0.weight"].T + p["0.synapses.0.bias"]) / 1.5
    return c2.clamp(0, 1), [c1, c2]


def convolutional_map(
    p: dict[str, Tensor], x_B: Tensor, a_B: Tensor
) -> tuple[Tensor, list[Tensor]]:
    c1 = F.conv2d(x_B, p["0.inject.weight"], p["0.inject.bias"], stride=2, padding=1)
    c1 = c1 + F.conv2d(a_B, p["0.feedback.weight"], padding=1)
    c2 = F.conv2d(c1.clamp(0, 1), p["0.synapses.0.weight"], p["0.synapses.0.bias"], padding=1)
    return c2.clamp(0, 1), [c1, c2]


NETWORKS: dict[
    str, tuple[Callable[..., nn.Sequential], Reference, tuple[int, ...], tuple[int, ...]]
] = {
    "fully connected": (fully_connected, fully_connected_map, (FEATURES,), (9,)),
    "two layers": (two_layers, two_layers_map, (FEATURES,), (7,)),
    "convolutional": (convolutional, convolutional_map, (2, 6, 6), (3, 3, 3)),
}


def image(shape: tuple[int, ...], *, size: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_B = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
    return x_B, torch.randint(CLASSES, (size,), generator=generator)


def example(network: str, **how: float) -> tuple[nn.Sequential, Tensor, Tensor]:
    build, _, shape, _ = NETWORKS[network]
    return (build(**how), *image(shape))


every_network = pytest.mark.parametrize("network", NETWORKS)


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}


def rest(network: str, p: dict[str, Tensor], x_B: Tensor) -> Tensor:
    _, reference, _, shape = NETWORKS[network]
    a_B = torch.zeros(len(x_B), *shape, dtype=torch.float64)
    for _ in range(ITERATIONS):
        a_B, _ = reference(p, x_B, a_B)
    return a_B


def loss_at_rest(network: str, p: dict[str, Tensor], x_B: Tensor, target_B: Tensor) -> Tensor:
    readout = [name.removesuffix(".weight") for name in p if name.endswith(".weight")][-1]
    logits_BK = rest(network, p, x_B).flatten(1) @ p[f"{readout}.weight"].T + p[f"{readout}.bias"]
    return F.cross_entropy(logits_BK, target_B)


def by_unrolling(
    network: str, model: nn.Module, x_B: Tensor, target_B: Tensor
) -> dict[str, Tensor]:
    p = named(model)
    found = torch.autograd.grad(loss_at_rest(network, p, x_B, target_B), list(p.values()))
    return dict(zip(p, found, strict=True))


def at_rest(monkeypatch: pytest.MonkeyPatch, network: str, model: nn.Module, x_B: Tensor) -> None:
    """The simulation ends at the solved fixed point instead of a[T]."""
    a_B = rest(network, {name: p.detach() for name, p in model.named_parameters()}, x_B)
    monkeypatch.setattr(Equilibrium, "_simulate", lambda self, x_TB, current_1B: a_B.unsqueeze(0))


def solved(solver: str = "broyden") -> IDE:
    return IDE(solver=solver, iterations=200, tolerance=1e-13)


def ide(
    rule: IDE, model: nn.Module, x_B: Tensor, target_B: Tensor, *, steps: int = 1
) -> dict[str, Tensor]:
    return gradients(rule, model, repeat(x_B, steps), cross_entropy(target_B), over_time="mean")


@pytest.mark.parametrize("solver", ["broyden", "fixed_point"])
@every_network
def test_at_the_fixed_point_the_gradient_is_autograds_through_400_iterations(
    network, solver, monkeypatch
):
    model, x_B, target = example(network)
    expected = by_unrolling(network, model, x_B, target)
    at_rest(monkeypatch, network, model, x_B)
    assert all(g.abs().max() > 1e-4 for g in expected.values())
    assert difference(ide(solved(solver), model, x_B, target), expected) < 1e-12


@every_network
def test_the_input_gets_its_gradient(network, monkeypatch):
    model, x_B, target = example(network)
    ours, reference = (x_B.clone().requires_grad_() for _ in range(2))
    loss = loss_at_rest(network, named(model), reference, target)
    at_rest(monkeypatch, network, model, x_B)
    ide(solved(), model, ours, target)
    assert torch.allclose(ours.grad, torch.autograd.grad(loss, reference)[0], atol=1e-12)


def error_at(
    steps: int, *, network: str = "fully connected", decay: float = 1.0
) -> tuple[float, float]:
    """Relative error of the gradient at a[T], and the largest distance of the rate from the fixed
    point.
    """
    model, x_B, target = example(network, decay=decay)
    expected = by_unrolling(network, model, x_B, target)
    got = ide(solved(), model, x_B, target, steps=steps)
    a_B = rest(network, named(model), x_B)
    rate_B = outputs(model[0], repeat(x_B, steps)).mean(0)
    flat, exact = (torch.cat([g.flatten() for g in grads.values()]) for grads in (got, expected))
    return ((flat - exact).norm() / exact.norm()).item(), (rate_B - a_B).abs().max().item()


@pytest.mark.parametrize("network", NETWORKS)
def test_if_approaches_the_fixed_point_as_one_over_t(network):
    gaps = {steps: error_at(steps, network=network) for steps in (10, 100, 1000)}
    assert all(steps * gap < 4 for steps, (_, gap) in gaps.items())
    assert gaps[1000][1] < 0.03 * gaps[10][1]
    assert gaps[1000][0] < 0.05 * gaps[10][0]  # the gradient's error follows


def test_lif_levels_off():
    gaps = {steps: error_at(steps, decay=0.95)[1] for steps in (10, 100, 400, 800)}
    assert gaps[100] < gaps[10]
    assert 0.5 < gaps[800] / gaps[400] < 2
    assert gaps[800] > 20 * error_at(800)[1]


def test_units_of_a_sample_know_nothing_of_the_other_samples():
    model, (x_B, target) = two_layers(), image((FEATURES,), size=8)
    whole, *parts = (
        ide(IDE(), model, x_B[rows], target[rows], steps=6)
        for rows in (slice(None), *(slice(i, i + 2) for i in range(0, 8, 2)))
    )
    mean = {name: torch.stack([part[name] for part in parts]).mean(0) for name in whole}
    assert difference(whole, mean) < 1e-15


def test_the_scale_of_the_loss_changes_nothing():
    model, (x_B, target) = two_layers(), image((FEATURES,))
    loss_fn = cross_entropy(target)
    one, other = (
        gradients(IDE(), model, repeat(x_B, 6), lambda o, s=s: s * loss_fn(o), over_time="mean")
        for s in (1.0, 2.0**-20)
    )
    assert difference(one, {name: 2.0**20 * g for name, g in other.items()}) < 1e-15


def test_frames_are_averaged_by_the_weights_of_the_rate():
    """An input that changes has the gradient of its weighted mean, at the rate that it led to."""
    model, (x_TB, target) = fully_connected(decay=0.8), batch(6)
    weights_T = 0.8 ** torch.arange(5, -1, -1, dtype=torch.float64)
    mean_B = (weights_T[:, None, None] * x_TB).sum(0) / weights_T.sum()
    p = named(model)
    a_B = outputs(model[0], x_TB).mean(0).requires_grad_()
    f_B, _ = fully_connected_map(p, mean_B, a_B)
    (g_B,) = torch.autograd.grad(F.cross_entropy(a_B @ p["1.weight"].T + p["1.bias"], target), a_B)
    beta_B = g_B
    for _ in range(200):
        beta_B = g_B + torch.autograd.grad(f_B, a_B, beta_B, retain_graph=True)[0]
    names = ("0.inject.weight", "0.inject.bias", "0.feedback.weight")
    expected = torch.autograd.grad(f_B, [p[name] for name in names], beta_B)
    (got,) = gradients_on(6, model, solved(), over_time="mean")
    for name, value in zip(names, expected, strict=True):
        assert torch.allclose(got[name], value, atol=1e-12)


def test_convergence_is_reported():
    rule = IDE(tolerance=1e-6)
    ide(rule, fully_connected(), *image((FEATURES,)), steps=20)
    figures = rule.metrics()
    assert figures.keys() == {"residual", "iterations"}
    assert 0 < figures["residual"] < 1e-6 and 1 < figures["iterations"] < 30


def test_a_coarse_solve_warns_once():
    rule = IDE(iterations=1)
    message = r"IDE: the gradient is coarse; got .* \|g\| after 1 iterations of broyden"
    with pytest.warns(RuntimeWarning, match=message):
        ide(rule, fully_connected(), *image((FEATURES,)), steps=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ide(rule, fully_connected(), *image((FEATURES,)), steps=20)


def too_strong() -> nn.Module:
    """One unit inside the clamp that answers itself threefold."""
    model = nn.Sequential(
        Equilibrium(inject=Linear(1, 1), feedback=Linear(1, 1, bias=False), neurons=[IF()]),
        Linear(1, 2),
    ).double()
    for parameter, value in zip(model.parameters(), (1.0, 0.0, 3.0), strict=False):
        nn.init.constant_(parameter, value)
    return model


def is_nan(model: nn.Module) -> Tensor:
    return model.get_parameter("0.inject.weight").grad.isnan()  # type: ignore[union-attr]


def test_a_loss_that_is_not_finite_is_not_blamed_on_the_solve():
    rule, model = attached(IDE(), smallest_model(), over_time="mean")
    terms = rule.loss_terms(
        model, torch.rand(3, 4, FEATURES).double(), lambda o: o.sum() * math.nan
    )
    with pytest.warns(
        RuntimeWarning, match=r"Equilibrium: the gradient of the loss must be finite; got nan"
    ):
        learn(terms)
    assert not rule.is_unsolved() and is_nan(model).any()


def test_a_solve_that_diverges_says_what_to_do_and_gives_no_gradient(monkeypatch):
    """For the whole of the batch, whatever of it can be solved, as a micro-batch that saturates the
    unit.
    """
    a_1B = torch.full((1, 4, 1), 0.3).double()
    monkeypatch.setattr(Equilibrium, "_simulate", lambda self, x_TB, current_1B: a_1B)
    rule, model = attached(IDE(solver="fixed_point"), too_strong(), over_time="mean")
    loss_fn = cross_entropy(torch.zeros(4, dtype=torch.int64))

    def unsolved(x: float, *, step: int) -> bool:
        """Whether the batch counts as unsolved after a micro-batch of this input."""
        learn(rule.loss_terms(model, torch.full((1, 4, 1), x).double(), loss_fn, step=step))
        return rule.is_unsolved()

    message = (
        r"IDE: the residual of beta = g \+ J\^T beta must be at most .*; got .* for 4 of 4"
        r" samples, after at most 30 iterations of fixed_point; limit the synapses"
        r" \(SpectralLimit\)"
    )
    with pytest.warns(RuntimeWarning, match=message):
        assert unsolved(-0.5, step=0)
    assert is_nan(model).all() and HLOP(rule, rows=((1,),)).is_unsolved()  # as the rule inside it
    assert [unsolved(5.0, step=step) for step in (0, 1)] == [True, False]


def test_a_batch_that_is_not_solved_is_skipped(tmp_path, monkeypatch):
    model, solves = spec(fc_feedback, in_features=64, hidden=12), itertools.count()
    recipe = small_recipe(model=model, rule=spec(IDE), over_time="mean")

    def solve(g_B: Tensor, vjp: Callable[[Tensor], Tensor], **how: Any) -> Solution:
        found = broyden(g_B, vjp, **how)
        if next(solves) == 4:
            found.residual_B = torch.ones_like(found.residual_B)
        return found

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.rules.ide.broyden", solve)
        with pytest.warns(RuntimeWarning, match="IDE: the residual of beta = .* must be at most"):
            train_inline(tmp_path / "hit", recipe)
    events = read(tmp_path / "hit" / "journal.jsonl")
    reason = "its gradient is not finite on 1 of 1 worker: IDE could not solve for it on 1"
    assert [(e["step"], e["reason"]) for e in events if e["event"] == "skipped"] == [(4, reason)]
    train_inline(tmp_path / "skipped", recipe.override({"policy.skip": ((4, 5),)}))
    assert same_weights(tmp_path / "hit", tmp_path / "skipped")


test_refuses = refusals(
    [
        (call, re.escape(message))
        for call, message in [
            (
                lambda: IDE(solver="newton"),
                "IDE: solver must be 'broyden' or 'fixed_point'; got solver='newton'",
            ),
            (
                lambda: IDE(iterations=0),
                "IDE: iterations must be a whole number >= 1; got iterations=0",
            ),
            (
                lambda: IDE(tolerance=1.0),
                "IDE: tolerance is relative to the gradient and must be in 0..1, 1 excluded; got"
                " tolerance=1.0",
            ),
            (
                lambda: IDE().attach(lif_network(), over_time="mean"),
                ("IDE: the model must have exactly one Equilibrium; got none in Sequential"),
            ),
            (
                lambda: IDE().attach(
                    nn.ModuleList([smallest_model(), smallest_model()]), over_time="mean"
                ),
                ("IDE: the model must have exactly one Equilibrium; got 0.0 and 1.0 in ModuleList"),
            ),
            (
                lambda: IDE().attach(nn.Sequential(*smallest_model(), LIF()), over_time="mean"),
                "IDE: every neuron must be inside the Equilibrium; got 2 outside",
            ),
            (
                lambda: IDE().attach(smallest_model()),
                "IDE: over_time must be 'mean', because the rule has only one loss, of rates; got",
            ),
        ]
    ]
)


def test_bf16_solves_in_fp32():
    model, (x_B, target), rule = two_layers().float(), image((FEATURES,)), IDE(tolerance=1e-6)
    full = ide(IDE(), model, x_B.float(), target, steps=6)
    with torch.autocast("cpu", torch.bfloat16):
        half = ide(rule, model, x_B.float(), target, steps=6)
    assert rule.metrics()["residual"] < 1e-6
    assert all(0 < (half[name] - full[name]).norm() < 0.05 * full[name].norm() for name in full)


# ----------------------------------------------------------------------------------------- solvers


SOLVERS = [broyden, fixed_point]


def problem(
    size: int = 6, units: int = 20, *, radius: float = 0.6, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """J^T of each sample's own, with spectral norm `radius`; g over five decades; the solution by a
    dense solve.
    """
    generator = torch.Generator().manual_seed(seed)
    J_BDD = torch.randn(size, units, units, generator=generator, dtype=torch.float64)
    J_BDD = radius * J_BDD / torch.linalg.matrix_norm(J_BDD, 2)[:, None, None]
    g_BD = (
        torch.randn(size, units, generator=generator, dtype=torch.float64)
        * 10.0 ** -torch.arange(size)[:, None]
    )
    beta_BD = torch.linalg.solve(
        torch.eye(units, dtype=torch.float64) - J_BDD, g_BD.unsqueeze(2)
    ).squeeze(2)
    return J_BDD, g_BD, beta_BD


def times(J_BDD: Tensor):
    return lambda v_BD: (J_BDD @ v_BD.unsqueeze(2)).squeeze(2)


def relative(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)


@pytest.mark.parametrize("solve", SOLVERS)
def test_solves_to_the_tolerance_of_each_sample(solve):
    J, g, beta = problem()
    found = solve(g, times(J), iterations=200, tolerance=1e-12)
    assert relative(found.beta_B, beta).max() < 1e-11
    assert found.residual_B.max() <= 1e-12
    assert torch.allclose(
        found.residual_B, relative(times(J)(found.beta_B) + g - found.beta_B + g, g), atol=1e-15
    )


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_sample_stops_on_its_own_and_keeps_its_solution(solve):
    J, g, _ = problem()
    J = J * torch.tensor([0.0, 0.1, 0.5, 1.0, 1.2, 1.4], dtype=torch.float64)[:, None, None]
    together = solve(g, times(J), iterations=100, tolerance=1e-6)
    assert len(set(together.iterations_B.tolist())) > 3
    assert together.residual_B.max() <= 1e-6
    for b in range(len(g)):
        alone = solve(g[b : b + 1], times(J[b : b + 1]), iterations=100, tolerance=1e-6)
        assert alone.iterations_B.item() == together.iterations_B[b].item()
        assert relative(alone.beta_B, together.beta_B[b : b + 1]).item() < 1e-14


def dense_broyden(J_DD: Tensor, g_D: Tensor, iterations: int) -> list[Tensor]:
    """The iterates, with the inverse Jacobian written out."""
    H, beta, r = -torch.eye(len(g_D), dtype=torch.float64), torch.zeros_like(g_D), g_D
    found = []
    for _ in range(iterations):
        delta = -H @ r
        beta = beta + delta
        new = J_DD @ beta + g_D - beta
        dr = new - r
        H = H + torch.outer(delta - H @ dr, delta @ H) / (delta @ H @ dr)
        r = new
        found.append(beta)
    return found


def test_broydens_iterates_are_those_of_the_dense_method():
    J, g, _ = problem(1, radius=0.9)
    for n, expected in enumerate(dense_broyden(J[0], g[0], 8), start=1):
        assert (
            broyden(g, times(J), iterations=n, tolerance=0.0).beta_B[0] - expected
        ).norm() < 1e-10  # the residual fell at each step, so the last is the lowest


def test_broyden_solves_what_is_no_contraction_and_the_fixed_point_escapes():
    J, g, beta = problem(3, units=4)
    J = J.abs() * 4
    beta = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - J, g.unsqueeze(2)).squeeze(2)
    assert relative(broyden(g, times(J), iterations=60, tolerance=1e-10).beta_B, beta).max() < 1e-8
    assert fixed_point(g, times(J), iterations=200, tolerance=1e-10).residual_B.min() > 1


def test_broyden_returns_the_iterate_of_lowest_residual():
    J, g, _ = problem(3, units=30, radius=3.0)
    found = broyden(g, times(J), iterations=12, tolerance=1e-10)
    assert torch.allclose(
        found.residual_B, relative(times(J)(found.beta_B) - found.beta_B + 2 * g, g)
    )
    longer = [broyden(g, times(J), iterations=n, tolerance=1e-10).residual_B for n in range(1, 13)]
    assert all((after <= before).all() for before, after in itertools.pairwise(longer))
    assert (found.residual_B <= 1).all()


@pytest.mark.parametrize("solve", SOLVERS)
def test_nothing_in_is_nothing_out(solve):
    J, g, _ = problem(3)
    g[1] = 0
    found = solve(g, times(J), iterations=30, tolerance=1e-6)
    assert (
        found.beta_B[1].abs().max() == 0 and found.residual_B[1] == 0 and found.iterations_B[1] == 0
    )
    assert torch.isfinite(found.beta_B).all()


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_gradient_that_is_not_finite_is_not_called_solved(solve):
    J, g, _ = problem(2)
    g[0, 0] = float("nan")
    bad, good = solve(g, times(J), iterations=30, tolerance=1e-6).residual_B
    assert not bad <= 0.5 and good <= 1e-6


def test_an_explosion_is_left_alone():
    J, g, _ = problem(2)
    J[0] *= 100
    calls = []

    def counted(v):
        calls.append(v.abs().max().item())
        return times(J)(v)

    fixed_point(g, counted, iterations=1000, tolerance=1e-12)
    assert len(calls) < 200 and max(calls) < 1e3 * DIVERGED_RESIDUAL
