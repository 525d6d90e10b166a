"""The mean of squares of pixels, which keeps nothing of its input: torch's own (2.13) keeps it all, for no more than its shape.

On a CPU it adds slices, which on small images took a sixth of the time of torch's pool (docs/LOG.md).
"""

# N images, C channels, H W pixels

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.counts import refuse_unless_counts


class MeanPool(nn.Module):
    """The means of `size` x `size` pixels side by side: `[N, C, H, W]` to `[N, C, H // size, W // size]`.

    What is left over at the right and at the bottom is left out, as in `nn.AvgPool2d(size)`.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        refuse_unless_counts("MeanPool", {"size": size})
        self.size = size

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return _Mean.apply(x_NCHW, self.size)  # type: ignore[return-value]  # apply is untyped

    def extra_repr(self) -> str:
        return f"size={self.size}"


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, size: int) -> Tensor:
        ctx.shape, ctx.size = x_NCHW.shape, size
        if x_NCHW.device.type != "cpu":
            return F.avg_pool2d(x_NCHW, size)
        rows, columns = (pixels // size * size for pixels in x_NCHW.shape[-2:])
        above = reduce(torch.add, (x_NCHW[..., row:rows:size, :] for row in range(size)))
        return reduce(torch.add, (above[..., column:columns:size] for column in range(size))) / size**2

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (g,) = grad_outputs
        size = ctx.size
        rows, columns = (pixels * size for pixels in g.shape[-2:])
        covers = (rows, columns) == ctx.shape[-2:]
        g_x = (g.new_empty if covers else g.new_zeros)(ctx.shape)
        share = g / size**2
        for row in range(size):
            for column in range(size):
                g_x[..., row:rows:size, column:columns:size] = share
        return g_x, None
