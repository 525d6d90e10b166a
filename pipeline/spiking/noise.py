"""Noise for the layers of a network: each row is a pure function of its key.

    bits[b, j] = mix(key[b] + (j + 1) g)   splitmix64: the random bits of row b

    gaussian     64 bits give two normal numbers:
                 sqrt(-2 ln u) (cos 2 pi w, sin 2 pi w), u and w of 32 bits each
    rademacher   64 bits give 64 signs

A row does not depend on other rows, the rank or the batch. The global random generators are not
used. `mix` and g (`INCREMENT`) are those of core/random.py.

Source: Box & Muller 1958 (doi 10.1214/aoms/1177706645).
"""

# B batch, N units of a layer, P pairs of units, W words of 64 bits

import math
from typing import Literal

import torch
from torch import Tensor

from pipeline.core.checks import refuse_unless_one_of
from pipeline.core.random import INCREMENT, mix

Distribution = Literal["gaussian", "rademacher"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("gaussian", "rademacher")


def noise(keys_B: Tensor, units: int, *, distribution: Distribution) -> Tensor:
    """`[B, N]` in fp32 with mean 0 and variance 1, on the device of the keys.

    Row b depends on the 64-bit `keys_B[b]` (int64), and on `units` and `distribution`, but on no
    other row.

    Raises: ValueError for an unknown `distribution`.
    """
    refuse_unless_one_of("noise", DISTRIBUTIONS, distribution=distribution)
    return _normal(keys_B, units) if distribution == "gaussian" else _signs(keys_B, units)


def _normal(keys_B: Tensor, units: int) -> Tensor:
    bits_BP = _bits(keys_B, (units + 1) // 2)
    # The upper 32 bits give u in (0, 1], so its logarithm is finite (fp32 rounds u to 24 bits).
    # The lower 32 bits give the angle.
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
    signs_BN = ((bits_BW[..., None] >> torch.arange(64, device=keys_B.device)) & 1).flatten(1)
    return signs_BN[:, :units].float().mul_(2).sub_(1)


def _bits(keys_B: Tensor, count: int) -> Tensor:
    """`count` random 64-bit numbers per row, as int64, which wraps like unsigned integers."""
    return mix(keys_B[:, None] + torch.arange(1, count + 1, device=keys_B.device) * INCREMENT)


_LOW32 = (1 << 32) - 1
