"""A max pool, whose backward keeps where each maximum was, in 2 bytes if that is enough.

torch's (2.13) keeps 8 bytes, and the input, of which its backward reads the shape. On a CPU torch's
is slow where channels come first in memory, so there is a kernel here.
"""

# N images, C channels, H W pixels

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.spiking.kernels.operators import define, has_kernels, kernel


def max_pool(x_NCHW: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """`pool(x_NCHW)`."""
    return _MaxPool.apply(x_NCHW, pool)  # type: ignore[return-value]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, pool: nn.MaxPool2d) -> Tensor:
        pairs = [
            (each, each) if isinstance(each, int) else tuple(each)
            for each in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        ]
        geometry: Any = (*pairs, pool.ceil_mode)
        ctx.geometry, ctx.like, ctx.dtype = geometry, (x_NCHW.shape, x_NCHW.stride()), x_NCHW.dtype
        is_small = x_NCHW.shape[-2:].numel() <= 2**15
        ctx.in_kernel = (
            x_NCHW.device.type == "cpu"
            and x_NCHW.dtype in (torch.float32, torch.float64)
            and x_NCHW.is_contiguous()
            and pairs[3] == (1, 1)
            and all(2 * pad <= size for size, pad in zip(pairs[0], pairs[2], strict=True))
            and not pool.ceil_mode
            and has_kernels(x_NCHW)
        )
        if ctx.in_kernel:
            sizes = [number for pair in pairs[:3] for number in pair]
            y_NCHW, at_NCHW = kernel("max_pool_forward", x_NCHW)(x_NCHW, sizes, is_small)
        else:
            y_NCHW, at_NCHW = F.max_pool2d(x_NCHW, *geometry, return_indices=True)
            at_NCHW = at_NCHW.to(torch.int16 if is_small else torch.int32)
        ctx.save_for_backward(at_NCHW)
        return y_NCHW

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        [g_NCHW], [at_NCHW] = grad_outputs, ctx.saved_tensors
        shape, strides = ctx.like
        if ctx.in_kernel:
            height, width = shape[-2:]
            backward = kernel("max_pool_backward", g_NCHW)
            return backward(g_NCHW.contiguous(), at_NCHW, height, width), None
        x_NCHW = torch.empty_strided(shape, strides, dtype=ctx.dtype, device=g_NCHW.device)
        return torch.ops.aten.max_pool2d_with_indices_backward(
            g_NCHW, x_NCHW, *ctx.geometry, at_NCHW.long()
        ), None


def new_pooled(x_NCHW: Tensor, sizes: Sequence[int], is_small: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors for the maxima and their positions. `sizes`: kernel, stride and padding."""
    pooled = [
        (pixels + 2 * padding - size) // stride + 1
        for pixels, size, stride, padding in zip(
            x_NCHW.shape[-2:], sizes[:2], sizes[2:4], sizes[4:], strict=True
        )
    ]
    y_NCHW = x_NCHW.new_empty(*x_NCHW.shape[:-2], *pooled)
    return y_NCHW, torch.empty_like(y_NCHW, dtype=torch.int16 if is_small else torch.int32)


define("max_pool_forward(Tensor x, int[] sizes, bool is_small) -> (Tensor, Tensor)", new_pooled)
define(
    "max_pool_backward(Tensor g, Tensor at, int height, int width) -> Tensor",
    lambda g_NCHW, at_NCHW, height, width: g_NCHW.new_empty(*g_NCHW.shape[:-2], height, width),
)
