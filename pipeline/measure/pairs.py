"""How many pairs of numbers a product multiplies, and how many of them have no zero.

    y[n, o] = sum_i x[n, i] w[i, o]     one pair for each n, i, o; in a convolution, for each tap
                                        inside the image

The counts come from the numbers of non-zeros along each index that is summed, so no intermediate is
as large as the product itself.
"""

# N samples and time steps, I inputs, O outputs, P places of an image, h w taps of a kernel

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_HEAD = 1024  # numbers of the first row that are checked before all the others
_EXACT = 2**24  # the largest count that is exact in fp32


class Pairs(NamedTuple):
    """The pairs of one product."""

    live: int  # neither number is 0
    all: int


def matrices(a_NI: Tensor, b_IO: Tensor) -> Pairs:
    """Pairs of the product a b."""
    live = _nonzero(a_NI, 0) @ _nonzero(b_IO, 1)
    return Pairs(int(live), a_NI.shape[0] * b_IO.numel())


def batches(a_BNI: Tensor, b_BIO: Tensor) -> Pairs:
    """Pairs of a batch of products a b."""
    live = (_nonzero(a_BNI, 1) * _nonzero(b_BIO, 2)).sum()
    return Pairs(int(live), a_BNI.shape[1] * b_BIO.numel())


def is_even(x_OI: Tensor) -> bool:
    """Whether the non-zero numbers of each row share one magnitude.

    Such numbers are added, and the sum is multiplied once. Rows of a single number are even only if
    it is 0 or +-1, because there is no sum to multiply instead.
    """
    if x_OI.numel() == 0:
        return True
    # The beginning of one row tells real numbers from spikes without a pass over all.
    if x_OI.numel() > 2 * _HEAD and not is_even(x_OI[:1, :_HEAD]):
        return False
    if x_OI.shape[1] > 1:
        low_O1, high_O1 = x_OI.aminmax(dim=1, keepdim=True)
        shared_O1 = torch.maximum(high_O1, -low_O1)
    else:
        shared_O1 = torch.ones_like(x_OI)
    return bool(((x_OI == shared_O1) | (x_OI == -shared_O1) | (x_OI == 0)).all())


@dataclass(frozen=True)
class Convolution:
    """A zero-padded convolution `[N, I, ...] -> [N, O, ...]`, and the two products of its
    backward.
    """

    kernel: tuple[int, ...]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, places: tuple[int, ...]) -> Pairs:
        """Inputs with weights, at each of the `places` of the output."""
        read_Ihw = self._under_taps(_nonzero(x, 0), places).sum(self._dims(1))
        weights_GIhw = _nonzero(weight.unflatten(0, (self.groups, -1)), 1)  # outputs of a group
        live = (read_Ihw * weights_GIhw.flatten(0, 1)).sum()
        of_a_place = len(x) * weight.shape[0] * weight.shape[1]
        return Pairs(int(live), of_a_place * self._inside(tuple(x.shape[2:]), places))

    def error(self, g: Tensor, weight: Tensor, size: tuple[int, ...]) -> Pairs:
        """Output errors with weights, at each place of an input of `size` pixels; also the forward
        of a transposed convolution.
        """
        places = tuple(g.shape[2:])
        reach_Phw = self._under_taps(torch.ones(size, dtype=torch.float64, device=g.device), places)
        reached_Ohw = torch.tensordot(_nonzero(g, 0), reach_Phw, dims=len(size))
        live = (reached_Ohw * _nonzero(weight, 1)).sum()  # inputs of a group
        of_a_place = len(g) * weight.shape[0] * weight.shape[1]
        return Pairs(int(live), of_a_place * self._inside(size, places))

    def weights(self, g: Tensor, x: Tensor) -> Pairs:
        """Output errors with inputs, for each weight."""
        places = tuple(g.shape[2:])
        errors_NGP, inputs_NG = (
            _nonzero(each.unflatten(1, (self.groups, -1)), 2) for each in (g, x)
        )
        read_NGP = self._under_taps(inputs_NG, places).sum(self._dims(2 + len(places)))
        live = (read_NGP * errors_NGP).sum()
        of_a_place = len(g) * g.shape[1] * (x.shape[1] // self.groups)
        return Pairs(int(live), of_a_place * self._inside(tuple(x.shape[2:]), places))

    def _inside(self, size: tuple[int, ...], places: tuple[int, ...]) -> int:
        """Taps inside the image, summed over `places`: the product of each dimension's taps."""
        found = 1
        for taps, n, count, move, pad, step in zip(
            self.kernel, size, places, self.stride, self.padding, self.dilation, strict=True
        ):
            found *= sum(
                0 <= place * move + tap * step - pad < n
                for tap in range(taps)
                for place in range(count)
            )
        return found

    def _under_taps(self, x: Tensor, places: tuple[int, ...]) -> Tensor:
        """The values that each tap reads at each place of the output, 0 in the padding:
        `[..., P..., h w ...]`, a view of the padded image.
        """
        found = F.pad(x, [side for pad in reversed(self.padding) for side in (pad, pad)])
        by_dim = zip(places, self.kernel, self.stride, self.dilation, strict=True)
        for dim, (count, taps, move, step) in enumerate(by_dim, start=x.dim() - len(places)):
            windows = found.unfold(dim, step * (taps - 1) + 1, move)
            found = windows.narrow(dim, 0, count)[..., ::step]
        return found

    def _dims(self, first: int) -> tuple[int, ...]:
        return tuple(range(first, first + len(self.kernel)))


def _nonzero(x: Tensor, dim: int) -> Tensor:
    """The number of non-zeros along `dim`, in float64."""
    if x.is_cuda:  # an intermediate of one byte for each number: memory is short there
        return (x != 0).sum(dim, dtype=torch.float64)
    # An intermediate in fp32, which torch sums several times faster on a CPU.
    live = torch.ne(x, 0, out=torch.empty_like(x, dtype=torch.float32))
    return live.sum(dim, dtype=torch.float32 if x.shape[dim] <= _EXACT else torch.float64).double()
