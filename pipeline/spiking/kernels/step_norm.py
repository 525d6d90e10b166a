"""Batch norm of each time step, for all steps of a slice in one call.

    y[t] = weight (x[t] - mean[t]) invstd[t] + bias,   mean and variance over the samples of step t

The running statistics are updated step after step. The gradients of weight and bias are summed over
the steps in the kernel, and the result needs no copy of the steps into one tensor.
"""

# T time, B batch, C channels

from typing import Any

import torch
from torch import Tensor

from pipeline.core.checks import require
from pipeline.spiking.kernels.operators import (
    define,
    dense,
    kernel,
    like_steps,
    membrane_dtype,
    new_steps,
)


def step_norm(
    x_TBC: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """y; the running statistics are updated in place.

    Raises: ValueError if a time step has only one value per channel: it has no variance.
    """
    require(
        x_TBC.numel() > len(x_TBC) * len(weight),
        "BatchNorm: a time step must have more than one value per channel in training; got shape"
        f" {tuple(x_TBC.shape)}",
    )
    return _StepNorm.apply(  # type: ignore[return-value]
        dense(x_TBC), weight, bias, running_mean, running_var, momentum, eps
    )


class _StepNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TBC: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y_TBC, mean_TC, invstd_TC = kernel("step_norm_forward", x_TBC)(
            x_TBC, weight, bias, running_mean, running_var, momentum, eps
        )
        ctx.save_for_backward(x_TBC, weight, mean_TC, invstd_TC)
        return y_TBC

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TBC, weight, mean_TC, invstd_TC = ctx.saved_tensors
        g_TBC = like_steps(grad_outputs[0], x_TBC)
        return (
            *kernel("step_norm_backward", x_TBC)(g_TBC, x_TBC, weight, mean_TC, invstd_TC),
            *[None] * 4,
        )


def _fake_forward(x_TBC: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(x_TBC), x_TBC.shape[2])
    mean_TC = x_TBC.new_empty(shape, dtype=membrane_dtype(x_TBC))
    return new_steps(x_TBC, x_TBC.dtype), mean_TC, torch.empty_like(mean_TC)


define(
    "step_norm_forward(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean,"
    " Tensor(b!) running_var, float momentum, float eps) -> (Tensor, Tensor, Tensor)",
    _fake_forward,
)
define(
    "step_norm_backward(Tensor g, Tensor x, Tensor weight, Tensor mean, Tensor invstd)"
    " -> (Tensor, Tensor, Tensor)",
    lambda g_TBC, x_TBC, weight, *_: (
        new_steps(x_TBC, x_TBC.dtype),
        torch.empty_like(weight),
        torch.empty_like(weight),
    ),
)
