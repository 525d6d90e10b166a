"""Implicit differentiation at the equilibrium of a feedback network, and its linear solvers.

`fixed_point` and `broyden` solve beta = g + J^T beta for each sample of a batch separately. They
start at beta = 0 and evaluate J^T v for the whole batch. A sample stops when its residual |g + J^T
beta - beta| is at most `tolerance` |g|. So its solution depends neither on its batch nor on the
scale of the loss. A stopped sample keeps its solution while the others continue.
"""

# T time, B batch, K classes or terms of a low-rank history, N layers, D units of a sample

import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of, require
from pipeline.rules.base import OverTime, Rule, World, refuse_foreign_norms
from pipeline.spiking.equilibrium import Linearized, find_equilibrium

# IDE warns if the mean residual of a batch exceeds COARSE. If the residual of a sample exceeds
# UNSOLVED, the batch has no gradient.
COARSE, UNSOLVED = 0.05, 0.5
ESCAPED = 1e6


class IDE(Rule):
    """Differentiate L = loss_of(readout of a[T]) as if a[T] were the fixed point a* = f(a*).

        dL/dtheta = beta^T df/dtheta at a[T],   beta = g + J^T beta
        g = dL/da[T],   J = df/da at a[T]

    f is the map of `spiking/equilibrium.py`. The T steps are simulated without a graph, so memory
    does not grow with T. The gradient is exact at the fixed point, except at the kinks of the
    clamp. At a[T] its error falls as 1/T.

    beta is solved by limited-memory Broyden or by a damped fixed-point iteration, see `tolerance`
    and `iterations`. The metrics are the residual and the iterations of the last solved batch. A
    mean residual above 5 % gives one warning. If more than half of g remains, as when J is not a
    contraction, the rule warns and the batch's gradient is NaN, so that nothing is learnt from it.

    The published code used the damped fixed point ("iter") for N-MNIST. It solves (2I - J^T) beta =
    g, whose solution is half as large for a small J. Here both solvers solve the paper's equation.

    Args:
        iterations: the largest number of evaluations of J^T per solve.
        tolerance: a sample stops at a residual of at most `tolerance` |g|.

    Raises: ValueError for an unknown solver, iterations < 1 or tolerance outside 0..1 (when made);
    for a model without an `Equilibrium`, with several, with neurons outside it, or with a norm that
    mixes time steps (`attach`).
    Source: Xiao et al. 2021 (arXiv 2109.14247).
    """

    memory: Literal["constant", "linear"] = "constant"
    over_time_choices: tuple[OverTime, ...] = ("mean",)

    def __init__(
        self,
        *,
        solver: Literal["broyden", "fixed_point"] = "broyden",
        iterations: int = 30,
        tolerance: float = 1e-5,
    ) -> None:
        super().__init__()
        refuse_unless_one_of("IDE", ("broyden", "fixed_point"), solver=solver)
        refuse_unless_counts("IDE", {"iterations": iterations})
        require(
            0 <= tolerance < 1,
            "IDE: tolerance is relative to the gradient and must be in 0..1; got"
            f" tolerance={tolerance}",
        )
        self.forecast_note = f"at its most solver iterations, {iterations}"
        self.adjoint = _Adjoint(solver, iterations, tolerance)

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        equilibrium = find_equilibrium(self.label, model)
        refuse_foreign_norms(self.label, model)
        super().attach(model, world=world, over_time=over_time)
        self.set_seam(equilibrium, "adjoint", self.adjoint)

    def begin_batch(self) -> None:
        self.adjoint.is_unsolved = False

    def metrics(self) -> dict[str, float]:
        return self.adjoint.metrics

    def is_unsolved(self) -> bool:
        return self.adjoint.is_unsolved

    _loss_terms = Rule._one_loss_term  # the model gives one step of logits, of a[T]


class _Adjoint:
    """The seam `Equilibrium.adjoint`. It holds no references to rule or model.

    `metrics` are the mean relative residual and the mean evaluations of J^T per sample, over the
    last solved micro-batch.
    """

    def __init__(
        self, solver: Literal["broyden", "fixed_point"], iterations: int, tolerance: float
    ) -> None:
        self.solver, self.iterations, self.tolerance = solver, iterations, tolerance
        self.metrics = {"residual": math.nan, "iterations": math.nan}
        self.is_unsolved, self.warned = False, False

    def __call__(self, g_B: Tensor, vjp: Linearized) -> Tensor:
        solve = broyden if self.solver == "broyden" else fixed_point
        solution = solve(g_B, vjp, iterations=self.iterations, tolerance=self.tolerance)
        solved_B = solution.residual_B <= UNSOLVED  # False for NaN
        if not solved_B.all():
            self.is_unsolved = True
            warnings.warn(
                "IDE: the solve of beta = g + J^T beta must converge; got a residual of"
                f" {solution.residual_B.max().item():.2g} |g| on {int((~solved_B).sum())} of"
                f" {len(solved_B)} samples after {self.iterations} iterations of {self.solver};"
                " limit the synapses (SpectralLimit), raise the threshold, or lower the learning"
                " rate",
                RuntimeWarning,
                stacklevel=2,
            )
            return torch.full_like(g_B, math.nan)
        residual = solution.residual_B.mean().item()
        if residual > COARSE and not self.warned:
            self.warned = True
            warnings.warn(
                f"IDE: {self.solver} left a residual of {residual:.2g} |g| after"
                f" {self.iterations} iterations, so the gradient is coarse; allow more iterations,"
                " or limit the synapses",
                RuntimeWarning,
                stacklevel=2,
            )
        self.metrics = {
            "residual": residual,
            "iterations": solution.iterations_B.double().mean().item(),
        }
        return solution.beta_B


class Solution:
    """The solution of each sample so far.

    `keep` says which iterate it is: the last one, or the one of the lowest residual.
    `beta_B` is the solution, `residual_B` its |g + J^T beta - beta| / |g| (0 if g is 0), and
    `iterations_B` the number of its evaluations of J^T. `running_B` marks unfinished samples.
    """

    def __init__(self, g_B: Tensor, tolerance: float, *, keep: str) -> None:
        self.tolerance = tolerance
        self.keep = keep
        self.scale_B = _norm(g_B)
        self.beta_B = torch.zeros_like(g_B)
        self.residual_B = torch.where(self.scale_B == 0, 0.0, 1.0).to(self.scale_B.dtype)
        self.running_B = self.residual_B > tolerance
        self.iterations_B = torch.zeros_like(self.running_B, dtype=torch.int64)

    def of_running(self, step_B: Tensor) -> Tensor:
        """The step of running samples, 0 for all others; diverged samples would overflow."""
        return torch.where(_over(self.running_B, step_B), step_B, 0)

    def take(self, beta_B: Tensor, r_B: Tensor) -> None:
        now_B = _norm(r_B) / self.scale_B
        taken_B = (
            self.running_B & (now_B < self.residual_B) if self.keep == "lowest" else self.running_B
        )
        self.residual_B = torch.where(taken_B, now_B, self.residual_B)
        self.beta_B = torch.where(_over(taken_B, beta_B), beta_B, self.beta_B)
        self.iterations_B = self.iterations_B + self.running_B
        # False for NaN.
        self.running_B = self.running_B & (now_B > self.tolerance) & (now_B < ESCAPED)


@torch.no_grad()
def fixed_point(
    g_B: Tensor, transposed: Callable[[Tensor], Tensor], *, iterations: int, tolerance: float
) -> Solution:
    """beta <- (beta + J^T beta + g) / 2.

    It converges if every eigenvalue of J lies within 2 of -1, which includes every contraction.

    Source: Xiao et al. 2021 (IDE, arXiv 2109.14247), the solver of its N-MNIST runs. The published
    code iterates beta <- (J^T beta + g) / 2, and so solves another equation: beta = (g + J^T beta)
    / 2.
    """
    solution = Solution(g_B, tolerance, keep="last")
    beta_B, r_B = torch.zeros_like(g_B), g_B
    for _ in range(iterations):
        if not solution.running_B.any():
            break
        beta_B = torch.add(beta_B, r_B, alpha=0.5)
        r_B = transposed(beta_B) + g_B - beta_B
        solution.take(beta_B, r_B)
        r_B = solution.of_running(r_B)
    return solution


@torch.no_grad()
def broyden(
    g_B: Tensor, transposed: Callable[[Tensor], Tensor], *, iterations: int, tolerance: float
) -> Solution:
    """Broyden's good method on r(beta) = g + J^T beta - beta, without line search.

    It returns the iterate with the lowest residual.

        delta = -H r(beta),   beta <- beta + delta
        H <- H + (delta - H dr) (delta^T H) / (delta^T H dr),   H_0 = -I

    H is stored as -I and one rank-one term per iteration and sample: 2 x iterations x D numbers per
    sample.

    Source: Broyden 1965 (doi 10.1090/S0025-5718-1965-0198670-6); Bai et al. 2019 (arXiv 1909.01377)
    for the limited memory.
    """
    solution = Solution(g_B, tolerance, keep="lowest")
    g_BD = g_B.flatten(1)
    u_BKD, w_BKD = (g_BD.new_empty(g_BD.shape[0], iterations, g_BD.shape[1]) for _ in range(2))
    beta_BD, r_BD, delta_BD = torch.zeros_like(g_BD), g_BD, g_BD
    for k in range(iterations):
        if not solution.running_B.any():
            break
        beta_BD = beta_BD + delta_BD
        new_BD = transposed(beta_BD.view_as(g_B)).flatten(1) + g_BD - beta_BD
        solution.take(beta_BD.view_as(g_B), new_BD.view_as(g_B))
        u_BkD, w_BkD = u_BKD[:, :k], w_BKD[:, :k]
        # With h = H r(new) before the update, H dr = h + delta, so the new term is -h w^T / (w .
        # dr) with w = H^T delta.
        w_BD = _product(w_BkD, u_BkD, delta_BD) - delta_BD
        h_BD = _product(u_BkD, w_BkD, new_BD) - new_BD
        bend_B1 = (w_BD * (new_BD - r_BD)).sum(1, keepdim=True)
        # A stopped sample takes no step and keeps its H, as does one whose denominator is 0.
        is_live_B1 = solution.running_B[:, None] & (bend_B1.abs() > torch.finfo(g_BD.dtype).tiny)
        u_BKD[:, k] = torch.where(is_live_B1, -h_BD / bend_B1, 0)
        w_BKD[:, k] = torch.where(is_live_B1, w_BD, 0)
        delta_BD = solution.of_running(
            -h_BD - u_BKD[:, k] * (w_BKD[:, k] * new_BD).sum(1, keepdim=True)
        )
        r_BD = new_BD
    return solution


def _product(left_BkD: Tensor, right_BkD: Tensor, x_BD: Tensor) -> Tensor:
    """sum_k left_k (right_k . x)"""
    inner_Bk = (right_BkD @ x_BD.unsqueeze(2)).squeeze(2)
    return (inner_Bk.unsqueeze(1) @ left_BkD).squeeze(1)


def _norm(x_B: Tensor) -> Tensor:
    return x_B.flatten(1).norm(dim=1)


def _over(flag_B: Tensor, x_B: Tensor) -> Tensor:
    return flag_B.view(-1, *[1] * (x_B.dim() - 1))
