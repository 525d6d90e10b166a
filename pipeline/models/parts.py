"""Parts of several families: copies of a neuron, pools, standardised convolutions, the rate head.

A builder takes its neuron as a module, `neuron=LIF(decay=0.5)`, in a recipe `neuron=spec(LIF,
decay=0.5)`. Each layer gets a copy. `neuron=nn.ReLU()` gives the ANN with the same layers.

`MeanPool` keeps no tensor for the backward; torch's average pool (2.13) keeps its input for its
shape. On a CPU it adds up slices. On small images this took a sixth of the time of torch's pool,
and a quarter in the backward (docs/LOG.md).
"""

import copy
import math
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import refuse_unless_counts
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import rate_readout
from pipeline.spiking.synapse import Conv2d, Linear, apply_folded

# T time, B batch, C channels, H W pixels


# Statistics of batch norm: of each time step, or over time steps and samples together.
Over = Literal["step", "time"]

# 1 / sqrt(p (1 - p)) = 2.737 with p = P(N(0, 1) >= 1): a spike of a unit-variance current at
# threshold 1 has unit variance after it. Rounded as published.
SPIKE_GAIN = 2.74
# The same for max(0, N(0, 1)), whose variance is (1 - 1/pi) / 2 (Brock et al. 2021, arXiv
# 2101.08692).
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))


def copy_neuron(neuron: nn.Module) -> nn.Module:
    """A copy of the prototype, with its own parameters and state."""
    return copy.deepcopy(neuron)


def variance_gain(neuron: nn.Module) -> float:
    """The factor that restores unit variance after a neuron whose current has unit variance."""
    if isinstance(neuron, nn.ReLU):
        return RELU_GAIN
    if not isinstance(neuron, LIF) or neuron.threshold == 1:
        return SPIKE_GAIN
    p = math.erfc(neuron.threshold / math.sqrt(2)) / 2
    return 1 / math.sqrt(p * (1 - p))


class Pool(nn.Module):
    """A pool of torch on time-first tensors."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return apply_folded(self.pool, x_TBCHW)


def standardized_conv(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1
) -> Conv2d:
    """A convolution with standardised weights; Kaiming fan-out, bias 0.

    It keeps the image size up to its stride.
    """
    conv = Conv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, weights="standardized"
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class RateHead(nn.Module):
    """logits = readout(neuron(norm(linear(neuron(x))))), `[T, B, C]` to `[T, B, K]`.

    The pool yields means of spikes, and the first neuron turns them into spikes again. The last
    neuron's logits are rates, and the readout weights the rates of LIF. With `nn.ReLU` as the
    neuron it is the head of the ANN.

    Source: Meng et al. 2022 (DSR, arXiv 2205.00459).
    """

    def __init__(self, in_features: int, classes: int, *, over: Over, neuron: nn.Module) -> None:
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
    """Means of disjoint squares: `[N, C, H, W]` to `[N, C, H // size, W // size]`.

    A square has `size` x `size` pixels.

    Remaining rows and columns at the right and the bottom are ignored, as in `nn.AvgPool2d(size)`.

    Raises: ValueError for an image smaller than one square.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        refuse_unless_counts("MeanPool", {"size": size})
        self.size = size

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if min(x_NCHW.shape[-2:]) < self.size:
            raise ValueError(
                f"MeanPool: an image must have {self.size} pixels a side; got"
                f" {tuple(x_NCHW.shape[-2:])}"
            )
        return _Mean.apply(x_NCHW, self.size)  # type: ignore[return-value]  # apply is untyped


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, size: int) -> Tensor:
        ctx.shape, ctx.size = x_NCHW.shape, size
        # Below fp32 every partial sum would be rounded.
        adds_slices = x_NCHW.device.type == "cpu" and x_NCHW.element_size() >= 4
        return mean_of_slices(x_NCHW, size) if adds_slices else F.avg_pool2d(x_NCHW, size)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (g,) = grad_outputs
        share = g / ctx.size**2
        return (spread_by_slices if g.device.type == "cpu" else spread_by_interpolation)(
            share, ctx.shape, ctx.size
        ), None


def mean_of_slices(x_NCHW: Tensor, size: int) -> Tensor:
    """The pool, as a sum of every `size`-th row and column."""
    height, width = (pixels // size * size for pixels in x_NCHW.shape[-2:])
    above = reduce(torch.add, (x_NCHW[..., row:height:size, :] for row in range(size)))
    return reduce(torch.add, (above[..., column:width:size] for column in range(size))) / size**2


def spread_by_slices(share: Tensor, shape: torch.Size, size: int) -> Tensor:
    """Copy each pixel of `share` to its square, and 0 to pixels outside all squares.

    This is the fastest way on a CPU.
    """
    height, width = (pixels * size for pixels in share.shape[-2:])
    made = (share.new_empty if (height, width) == shape[-2:] else share.new_zeros)(shape)
    for row in range(size):
        for column in range(size):
            made[..., row:height:size, column:width:size] = share
    return made


def spread_by_interpolation(share: Tensor, shape: torch.Size, size: int) -> Tensor:
    """The same in one kernel, and a second one for pixels outside all squares."""
    made = F.interpolate(share, scale_factor=size, mode="nearest")
    below, right = shape[-2] - made.shape[-2], shape[-1] - made.shape[-1]
    return F.pad(made, (0, right, 0, below)) if below or right else made
