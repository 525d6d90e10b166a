"""Implicit differentiation at the equilibrium of a feedback network, and its linear solvers.

`fixed_point` and `broyden` solve beta = g + J^T beta for each sample of a batch separately. They
start at beta = 0, and evaluate J^T v for the whole batch. A sample stops when its residual |g + J^T
beta - beta| is at most `tolerance` |g|. A stopped sample keeps its solution while the others
continue. So the solution of a sample depends neither on the batch nor on the scale of the loss.
"""

# T time, B batch, K iterations (k of them are done), D units of a sample

import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of, require
from pipeline.rules.base import OverTime, Rule, World, refuse_foreign_norms
from pipeline.spiking.equilibrium import Linearized, find_equilibrium

# The limits of the relative residual.
COARSE_RESIDUAL = 0.05  # IDE warns once if the mean of a micro-batch is above this limit
MAX_RESIDUAL = 0.5  # the gradient is NaN if a sample is above this limit
DIVERGED_RESIDUAL = 1e6  # a sample at or above this limit stops


class IDE(Rule):
    """Differentiate L = loss_fn(readout of a[T]) as if a[T] were the fixed point a* = f(a*).

        dL/dtheta = beta^T df/dtheta at a[T],   beta = g + J^T beta
        g = dL/da[T],   J = df/da at a[T]

    f is the map of `spiking/equilibrium.py`. The T steps are simulated without a graph, so memory
    does not grow with T. At the fixed point the gradient is exact, except at the kinks of the
    clamp. With IF neurons, a[T] approaches a*, and the error of the gradient falls as 1/T.

    The metrics are the residual and the iterations of the last solved micro-batch. The rule warns
    once if the mean residual is above 5 % of |g|. If the residual of a sample is above 50 %, for
    example because J is not a contraction, the rule warns and the batch's gradient is NaN.

    Args:
        solver: "broyden" or "fixed_point" (damped).
        iterations: the maximum number of evaluations of J^T per solve.
        tolerance: a sample stops at a residual of at most `tolerance` |g|.

    Raises: ValueError for an unknown solver, iterations < 1, or a tolerance outside [0, 1)
    (`__init__`); for over_time="steps", a model without an `Equilibrium`, with several, with
    neurons outside it, or with a norm that mixes time steps (`attach`).
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
            "IDE: tolerance is relative to the gradient and must be in 0..1, 1 excluded; got"
            f" tolerance={tolerance}",
        )
        self.forecast_note = f"with the maximum of {iterations} solver iterations"
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

    _loss_terms = Rule._one_loss_term  # the output of the model has one step, for a[T]


class _Adjoint:
    """The seam `Equilibrium.adjoint`. It has no reference to the rule or the model.

    `metrics` are the mean relative residual, and the mean number of evaluations of J^T per sample,
    of the last solved micro-batch.
    """

    def __init__(
        self, solver: Literal["broyden", "fixed_point"], iterations: int, tolerance: float
    ) -> None:
        self.solver, self.iterations, self.tolerance = solver, iterations, tolerance
        self.metrics = {"residual": math.nan, "iterations": math.nan}
        self.is_unsolved, self.has_warned = False, False

    def __call__(self, g_B: Tensor, vjp: Linearized) -> Tensor:
        solve = broyden if self.solver == "broyden" else fixed_point
        solution = solve(g_B, vjp, iterations=self.iterations, tolerance=self.tolerance)
        is_solved_B = solution.residual_B <= MAX_RESIDUAL  # False for NaN
        if not is_solved_B.all():
            self.is_unsolved = True
            warnings.warn(
                f"IDE: the residual of beta = g + J^T beta must be at most {MAX_RESIDUAL} |g|; got"
                f" up to {solution.residual_B.max().item():.2g} |g|, above the limit for"
                f" {int((~is_solved_B).sum())} of {len(is_solved_B)} samples, after at most"
                f" {self.iterations} iterations of {self.solver}; limit the synapses"
                " (SpectralLimit), raise the threshold, or lower the learning rate",
                RuntimeWarning,
                stacklevel=2,
            )
            return torch.full_like(g_B, math.nan)
        residual = solution.residual_B.mean().item()
        if residual > COARSE_RESIDUAL and not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"IDE: the gradient is coarse; got a mean residual of {residual:.2g} |g| after"
                f" {self.iterations} iterations of {self.solver}; set more iterations, or limit the"
                " synapses (SpectralLimit)",
                RuntimeWarning,
                stacklevel=2,
            )
        self.metrics = {
            "residual": residual,
            "iterations": solution.iterations_B.double().mean().item(),
        }
        return solution.beta_B


class Solution:
    """The current solution of each sample.

    `keep` is "last" for the last iterate, or "lowest" for the iterate with the lowest residual.
    `beta_B` is the solution. `residual_B` is |g + J^T beta - beta| / |g| (0 if g is 0).
    `iterations_B` is the number of evaluations of J^T. `is_running_B` is False for stopped samples.
    """

    def __init__(self, g_B: Tensor, tolerance: float, *, keep: Literal["last", "lowest"]) -> None:
        self.tolerance = tolerance
        self.keep = keep
        self.g_norm_B = g_B.flatten(1).norm(dim=1)
        self.beta_B = torch.zeros_like(g_B)
        self.residual_B = torch.where(self.g_norm_B == 0, 0.0, 1.0).to(self.g_norm_B.dtype)
        self.is_running_B = self.residual_B > tolerance
        self.iterations_B = torch.zeros_like(self.is_running_B, dtype=torch.int64)

    def zero_stopped(self, step_B: Tensor) -> Tensor:
        """`step_B`, with 0 for stopped samples, because diverged samples would overflow."""
        return torch.where(_broadcast(self.is_running_B, step_B), step_B, 0)

    def update(self, beta_B: Tensor, r_B: Tensor) -> None:
        """Use the iterate `beta_B` with the residual vector `r_B`, for the running samples."""
        residual_B = r_B.flatten(1).norm(dim=1) / self.g_norm_B
        is_used_B = self.is_running_B & ((self.keep == "last") | (residual_B < self.residual_B))
        self.residual_B = torch.where(is_used_B, residual_B, self.residual_B)
        self.beta_B = torch.where(_broadcast(is_used_B, beta_B), beta_B, self.beta_B)
        self.iterations_B = self.iterations_B + self.is_running_B
        # A residual of NaN stops the sample too.
        self.is_running_B = (
            self.is_running_B & (residual_B > self.tolerance) & (residual_B < DIVERGED_RESIDUAL)
        )


@torch.no_grad()
def fixed_point(
    g_B: Tensor, transposed: Callable[[Tensor], Tensor], *, iterations: int, tolerance: float
) -> Solution:
    """beta <- (beta + J^T beta + g) / 2.

    It converges if the distance of every eigenvalue of J to -1 is below 2. This holds for a
    contraction.

    Source: Xiao et al. 2021 (IDE, arXiv 2109.14247), the solver of its N-MNIST runs. The published
    code iterates beta <- (J^T beta + g) / 2, which solves another equation: (2I - J^T) beta = g.
    """
    solution = Solution(g_B, tolerance, keep="last")
    beta_B, r_B = torch.zeros_like(g_B), g_B
    for _ in range(iterations):
        if not solution.is_running_B.any():
            break
        beta_B = torch.add(beta_B, r_B, alpha=0.5)
        r_B = transposed(beta_B) + g_B - beta_B
        solution.update(beta_B, r_B)
        r_B = solution.zero_stopped(r_B)
    return solution


@torch.no_grad()
def broyden(
    g_B: Tensor, transposed: Callable[[Tensor], Tensor], *, iterations: int, tolerance: float
) -> Solution:
    """Broyden's good method on r(beta) = g + J^T beta - beta, without line search.

        delta = -H r(beta),   beta <- beta + delta
        H <- H + (delta - H dr) (delta^T H) / (delta^T H dr),   H_0 = -I

    The solution is the iterate with the lowest residual. H = -I + sum_k u_k w_k^T is stored as the
    vectors u_k and w_k of each iteration: 2 x iterations x D numbers per sample.

    Source: Broyden 1965 (doi 10.1090/S0025-5718-1965-0198670-6); Bai et al. 2019 (arXiv 1909.01377)
    for the low-rank form of H.
    """
    solution = Solution(g_B, tolerance, keep="lowest")
    g_BD = g_B.flatten(1)
    u_BKD, w_BKD = (g_BD.new_empty(g_BD.shape[0], iterations, g_BD.shape[1]) for _ in range(2))
    beta_BD, r_BD, delta_BD = torch.zeros_like(g_BD), g_BD, g_BD
    for k in range(iterations):
        if not solution.is_running_B.any():
            break
        beta_BD = beta_BD + delta_BD
        next_r_BD = transposed(beta_BD.view_as(g_B)).flatten(1) + g_BD - beta_BD
        solution.update(beta_BD.view_as(g_B), next_r_BD.view_as(g_B))
        u_BkD, w_BkD = u_BKD[:, :k], w_BKD[:, :k]
        # Let h = H r with the new r and the old H. Then H dr = h + delta, so the new term of H is
        # -h w^T / (w . dr) with w = H^T delta.
        w_BD = _low_rank_product(w_BkD, u_BkD, delta_BD) - delta_BD
        h_BD = _low_rank_product(u_BkD, w_BkD, next_r_BD) - next_r_BD
        denominator_B1 = (w_BD * (next_r_BD - r_BD)).sum(1, keepdim=True)
        # H does not change for a stopped sample, or if the denominator is 0 or too small.
        is_updated_B1 = solution.is_running_B[:, None] & (
            denominator_B1.abs() > torch.finfo(g_BD.dtype).tiny
        )
        u_BKD[:, k] = torch.where(is_updated_B1, -h_BD / denominator_B1, 0)
        w_BKD[:, k] = torch.where(is_updated_B1, w_BD, 0)
        delta_BD = solution.zero_stopped(
            -h_BD - u_BKD[:, k] * (w_BKD[:, k] * next_r_BD).sum(1, keepdim=True)
        )
        r_BD = next_r_BD
    return solution


def _low_rank_product(left_BkD: Tensor, right_BkD: Tensor, x_BD: Tensor) -> Tensor:
    """sum_k left_k (right_k . x)"""
    inner_Bk = (right_BkD @ x_BD.unsqueeze(2)).squeeze(2)
    return (inner_Bk.unsqueeze(1) @ left_BkD).squeeze(1)


def _broadcast(flag_B: Tensor, x_B: Tensor) -> Tensor:
    return flag_B.view(-1, *[1] * (x_B.dim() - 1))
