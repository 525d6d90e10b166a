"""How many pairs of numbers a product multiplies, and how many of them hold a 0.

    y[n, o] = sum_i x[n, i] w[i, o]     one pair for each n, i, o; in a convolution, where x lies inside the image

Counted from counts: what is not 0 along each index that is summed, so that nothing as large as the product itself is made.
"""

# N samples and time steps, I inputs, O outputs, P places of an image, h w taps of a kernel

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Convolution", "Pairs", "batches", "is_even", "matrices"]


_HEAD = 1024
"""numbers of a row that are looked at before all are: rows are even only where their beginnings are"""


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
    """Whether the numbers of each row that are not 0 have one magnitude: those are added, and multiplied once for a sum.

    Of rows with a single number, whether that is 0 or +-1: there is no sum to multiply in the place of the number.
    """
    if x_OI.numel() == 0:
        return True
    if x_OI.numel() > 2 * _HEAD and not is_even(x_OI[:1, :_HEAD]):  # as real numbers are told from spikes
        return False
    if x_OI.shape[1] > 1:
        low_O1, high_O1 = x_OI.aminmax(dim=1, keepdim=True)
        shared_O1 = torch.maximum(high_O1, -low_O1)
    else:
        shared_O1 = torch.ones_like(x_OI)
    return bool(((x_OI == shared_O1) | (x_OI == -shared_O1) | (x_OI == 0)).all())


@dataclass(frozen=True)
class Convolution:
    """`[N, I, ...] -> [N, O, ...]` with `kernel` taps, and the two products of its backward; zero padding."""

    kernel: tuple[int, ...]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, places: tuple[int, ...]) -> Pairs:
        """Inputs with weights, at each of the `places` of the output."""
        inputs_IP = _nonzero(x, 0)
        weights_Ihw = _nonzero(weight.unflatten(0, (self.groups, -1)), 1).flatten(0, 1)  # outputs of a group
        taps = zip(self._under_taps(inputs_IP, places), weights_Ihw.flatten(1).unbind(1), strict=True)
        live = sum((read_IP.flatten(1).sum(1) @ weights_I).item() for read_IP, weights_I in taps)
        return Pairs(int(live), len(x) * weight.shape[0] * weight.shape[1] * self._inside(tuple(x.shape[2:]), places))

    def error(self, g: Tensor, weight: Tensor, size: tuple[int, ...]) -> Pairs:
        """Errors at the output with weights, at each place of an input of `size` pixels: a transposed convolution, too."""
        places = tuple(g.shape[2:])
        errors_OP = _nonzero(g, 0)
        weights_Ohw = _nonzero(weight, 1).flatten(1)  # inputs of a group
        reaches = self._under_taps(_ones(size, g.device), places)
        taps = zip(reaches, weights_Ohw.unbind(1), strict=True)
        live = sum(((errors_OP * reach_1P).flatten(1).sum(1) @ weights_O).item() for reach_1P, weights_O in taps)
        return Pairs(int(live), len(g) * weight.shape[0] * weight.shape[1] * self._inside(size, places))

    def weights(self, g: Tensor, x: Tensor) -> Pairs:
        """Errors at the output with inputs, for each weight."""
        places = tuple(g.shape[2:])
        errors_NG, inputs_NG = (_nonzero(each.unflatten(1, (self.groups, -1)), 2) for each in (g, x))
        live = sum((read_NG * errors_NG).sum().item() for read_NG in self._under_taps(inputs_NG, places))
        of_a_place = len(g) * g.shape[1] * (x.shape[1] // self.groups)
        return Pairs(int(live), of_a_place * self._inside(tuple(x.shape[2:]), places))

    def _inside(self, size: tuple[int, ...], places: tuple[int, ...]) -> int:
        """Taps that read the image itself, over all `places`: of each dimension by itself, as a box is read."""
        found = 1
        for taps, n, count, move, pad, step in zip(
            self.kernel, size, places, self.stride, self.padding, self.dilation, strict=True
        ):
            found *= sum(0 <= place * move + tap * step - pad < n for tap in range(taps) for place in range(count))
        return found

    def _under_taps(self, x: Tensor, places: tuple[int, ...]) -> list[Tensor]:
        """For every tap, what it reads at the places of the output; 0 in the padding."""
        sides = [side for pad in reversed(self.padding) for side in (pad, pad)]
        padded = F.pad(x, sides)
        found = []
        for tap in product(*map(range, self.kernel)):
            starts = [place * step for place, step in zip(tap, self.dilation, strict=True)]
            strides = zip(starts, places, self.stride, strict=True)
            found.append(padded[(..., *(slice(start, start + (size - 1) * move + 1, move) for start, size, move in strides))])
        return found


def _ones(size: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.ones(1, *size, dtype=torch.float64, device=device)


def _nonzero(x: Tensor, dim: int) -> Tensor:
    """How many numbers along `dim` are not 0; in between, a byte for each."""
    return (x != 0).sum(dim, dtype=torch.float64)
