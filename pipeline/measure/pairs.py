"""How many pairs of numbers a product multiplies, and how many of them hold a 0.

    y[n, o] = sum_i x[n, i] w[i, o]     one pair for each n, i, o; in a convolution, where x lies
    inside the image

Counted from counts: what is not 0 along each index that is summed, so that nothing as large as the
product itself is made."""

# N samples and time steps, I inputs, O outputs, P places of an image, h w taps of a kernel

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Convolution", "Pairs", "batches", "is_even", "matrices"]


_HEAD = 1024
"""numbers of a row that are looked at before all are: rows are even only where their beginnings
are
"""
_EXACT = 2**24
"""ones that a float counts"""


class Pairs(NamedTuple):
    """Of one product."""

    live: int
    """neither number is 0"""
    all: int


def matrices(a_NI: Tensor, b_IO: Tensor) -> Pairs:
    """a b"""
    live = _nonzero(a_NI, 0) @ _nonzero(b_IO, 1)
    return Pairs(int(live), a_NI.shape[0] * b_IO.numel())


def batches(a_BNI: Tensor, b_BIO: Tensor) -> Pairs:
    """a b of each of a batch"""
    live = (_nonzero(a_BNI, 1) * _nonzero(b_BIO, 2)).sum()
    return Pairs(int(live), a_BNI.shape[1] * b_BIO.numel())


def is_even(x_OI: Tensor) -> bool:
    """Whether the numbers of each row that are not 0 have one magnitude: those are added, and
    multiplied once for a sum.

    Of rows with a single number, whether that is 0 or +-1: there is no sum to multiply in the place
    of the number."""
    if x_OI.numel() == 0:
        return True
    if x_OI.numel() > 2 * _HEAD and not is_even(
        x_OI[:1, :_HEAD]
    ):  # as real numbers are told from spikes
        return False
    if x_OI.shape[1] > 1:
        low_O1, high_O1 = x_OI.aminmax(dim=1, keepdim=True)
        shared_O1 = torch.maximum(high_O1, -low_O1)
    else:
        shared_O1 = torch.ones_like(x_OI)
    return bool(((x_OI == shared_O1) | (x_OI == -shared_O1) | (x_OI == 0)).all())


@dataclass(frozen=True)
class Convolution:
    """`[N, I, ...] -> [N, O, ...]` with `kernel` taps, and the two products of its backward; zero
    padding.
    """

    kernel: tuple[int, ...]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, places: tuple[int, ...]) -> Pairs:
        """Inputs with weights, at each of the `places` of the output."""
        read_Ihw = self._under_taps(_nonzero(x, 0), places).sum(self._dims(1))
        weights_Ihw = _nonzero(weight.unflatten(0, (self.groups, -1)), 1).flatten(
            0, 1
        )  # outputs of a group
        live = (read_Ihw * weights_Ihw).sum()
        return Pairs(
            int(live),
            len(x) * weight.shape[0] * weight.shape[1] * self._inside(tuple(x.shape[2:]), places),
        )

    def error(self, g: Tensor, weight: Tensor, size: tuple[int, ...]) -> Pairs:
        """Errors at the output with weights, at each place of an input of `size` pixels: a
        transposed convolution, too.
        """
        places = tuple(g.shape[2:])
        reach_Phw = self._under_taps(torch.ones(size, dtype=torch.float64, device=g.device), places)
        reached_Ohw = torch.tensordot(_nonzero(g, 0), reach_Phw, dims=len(size))
        weights_Ohw = _nonzero(weight, 1)  # inputs of a group
        live = (reached_Ohw * weights_Ohw).sum()
        return Pairs(
            int(live), len(g) * weight.shape[0] * weight.shape[1] * self._inside(size, places)
        )

    def weights(self, g: Tensor, x: Tensor) -> Pairs:
        """Errors at the output with inputs, for each weight."""
        places = tuple(g.shape[2:])
        errors_NGP, inputs_NG = (
            _nonzero(each.unflatten(1, (self.groups, -1)), 2) for each in (g, x)
        )
        read_NGP = self._under_taps(inputs_NG, places).sum(self._dims(2 + len(places)))
        live = (read_NGP * errors_NGP).sum()
        of_a_place = len(g) * g.shape[1] * (x.shape[1] // self.groups)
        return Pairs(int(live), of_a_place * self._inside(tuple(x.shape[2:]), places))

    def _inside(self, size: tuple[int, ...], places: tuple[int, ...]) -> int:
        """Taps that read the image itself, over all `places`: of each dimension by itself, as a box
        is read.
        """
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
        """What each tap reads at each place of the output, 0 in the padding: `[..., P..., h w
        ...]`, a view of the padded.
        """
        found = F.pad(x, [side for pad in reversed(self.padding) for side in (pad, pad)])
        by_dim = zip(places, self.kernel, self.stride, self.dilation, strict=True)
        for dim, (count, taps, move, step) in enumerate(by_dim, start=x.dim() - len(places)):
            found = found.unfold(dim, step * (taps - 1) + 1, move).narrow(dim, 0, count)[
                ..., ::step
            ]
        return found

    def _dims(self, first: int) -> tuple[int, ...]:
        return tuple(range(first, first + len(self.kernel)))


def _nonzero(x: Tensor, dim: int) -> Tensor:
    """How many numbers along `dim` are not 0."""
    if x.is_cuda:  # a byte for each in between: memory is short there
        return (x != 0).sum(dim, dtype=torch.float64)
    # A float for each: torch adds those several times as fast on a CPU.
    live = torch.ne(x, 0, out=torch.empty_like(x, dtype=torch.float32))
    return live.sum(dim, dtype=torch.float32 if x.shape[dim] <= _EXACT else torch.float64).double()
