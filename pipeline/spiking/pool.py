"""Average pooling that keeps no tensor for the backward; torch's pool (2.13) keeps its input for
its shape.

On a CPU it adds up slices. On small images this took a sixth of the time of torch's pool, and a
quarter in the backward (docs/LOG.md).
"""

# N images, C channels, H W pixels

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import refuse_unless_counts


class MeanPool(nn.Module):
    """Means of disjoint squares of `size` x `size` pixels: `[N, C, H, W]` to `[N, C, H // size, W
    // size]`.

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

    def extra_repr(self) -> str:
        return f"size={self.size}"


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
    """Copy each pixel of `share` to its square, and 0 to pixels outside all squares; the fastest
    way on a CPU.
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
    below, right = (
        whole - covered for whole, covered in zip(shape[-2:], made.shape[-2:], strict=True)
    )
    return F.pad(made, (0, right, 0, below)) if below or right else made
