"""Implicit differentiation at the equilibrium: the gradient of a feedback network from where it
comes to rest alone.
"""

# T time, B batch, K classes, N layers

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of
from pipeline.rules.base import LossOf, LossTerm, OverTime, Rule, World, refuse_foreign_norms
from pipeline.spiking.equilibrium import Linearized, the_equilibrium
from pipeline.spiking.solvers import Solution, broyden, fixed_point
from pipeline.spiking.state import fresh_state

# Mean residual of a batch from which IDE warns, and that of a sample from which there is no
# gradient.
COARSE, UNSOLVED = 0.05, 0.5


class IDE(Rule):
    """IDE: L = loss_of(readout of a[T]), differentiated as if a[T] were the fixed point a* = f(a*)
    that it approaches.

        dL/dtheta = beta^T df/dtheta at a[T],     beta = g + J^T beta,     g = dL/da[T],     J =
        df/da at a[T]

    with f the map of `spiking/equilibrium.py`. The T steps are simulated without a graph, so memory
    does not grow with T. The gradient is exact at the fixed point, away from the kinks of the
    clamp; at a[T] its error falls as 1/T.

    beta is solved by limited-memory Broyden or by a damped fixed point, each sample by itself until
    its residual is at most `tolerance` times |g|, in at most `iterations` evaluations of J^T.
    Reported, of the last batch that was solved: the residual and the iterations; a mean residual
    above 5 % warns once. Where a solve leaves more than half of g, as it does when J is no
    contraction, it warns, and the gradient of the batch is not a number: nobody is to learn from
    it.

    The published code has the damped fixed point as its solver "iter", and used it for N-MNIST.
    There it solves (2I - J^T) beta = g, whose beta is half of this one where J is small. Here both
    solvers solve the paper's equation.

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
        if not 0 <= tolerance < 1:
            raise ValueError(
                "IDE: tolerance is relative to the gradient and must be in 0..1; got"
                f" tolerance={tolerance}"
            )
        self.counted_as = f"at its most solver iterations, {iterations}"
        self.adjoint = _Adjoint(solver, iterations, tolerance)

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        equilibrium = the_equilibrium(self.label, model)
        refuse_foreign_norms(self.label, model)
        super().attach(model, world=world, over_time=over_time)
        self.set_seam(equilibrium, "adjoint", self.adjoint)

    def figures(self) -> dict[str, float]:
        return self.adjoint.figures()

    def is_unsolved(self) -> bool:
        return self.adjoint.is_unsolved

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        self.adjoint.begin(step)
        with fresh_state(model):
            (logits_BK,) = model(x_TB)  # of a[T]: one step
            loss = loss_of(logits_BK)
            yield LossTerm(backward=loss, loss=loss.detach(), logits=logits_BK.detach())


class _Adjoint:
    """The seam: holds what the last solve found, and no reference to rule or model."""

    def __init__(
        self, solver: Literal["broyden", "fixed_point"], iterations: int, tolerance: float
    ) -> None:
        self.solver, self.iterations, self.tolerance = solver, iterations, tolerance
        self.residual, self.evaluations, self.warned = math.nan, math.nan, False
        self.step, self.is_unsolved = -1, False

    def begin(self, step: int) -> None:
        """The global batch of what comes, of which there may be several parts."""
        if step != self.step:
            self.step, self.is_unsolved = step, False

    def __call__(self, g_B: Tensor, vjp: Linearized) -> Tensor:
        if not g_B.isfinite().all():  # or the solve would be blamed
            got = g_B[~g_B.isfinite()][0].item()
            warnings.warn(
                f"IDE: the gradient of the loss must be finite; got {got}",
                RuntimeWarning,
                stacklevel=2,
            )
            return torch.full_like(g_B, math.nan)
        solve = broyden if self.solver == "broyden" else fixed_point
        solution = solve(g_B, vjp, iterations=self.iterations, tolerance=self.tolerance)
        solved_B = solution.residual_B <= UNSOLVED  # False where it is not a number
        if not solved_B.all():
            self.is_unsolved, unsolved_B = True, ~solved_B
            warnings.warn(self._diverged(solution, unsolved_B, vjp), RuntimeWarning, stacklevel=2)
            return torch.full_like(g_B, math.nan)
        self.residual = solution.residual_B.mean().item()
        if self.residual > COARSE and not self.warned:
            self.warned = True
            warnings.warn(
                f"IDE: {self.solver} left a residual of {self.residual:.2g} |g| after"
                f" {self.iterations} iterations, so the gradient is coarse; allow more iterations,"
                " or limit the synapses",
                RuntimeWarning,
                stacklevel=2,
            )
        self.evaluations = solution.iterations_B.double().mean().item()
        return solution.beta_B

    def figures(self) -> dict[str, float]:
        """Means over the samples of the last micro-batch that was solved: relative residual, and
        evaluations of J^T.
        """
        return {"residual": self.residual, "iterations": self.evaluations}

    def _diverged(self, solution: Solution, unsolved_B: Tensor, vjp: Linearized) -> str:
        stretch = [f"{ratio:.2g}" for ratio in stretches(solution.beta_B, unsolved_B, vjp)]
        return (
            "IDE: the solve of beta = g + J^T beta must converge; got a residual of"
            f" {solution.residual_B.max().item():.2g} |g| on {int(unsolved_B.sum())} of"
            f" {len(unsolved_B)} samples after {self.iterations} iterations of {self.solver}; there"
            f" J^T stretches by {', '.join(stretch)} in layers {len(stretch)} to 1: limit the"
            " synapses (SpectralLimit), raise the threshold, or lower the learning rate"
        )


def stretches(
    beta_B: Tensor, unsolved_B: Tensor, vjp: Linearized, *, turns: int = 20
) -> list[float]:
    """By how much each layer of J^T lengthens the direction that J^T lengthens most, on the samples
    that did not converge.
    """
    some = unsolved_B.to(beta_B.dtype).view(-1, *[1] * (beta_B.dim() - 1))
    v_B = some * torch.nan_to_num(beta_B, nan=1.0, posinf=1.0, neginf=1.0) + some
    for _ in range(turns):
        v_B = vjp(v_B / v_B.norm().clamp_min(torch.finfo(v_B.dtype).tiny))
    norms = [v_B.norm().item(), *(each.norm().item() for each in vjp.backwards(v_B))]
    return [after / max(before, 1e-30) for before, after in itertools.pairwise(norms)]
