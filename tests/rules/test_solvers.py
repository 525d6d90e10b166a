import itertools

import pytest
import torch
from torch import Tensor

from pipeline.rules import ide
from pipeline.rules.ide import broyden, fixed_point

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


@pytest.mark.parametrize("solve", SOLVERS)
def test_stopped_samples_are_not_moved_by_the_others(solve):
    J, g, _ = problem(2)
    J[0] = 0
    short, long = (
        solve(g, times(J), iterations=n, tolerance=1e-8) for n in (27, 60)
    )  # 27: 2^-27 is below the tolerance
    assert (
        torch.equal(short.beta_B[0], long.beta_B[0]) and long.iterations_B[0] < long.iterations_B[1]
    )
    assert relative(long.beta_B[:1], g[:1]).item() <= 1e-8


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
        found = broyden(g, times(J), iterations=n, tolerance=0.0)
        assert (
            found.beta_B[0] - expected
        ).norm() < 1e-10  # the residual fell at each step, so the last is the lowest


def test_broyden_needs_fewer_evaluations():
    J, g, _ = problem(radius=0.5)
    one, other = (
        solve(g, times(J), iterations=100, tolerance=1e-8).iterations_B for solve in SOLVERS
    )
    assert (2 * one <= other).all()


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
    found = solve(g, times(J), iterations=30, tolerance=1e-6)
    assert not found.residual_B[0] <= 0.5
    assert found.residual_B[1] <= 1e-6


def test_any_shape():
    J, g, beta = problem(3, units=24)
    found = broyden(
        g.view(3, 2, 3, 4),
        lambda v: times(J)(v.flatten(1)).view_as(v),
        iterations=60,
        tolerance=1e-12,
    )
    assert relative(found.beta_B.flatten(1), beta).max() < 1e-11


def test_an_explosion_is_left_alone():
    J, g, _ = problem(2)
    J[0] *= 100
    calls = []

    def counted(v):
        calls.append(v.abs().max().item())
        return times(J)(v)

    fixed_point(g, counted, iterations=1000, tolerance=1e-12)
    assert len(calls) < 200 and max(calls) < 1e3 * ide.ESCAPED
