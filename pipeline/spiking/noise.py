"""Noise that a rule adds to a layer: a pure function of the keys of its rows, whatever the rank or
the batch.

    bits[b, j] = mix(key[b] + (j + 1) g)          splitmix64: the stream of row b, counted from its
    own key

    gaussian     two normal numbers of 64 bits each:   sqrt(-2 ln u) (cos 2 pi w, sin 2 pi w),   u,
    w of 32 bits rademacher   64 signs of 64 bits

Two rows of one key are equal, and a row does not know which other rows are drawn with it. The
global generators are neither read nor moved.

Source: `mix` and its step g as in random.py; Box & Muller 1958 (doi 10.1214/aoms/1177706645).
"""

# B batch, N units of a layer

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pipeline.core.random import STEP, mix, signed

Distribution = Literal["gaussian", "rademacher"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("gaussian", "rademacher")


def noise(
    keys: Sequence[int],
    units: int,
    *,
    distribution: Distribution,
    device: torch.device | str = "cpu",
) -> Tensor:
    """`[B, N]` in fp32 with mean 0 and variance 1: row b of `units` values depends on `keys[b]` (64
    bits) alone.
    """
    keys_B = torch.tensor([signed(key) for key in keys], dtype=torch.int64, device=device)
    if distribution == "rademacher":
        return _signs(keys_B, units)
    if distribution == "gaussian":
        return _normal(keys_B, units)
    raise ValueError(
        f"noise: distribution must be one of {', '.join(DISTRIBUTIONS)}; got"
        f" distribution={distribution!r}"
    )


def _normal(keys_B: Tensor, units: int) -> Tensor:
    pairs = (units + 1) // 2
    bits_BP = _bits(keys_B, pairs)
    # The upper 32 bits as a number in (0, 1], so that its logarithm is finite; fp32 rounds it to 24
    # bits. The lower as an angle.
    radius_BP = (
        ((bits_BP >> 32) & _LOW32)
        .float()
        .add_(1)
        .mul_(2.0**-32)
        .log_()
        .mul_(-2)
        .clamp_min_(0)
        .sqrt_()
    )
    angle_BP = (bits_BP & _LOW32).float().mul_(2 * math.pi * 2.0**-32)
    return torch.cat([radius_BP * angle_BP.cos(), radius_BP * angle_BP.sin()], dim=1)[:, :units]


def _signs(keys_B: Tensor, units: int) -> Tensor:
    bits_BW = _bits(keys_B, (units + 63) // 64)
    places = torch.arange(64, device=keys_B.device)
    return ((bits_BW[..., None] >> places) & 1).flatten(1)[:, :units].float().mul_(2).sub_(1)


def _bits(keys_B: Tensor, count: int) -> Tensor:
    """`[B, count]` of int64, whose arithmetic wraps as that of 64 unsigned bits does."""
    return mix(keys_B[:, None] + torch.arange(1, count + 1, device=keys_B.device) * STEP)


_LOW32 = (1 << 32) - 1
