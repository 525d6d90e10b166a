"""Random numbers as a pure function of (seed, epoch, index, draw): the same on any rank, in any thread, after any restart.

    z = mix(seed + g);  z = mix((z ^ epoch) + g);  z = mix((z ^ index) + g);  bits = mix((z ^ draw) + g)

with splitmix64's increment g and its finaliser `mix`, all modulo 2^64.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014, doi:10.1145/2660193.2660195 (the finaliser
is Stafford's variant 13).

The views of a sample that one epoch holds several of (`repeats` in order.py) differ in the second part, epoch + copy 2^32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Which draw means what. A new use takes new numbers: an old one never moves.
ORDER, FLIP, SHIFT_Y, SHIFT_X = 0, 1, 2, 3
HELD_OUT = 8
COUNTED = 11  # which samples of an evaluation are counted on, see measure/activity.py and evenly.py
PAGE = 10  # which samples have their pages compared, see data/page_checks.py
DONOR = 9  # the order of an evaluation set in which each sample is the donor of the one before, see ensemble.py
MIX, MIX_BY_CUT, MIX_SHARE, MIX_Y, MIX_X = 96, 97, 98, 99, 100  # with the step for the epoch, see mixing.py
COLOUR = 112  # layer l draws COLOUR + 8l + (0 whether, 1 which, 2 magnitude, 3 sign)
ERASE = 136  # whether; attempt a draws ERASE + 8 + 4a + (0 area, 1 ratio, 2 top, 3 left)
ERASE_PIXELS = 1 << 20  # and upwards: 4 pixels a draw
CROP = 16  # attempt a of a random resized crop draws CROP + 4a + (0 area, 1 ratio, 2 top, 3 left)


def bits(seed: ArrayLike, epoch: ArrayLike, index: ArrayLike, draw: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each (seed, epoch, index, draw), broadcast against each other as NumPy does."""
    with np.errstate(over="ignore"):  # 2^64 wraps by design; NumPy warns of it for scalars alone
        return _bits(*(np.asarray(part).astype(np.uint64) for part in (seed, epoch, index, draw)))


def below(random_bits: ArrayLike, n: int) -> NDArray[np.int64]:
    """Whole numbers 0..n-1 from the upper 32 bits; n < 2^31, bias below n / 2^32."""
    return ((np.asarray(random_bits, np.uint64) >> _S32) * np.uint64(n) >> _S32).astype(np.int64)


def normal_table() -> NDArray[np.float32]:
    """65536 values at evenly spaced quantiles of the normal distribution, rounded so that no library's last digit matters."""
    from scipy.special import ndtri  # not for processes that write, which draw nothing from it

    return np.round(ndtri((np.arange(1 << 16) + 0.5) / (1 << 16)), 5).astype(np.float32)


def make(compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function) -> Callable[..., Any]:
    """The function `bits(seed, epoch, index, draw)` on uint64, passed through `compiled` (identity, or `numba.njit`).

    One source for both, so that they cannot drift apart. Every constant and every shift is np.uint64: numba 0.68.1 types
    uint64 with a literal as int64, and uint64 with int64 as float64.
    """
    step, shift_a, factor_a, shift_b, factor_b, shift_c = _STEP, _S30, _FACTOR_A, _S27, _FACTOR_B, _S31

    @compiled
    def mix(z):
        z = (z ^ (z >> shift_a)) * factor_a
        z = (z ^ (z >> shift_b)) * factor_b
        return z ^ (z >> shift_c)

    @compiled
    def bits(seed, epoch, index, draw):
        z = mix(seed + step)
        z = mix((z ^ epoch) + step)
        z = mix((z ^ index) + step)
        return mix((z ^ draw) + step)

    return bits


_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_A, _FACTOR_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_bits = make()
