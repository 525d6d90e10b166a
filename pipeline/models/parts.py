"""Parts of several networks: copies of a neuron, pools, standardised convolutions, the rate head.

A builder takes its neuron as a module: `neuron=LIF(decay=0.5)`, or `neuron=spec(LIF, decay=0.5)` in
a recipe. Each layer gets a copy. `neuron=nn.ReLU()` gives the ANN with the same layers.

`MeanPool` saves no tensor for the backward. torch's average pool (2.13) saves its input, although
the backward needs only the shape. On a CPU `MeanPool` sums slices of the image. On small images its
forward took a sixth of the time of torch's pool, and its backward a quarter (docs/LOG.md).
"""

import copy
import math
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import refuse_unless_counts
from pipeline.spiking.kernels.max_pool import max_pool
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import rate_readout
from pipeline.spiking.synapse import Conv2d, Linear, apply_folded

# T time, B batch, C channels, H W pixels


# Batch norm takes its statistics over the samples of each time step, or over all steps and samples.
StatisticsOver = Literal["step", "time"]

# A current of unit variance causes a spike with probability p = P(N(0, 1) >= 1) at threshold 1. The
# factor 1 / sqrt(p (1 - p)) = 2.737 gives the spikes unit variance. It is rounded as published.
SPIKE_GAIN = 2.74
# The factor for max(0, N(0, 1)), whose variance is (1 - 1/pi) / 2 (Brock et al. 2021, arXiv
# 2101.08692).
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))


def copy_neuron(neuron: nn.Module) -> nn.Module:
    """A copy of the prototype, with its own parameters and state."""
    return copy.deepcopy(neuron)


def variance_gain(neuron: nn.Module) -> float:
    """The factor that gives a neuron's output unit variance if its current has unit variance.

    A neuron that is neither a LIF nor ReLU gets the factor of threshold 1.
    """
    if isinstance(neuron, nn.ReLU):
        return RELU_GAIN
    if not isinstance(neuron, LIF) or neuron.threshold == 1:
        return SPIKE_GAIN
    p = math.erfc(neuron.threshold / math.sqrt(2)) / 2
    return 1 / math.sqrt(p * (1 - p))


def scaled_spikes(neuron: nn.Module, x_TB: Tensor, *, gain: float, beta: float = 1.0) -> Tensor:
    """`gain neuron(x / beta)`, which a `LIF` computes in its own kernel."""
    if isinstance(neuron, LIF):
        return neuron(x_TB, gain=gain, beta=beta)
    return gain * neuron(x_TB / beta if beta != 1 else x_TB)


class Pool(nn.Module):
    """Applies a pool of torch to time-first tensors."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        if type(self.pool) is nn.MaxPool2d:
            return apply_folded(partial(max_pool, pool=self.pool), x_TBCHW)
        return apply_folded(self.pool, x_TBCHW)


def standardized_conv(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1
) -> Conv2d:
    """A convolution with standardised weights, initialised with Kaiming fan-out and bias 0.

    For an odd kernel the image size changes only by the stride.
    """
    conv = Conv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, weights="standardized"
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class RateHead(nn.Module):
    """logits = readout(neuron(norm(linear(neuron(x))))), `[T, B, C]` to `[T, B, K]`.

    The input is the output of a pool, so it consists of means of spikes. The first neuron turns
    them into spikes again. The logits are the last neuron's output. For leaky rate neurons,
    `rate_readout` weights its time steps. With `nn.ReLU` as the neuron, this is the ANN's head.

    Source: Meng et al. 2022 (DSR, arXiv 2205.00459).
    """

    def __init__(
        self, in_features: int, classes: int, *, over: StatisticsOver, neuron: nn.Module
    ) -> None:
        super().__init__()
        self.neuron_in = copy_neuron(neuron)
        self.linear = Linear(in_features, classes)
        self.norm = BatchNorm(classes, over=over)
        self.neuron_out = copy_neuron(neuron)
        self.readout = rate_readout(neuron)

    def forward(self, x_TBC: Tensor) -> Tensor:
        return self.readout(self.neuron_out(self.norm(self.linear(self.neuron_in(x_TBC)))))


# N images, C channels, H W pixels


class MeanPool(nn.Module):
    """The mean of each `size` x `size` square: `[N, C, H, W]` to `[N, C, H // size, W // size]`.

    The squares are disjoint. Remaining rows and columns at the right and the bottom are ignored, as
    in `nn.AvgPool2d(size)`.

    Raises: ValueError for a size below 1, or an image smaller than one square.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        refuse_unless_counts("MeanPool", {"size": size})
        self.size = size

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if min(x_NCHW.shape[-2:]) < self.size:
            raise ValueError(
                f"MeanPool: an image must have at least {self.size} pixels a side; got"
                f" {tuple(x_NCHW.shape[-2:])}"
            )
        return _Mean.apply(x_NCHW, self.size)  # type: ignore[return-value]  # apply is untyped


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, size: int) -> Tensor:
        ctx.shape, ctx.size = x_NCHW.shape, size
        # In fp16 and bf16 every partial sum of the slices would be rounded.
        if x_NCHW.device.type == "cpu" and x_NCHW.element_size() >= 4:
            return mean_of_slices(x_NCHW, size)
        return F.avg_pool2d(x_NCHW, size)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (g_NCHW,) = grad_outputs
        spread = spread_by_slices if g_NCHW.device.type == "cpu" else spread_by_interpolation
        return spread(g_NCHW / ctx.size**2, ctx.shape, ctx.size), None


def mean_of_slices(x_NCHW: Tensor, size: int) -> Tensor:
    """The pool, as a sum of slices, each with every `size`-th row or column."""
    height, width = (pixels // size * size for pixels in x_NCHW.shape[-2:])
    sums = reduce(torch.add, (x_NCHW[..., row:height:size, :] for row in range(size)))
    return reduce(torch.add, (sums[..., column:width:size] for column in range(size))) / size**2


def spread_by_slices(x_NCHW: Tensor, shape: torch.Size, size: int) -> Tensor:
    """Copy each pixel of `x_NCHW` to all pixels of its square. Pixels outside all squares are 0.

    This is the fastest way on a CPU.
    """
    height, width = (pixels * size for pixels in x_NCHW.shape[-2:])
    y_NCHW = x_NCHW.new_empty(shape) if (height, width) == shape[-2:] else x_NCHW.new_zeros(shape)
    for row in range(size):
        for column in range(size):
            y_NCHW[..., row:height:size, column:width:size] = x_NCHW
    return y_NCHW


def spread_by_interpolation(x_NCHW: Tensor, shape: torch.Size, size: int) -> Tensor:
    """`spread_by_slices` in one kernel, or in two if there are pixels outside all squares."""
    y_NCHW = F.interpolate(x_NCHW, scale_factor=size, mode="nearest")
    bottom, right = shape[-2] - y_NCHW.shape[-2], shape[-1] - y_NCHW.shape[-1]
    return F.pad(y_NCHW, (0, right, 0, bottom)) if bottom or right else y_NCHW
