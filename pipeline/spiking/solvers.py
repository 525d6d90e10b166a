"""beta = g + J^T beta, solved for each sample of a batch by itself.

Both solvers start at beta = 0, ask for J^T v of the whole batch at once, and let each sample stop
on its own: as soon as its residual |g + J^T beta - beta| is at most `tolerance` times |g|, so that
neither the batch that a sample is in nor the scale of the loss changes its solution. A sample that
has stopped keeps its solution while the others go on.
"""

# B batch, D units of a sample, K terms of a low-rank history

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ESCAPED = 1e6


@dataclass(frozen=True)
class Solution:
    """`residual_B` is |g + J^T beta - beta| / |g| of `beta_B` (0 where g is); `iterations_B` counts
    evaluations of J^T.
    """

    beta_B: Tensor
    residual_B: Tensor
    iterations_B: Tensor


@torch.no_grad()
def fixed_point(
    g_B: Tensor, transposed: Callable[[Tensor], Tensor], *, iterations: int, tolerance: float
) -> Solution:
    """beta <- (beta + J^T beta + g) / 2, which converges where every eigenvalue of J lies within 2
    of -1: for every contraction, and beyond.

    Source: Xiao et al. 2021 (IDE, arXiv 2109.14247), the solver of its N-MNIST runs. The published
    code iterates beta <- (J^T beta + g) / 2, and so solves another equation: beta = (g + J^T beta)
    / 2.
    """
    progress = _Progress(g_B, tolerance, keep="last")
    beta_B, r_B = torch.zeros_like(g_B), g_B
    for _ in range(iterations):
        if not progress.is_running():
            break
        beta_B = torch.add(beta_B, r_B, alpha=0.5)
        r_B = transposed(beta_B) + g_B - beta_B
        progress.take(beta_B, r_B)
        r_B = progress.of_running(r_B)
    return progress.solution()


@torch.no_grad()
def broyden(
    g_B: Tensor, transposed: Callable[[Tensor], Tensor], *, iterations: int, tolerance: float
) -> Solution:
    """Broyden's good method on r(beta) = g + J^T beta - beta, without line search; the iterate of
    lowest residual is returned.

        delta = -H r(beta),     beta <- beta + delta,     H <- H + (delta - H dr) (delta^T H) /
        (delta^T H dr),     H_0 = -I

    H is kept as -I and one rank-one term for each iteration, of each sample its own: 2 x iterations
    x D numbers a sample.

    Source: Broyden 1965 (doi 10.1090/S0025-5718-1965-0198670-6); Bai et al. 2019 (arXiv 1909.01377)
    for the limited memory.
    """
    progress = _Progress(g_B, tolerance, keep="lowest")
    g_BD = g_B.flatten(1)
    u_BKD, w_BKD = (g_BD.new_empty(g_BD.shape[0], iterations, g_BD.shape[1]) for _ in range(2))
    beta_BD, r_BD, delta_BD = torch.zeros_like(g_BD), g_BD, g_BD
    for k in range(iterations):
        if not progress.is_running():
            break
        beta_BD = beta_BD + delta_BD
        new_BD = transposed(beta_BD.view_as(g_B)).flatten(1) + g_BD - beta_BD
        progress.take(beta_BD.view_as(g_B), new_BD.view_as(g_B))
        u_BkD, w_BkD = u_BKD[:, :k], w_BKD[:, :k]
        # With h = H r(new) before the update, H dr = h + delta, so the new term is -h w^T / (w .
        # dr) with w = H^T delta.
        w_BD = _product(w_BkD, u_BkD, delta_BD) - delta_BD
        h_BD = _product(u_BkD, w_BkD, new_BD) - new_BD
        bend_B1 = (w_BD * (new_BD - r_BD)).sum(1, keepdim=True)
        # A sample that has stopped takes no step, and so learns nothing; one whose curvature
        # vanishes keeps its H.
        is_live_B1 = progress.running_B[:, None] & (bend_B1.abs() > torch.finfo(g_BD.dtype).tiny)
        u_BKD[:, k] = torch.where(is_live_B1, -h_BD / bend_B1, 0)
        w_BKD[:, k] = torch.where(is_live_B1, w_BD, 0)
        step_BD = -h_BD - u_BKD[:, k] * (w_BKD[:, k] * new_BD).sum(1, keepdim=True)
        delta_BD = progress.of_running(step_BD)
        r_BD = new_BD
    return progress.solution()


def _product(left_BkD: Tensor, right_BkD: Tensor, x_BD: Tensor) -> Tensor:
    """sum_k left_k (right_k . x)"""
    inner_Bk = (right_BkD @ x_BD.unsqueeze(2)).squeeze(2)
    return (inner_Bk.unsqueeze(1) @ left_BkD).squeeze(1)


class _Progress:
    """What each sample has reached, and which samples still run."""

    def __init__(self, g_B: Tensor, tolerance: float, *, keep: str) -> None:
        self.tolerance = tolerance
        self.keep = keep
        self.scale_B = _norm(g_B)
        self.beta_B = torch.zeros_like(g_B)
        self.residual_B = torch.where(self.scale_B == 0, 0.0, 1.0).to(self.scale_B.dtype)
        self.running_B = self.residual_B > tolerance
        self.iterations_B = torch.zeros_like(self.running_B, dtype=torch.int64)

    def is_running(self) -> bool:
        return bool(self.running_B.any())

    def of_running(self, step_B: Tensor) -> Tensor:
        """The step, for samples that still run; those that escaped would overflow."""
        return torch.where(_over(self.running_B, step_B), step_B, 0)

    def take(self, beta_B: Tensor, r_B: Tensor) -> None:
        now_B = _norm(r_B) / self.scale_B
        taken_B = (
            self.running_B & (now_B < self.residual_B) if self.keep == "lowest" else self.running_B
        )
        self.residual_B = torch.where(taken_B, now_B, self.residual_B)
        self.beta_B = torch.where(_over(taken_B, beta_B), beta_B, self.beta_B)
        self.iterations_B = self.iterations_B + self.running_B
        # False where it is not a number.
        self.running_B = self.running_B & (now_B > self.tolerance) & (now_B < ESCAPED)

    def solution(self) -> Solution:
        return Solution(self.beta_B, self.residual_B, self.iterations_B)


def _norm(x_B: Tensor) -> Tensor:
    return x_B.flatten(1).norm(dim=1)


def _over(flag_B: Tensor, x_B: Tensor) -> Tensor:
    return flag_B.view(-1, *[1] * (x_B.dim() - 1))
