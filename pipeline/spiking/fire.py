"""A membrane at its threshold: the spike, and the reset after it, as one operation with a backward
of its own.

    s = 1 if u >= threshold else 0
    v = u - subtract s      (reset by subtraction)      or      u (1 - s)      (reset to zero)

With a = u - threshold, and psi the derivative that a surrogate puts in the place of ds/du:

    dL/du = psi(a) dL/ds + dL/dv r,      r = 1      or      1 - s

and where the reset is differentiated, too, dL/ds is less by subtract dL/dv, or by u dL/dv. A
network asks for this once for each neuron and time step, and autograd would note every kernel of
it. The backward is not differentiable itself, and refuses to be."""

# B batch

from typing import Any

import torch
from torch import Tensor

from pipeline.spiking.surrogate import Surrogate, heaviside


def fire(
    u_B: Tensor,
    *,
    threshold: float,
    subtract: float | None,
    keeps_gradient: bool,
    surrogate: Surrogate,
) -> tuple[Tensor, Tensor]:
    """u -> (s, v). The caller gives u away, whose memory may become v's: no view, and not what its
    own backward needs.

    Kept for the backward is a alone, and u where a reset to zero is differentiated.

    Args:
        subtract: what a spike takes from the membrane; None: all of it.
        keeps_gradient: whether the reset is differentiated, or its s a constant.

    Raises: RuntimeError in a backward that is to be differentiated (`create_graph`).
    """
    # apply is untyped
    return _Fire.apply(u_B, threshold, subtract, keeps_gradient, surrogate)  # type: ignore[return-value]


class _Fire(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u_B: Tensor,
        threshold: float,
        subtract: float | None,
        keeps_gradient: bool,
        surrogate: Surrogate,
    ) -> tuple[Tensor, Tensor]:
        a_B = u_B - threshold
        s_B = heaviside(a_B)
        ctx.subtract, ctx.keeps_gradient, ctx.surrogate = subtract, keeps_gradient, surrogate
        ctx.set_materialize_grads(False)  # of a membrane that is cut there is none
        if subtract is None and keeps_gradient:
            ctx.save_for_backward(a_B, u_B)
            return s_B, u_B.masked_fill(a_B >= 0, 0)
        ctx.save_for_backward(a_B)
        ctx.mark_dirty(u_B)
        return s_B, (
            u_B.masked_fill_(a_B >= 0, 0) if subtract is None else u_B.sub_(s_B, alpha=subtract)
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        # torch's own `once_differentiable` gives a constant where no gradient comes in with a graph
        if torch.is_grad_enabled():
            raise RuntimeError("fire: a spike has no second derivative; create_graph must be False")
        g_s, g_v = grad_outputs
        a_B, *u = ctx.saved_tensors
        if g_v is not None and ctx.keeps_gradient:
            taken = g_v * (u[0] if ctx.subtract is None else ctx.subtract)
            g_s = -taken if g_s is None else g_s - taken
        if g_v is not None and ctx.subtract is None:
            g_v = g_v.masked_fill(a_B >= 0, 0)
        g_u = g_v
        if g_s is not None:
            g_u = ctx.surrogate.derivative(a_B).mul_(g_s)
            if g_v is not None:
                g_u.add_(g_v)
        return g_u, None, None, None, None
