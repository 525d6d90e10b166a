"""y = x + alpha gain b: a stream and a branch with one learnt gain.

    dL/dx = g,   dL/db = alpha gain g,   dL/dgain = alpha sum(g b),   g = dL/dy

y has the dtype of x and b, whatever that of the gain. In torch's own operations the backward would
take five kernels, and y would have the gain's dtype.
"""

# T time, B batch

from typing import Any

import torch
from torch import Tensor

from pipeline.spiking.kernels.operators import (
    define,
    dense,
    has_kernels,
    kernel,
    like_steps,
    new_steps,
)


def scaled_add(x_TB: Tensor, b_TB: Tensor, gain: Tensor, alpha: float) -> Tensor:
    """y. The gain has the shape (1,)."""
    dtype = torch.promote_types(x_TB.dtype, b_TB.dtype)
    if not has_kernels(b_TB):
        return torch.addcmul(x_TB, b_TB, gain.to(dtype), value=alpha)
    b_TB = dense(b_TB.to(dtype))
    return _ScaledAdd.apply(  # type: ignore[return-value]
        like_steps(x_TB.to(dtype), b_TB), b_TB, gain, alpha
    )


class _ScaledAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TB: Tensor, b_TB: Tensor, gain: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(b_TB, gain)
        ctx.alpha = alpha
        return kernel("scaled_add_forward", b_TB)(x_TB, b_TB, gain, alpha)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        b_TB, gain = ctx.saved_tensors
        g_TB = like_steps(grad_outputs[0], b_TB)
        g_b_TB, g_gain = kernel("scaled_add_backward", b_TB)(g_TB, b_TB, gain, ctx.alpha)
        return g_TB, g_b_TB, g_gain, None


define(
    "scaled_add_forward(Tensor x, Tensor b, Tensor gain, float alpha) -> Tensor",
    lambda x_TB, b_TB, gain, alpha: new_steps(b_TB, b_TB.dtype),
)
define(
    "scaled_add_backward(Tensor g, Tensor b, Tensor gain, float alpha) -> (Tensor, Tensor)",
    lambda g_TB, b_TB, gain, alpha: (new_steps(b_TB, b_TB.dtype), torch.empty_like(gain)),
)
