"""Synapses: linear maps on time-first tensors, with a seam for each factor of their backward.

`weights="standardized"` is scaled weight standardisation (sWS), the normalisation of networks
without batch norm:

    W^ = gain (W - mean) / sqrt(fan_in var + 1e-4)
    mean and unbiased var per output filter, gain learnable

A `binarizer` (`spiking/binary.py`) derives a 1-bit weight from the parameter; then `weights` is
"1-bit". Derived weights are computed once for all slices of a batch (`slice_cache.py`).

The seam `presynaptic: x_TB -> factor_TB` replaces the input in the weight gradient: dL/dW = sum_t
g[t] factor[t]^T. The seam `backward_weight: weight -> weight` replaces the weight in the input
gradient: dL/dx = backward_weight(W)^T g. They are independent. Each call is one forward and one
backward operation, without a second pass.

`forward` accepts another `weight`, such as one of limited norm (`spiking/norm_limit.py`); bias and
seams stay.

Source of sWS: Brock et al. 2021 (arXiv 2101.08692), eq. 1, in the form of OTTT's and SLTT's
NF-ResNet.
"""

# T time, B batch, C channels, H W pixels

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import refuse_unless_one_of, require
from pipeline.spiking.encode import is_static, repeat
from pipeline.spiking.slice_cache import SliceCache
from pipeline.spiking.state import State

STANDARDIZATION_EPS = 1e-4

# The kinds of weights that a synapse can be created with.
Weights = Literal["plain", "standardized"]
Presynaptic = Callable[[Tensor], Tensor]
BackwardWeight = Callable[[Tensor], Tensor]


def folded(op: Callable[[Tensor], Tensor], x_TB: Tensor) -> Tensor:
    """Apply a stateless map to all time steps at once, with `[T, B, ...]` as a batch of T * B.

    A static input is mapped only once.
    """
    if is_static(x_TB):
        return repeat(op(x_TB[0]), len(x_TB))
    return op(x_TB.flatten(0, 1)).unflatten(0, x_TB.shape[:2])


class _Synapse(nn.Module):
    """The seams that Linear and Conv2d share."""

    weight: Tensor

    def _add_seams(self, weights: Weights) -> None:
        refuse_unless_one_of(type(self).__name__, ("plain", "standardized"), weights=weights)
        self.weights: str = weights
        self.gain: nn.Parameter | None = None
        if weights == "standardized":
            require(
                self.weight[0].numel() >= 2,
                f"{type(self).__name__}: standardized weights need a fan-in of at least 2; got"
                f" {self.weight[0].numel()}",
            )
            shape = (len(self.weight), *[1] * (self.weight.dim() - 1))
            self.gain = nn.Parameter(torch.ones(shape))
        self.binarizer: nn.Module | None = None
        self.slice_cache: SliceCache | None = None
        self.state = None if self.gain is None else State(type(self).__name__)
        self.presynaptic: Presynaptic | None = None
        self.backward_weight: BackwardWeight | None = None


class Linear(nn.Linear, _Synapse):
    """`torch.nn.Linear` on `[T, B, ..., C]`, with the `weights` and seams at the head of the file.

    Raises: ValueError for unknown `weights`, or an input without a time axis.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, weights: Weights = "plain"
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self._add_seams(weights)

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        if input.dim() < 3:
            raise ValueError(
                "Linear: the input must be time first, [T, B, ..., C]; got shape"
                f" {tuple(input.shape)}"
            )
        weight = _weight_for(self, input) if weight is None else weight
        if self.presynaptic is None and self.backward_weight is None:
            if is_static(input):
                return repeat(F.linear(input[0], weight, self.bias), len(input))
            return F.linear(input, weight, self.bias)
        return _with_seams(self, input, weight)


class Conv2d(nn.Conv2d, _Synapse):
    """`torch.nn.Conv2d` on `[T, B, C, H, W]` with zero padding.

    It has the `weights` and seams at the head of the file.

    Raises: ValueError for unknown `weights`, padding given as text, or an input without a time
    axis.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        weights: Weights = "plain",
    ) -> None:
        require(
            not isinstance(padding, str),
            f"Conv2d: padding must be a number of pixels; got padding={padding!r}",
        )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        self._add_seams(weights)

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        if input.dim() != 5:
            raise ValueError(
                "Conv2d: the input must be time first, [T, B, C, H, W]; got shape"
                f" {tuple(input.shape)}"
            )
        weight = _weight_for(self, input) if weight is None else weight
        if self.presynaptic is None and self.backward_weight is None:
            return folded(lambda x_NCHW: self._conv_forward(x_NCHW, weight, self.bias), input)
        return _with_seams(
            self, input, weight, (self.stride, self.padding, self.dilation, self.groups)
        )


def effective_weight(synapse: Linear | Conv2d) -> Tensor:
    """The weight used in the forward: the parameter, its standardised form, or its 1-bit form."""
    if synapse.binarizer is not None:
        return synapse.binarizer(synapse.weight)
    return synapse.weight if synapse.gain is None else _standardized(synapse.weight, synapse.gain)


def _weight_for(synapse: Linear | Conv2d, x_TB: Tensor) -> Tensor:
    """The effective weight, cached if `x_TB` is only a slice of the batch."""
    if (
        synapse.slice_cache is None
        or synapse.state is None
        or len(x_TB) == synapse.slice_cache.steps
    ):
        return effective_weight(synapse)
    return synapse.slice_cache.once(synapse.state, partial(effective_weight, synapse))


def _standardized(weight: Tensor, gain: Tensor) -> Tensor:
    fan_in = weight[0].numel()
    # Batch norm with filters as channels computes this in one fused operation, which keeps the
    # parameter and a mean and a scale per filter (as timm's ScaledStdConv). Its variance is biased,
    # so both constants are converted:
    # fan_in unbiased + eps = fan_in^2 / (fan_in - 1) (biased + eps (fan_in - 1) / fan_in^2).
    scale = math.sqrt(fan_in - 1) / fan_in
    flat_1CN = weight.reshape(1, weight.shape[0], fan_in)
    eps = STANDARDIZATION_EPS * scale**2
    return F.batch_norm(
        flat_1CN, None, None, (gain * scale).flatten(), training=True, eps=eps
    ).view_as(weight)


def is_inside(name: str, modules: Sequence[str]) -> bool:
    """Whether the dotted name of a module or parameter is one of `modules` or lies in one."""
    return any(name == each or name.startswith(each + ".") for each in modules)


def error_weight(weight: Tensor, downward: BackwardWeight | None) -> Tensor:
    """The weight that carries the error to the input.

    It is computed in the backward, so nothing is kept for it.
    """
    return weight if downward is None else downward(weight).to(weight.dtype)


def _with_seams(
    synapse: Linear | Conv2d, x_TB: Tensor, weight: Tensor, geometry: tuple[Any, ...] | None = None
) -> Tensor:
    """The output of a synapse whose seams change its backward.

    `geometry` are the further arguments of a convolution; None: the synapse is a product.

    All operands get one dtype, because autocast does not convert those of custom operations.
    """
    with torch.no_grad():
        factor_TB = x_TB if synapse.presynaptic is None else synapse.presynaptic(x_TB)
    if factor_TB.shape != x_TB.shape:
        raise ValueError(
            f"presynaptic: the factor must have the shape of the input, {tuple(x_TB.shape)}; got"
            f" {tuple(factor_TB.shape)}"
        )
    kind = x_TB.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    bias = None if synapse.bias is None else synapse.bias.to(dtype)
    operands = (x_TB.to(dtype), factor_TB.to(dtype), weight.to(dtype), bias)
    return _WithSeams.apply(  # type: ignore[return-value]
        *operands, synapse.backward_weight, geometry
    )


class _WithSeams(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TB: Tensor,
        factor_TB: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        downward: BackwardWeight | None,
        geometry: tuple[Any, ...] | None,
    ) -> Tensor:
        ctx.save_for_backward(factor_TB, weight)
        ctx.downward, ctx.geometry = downward, geometry
        if geometry is None:
            return F.linear(x_TB, weight, bias)
        return F.conv2d(x_TB.flatten(0, 1), weight, bias, *geometry).unflatten(0, x_TB.shape[:2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g_TB,) = grad_outputs
        factor_TB, weight = ctx.saved_tensors
        want_x, _, want_weight, want_bias, *_ = ctx.needs_input_grad
        if ctx.geometry is None:
            return (
                g_TB @ error_weight(weight, ctx.downward) if want_x else None,
                None,
                g_TB.flatten(0, -2).T @ factor_TB.flatten(0, -2) if want_weight else None,
                g_TB.flatten(0, -2).sum(0) if want_bias else None,
                None,
                None,
            )
        stride, padding, dilation, groups = ctx.geometry
        # This operation uses the input only for the weight gradient (except its shape), and the
        # weight only for the input gradient. So both can be replaced in one call.
        g_x, g_weight, g_bias = torch.ops.aten.convolution_backward(
            g_TB.flatten(0, 1),
            factor_TB.flatten(0, 1),
            error_weight(weight, ctx.downward),
            [weight.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [want_x, want_weight, want_bias],
        )
        return (g_x.view_as(factor_TB) if want_x else None, None, g_weight, g_bias, None, None)
