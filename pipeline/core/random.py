"""Random numbers as a pure function of counters.

The numbers are the same on any rank, in any thread and after any restart.

    z = mix(seed + g)
    z = mix((z ^ epoch) + g)
    z = mix((z ^ index) + g)
    bits = mix((z ^ draw) + g)

g is the increment of splitmix64, and `mix` is its finaliser. All numbers are modulo 2^64. The
global generators of Python, numpy and torch are neither read nor advanced.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014,
doi:10.1145/2660193.2660195 (the finaliser is Stafford's variant 13).

An epoch may hold several views of a sample (`repeats` in data/order.py). Each view then has the
counter epoch + copy 2^32 instead of the epoch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The numbers of the draws. A new use takes new numbers. Existing numbers never change.
ORDER, FLIP, SHIFT_Y, SHIFT_X = 0, 1, 2, 3
HELD_OUT = 8
# the samples of an evaluation with counted activity: measure/activity.py, energy.py
COUNTED = 11
PAGE = 10  # the samples whose pages are checked: data/ffcv/page_checks.py
# the order in which each sample is the donor of the previous one: benchmarks/carryover.py
DONOR = 9
# uses the step instead of the epoch: data/mixing.py
MIX, MIX_BY_CUT, MIX_SHARE, MIX_Y, MIX_X = 96, 97, 98, 99, 100
COLOUR = 112  # layer l draws COLOUR + 8l + (0 whether, 1 which operation, 2 magnitude, 3 sign)
ERASE = 136  # whether to erase; attempt a draws ERASE + 8 + 4a + (0 area, 1 ratio, 2 top, 3 left)
ERASE_PIXELS = 1 << 20  # the first of many draws, one per 4 pixels
CROP = 16  # attempt a of a random resized crop draws CROP + 4a + (0 area, 1 ratio, 2 top, 3 left)

_LOW64 = (1 << 64) - 1


def signed(number: int) -> int:
    """64 bits as a signed number, because torch has no arithmetic of unsigned 64-bit numbers."""
    return number - (1 << 64) if number >> 63 else number


def mixer(convert: Callable[[int], Any]) -> Callable[[Any], Any]:
    """The finaliser of splitmix64, with its constants converted by `convert`.

    `convert=np.uint64` is for numpy and numba, where a signed number must not overflow.
    `convert=signed` is for torch and for Python's int: the low 64 bits of the result are then
    right. The masks make the shifts of signed numbers logical.
    """
    factor_a, factor_b = convert(0xBF58476D1CE4E5B9), convert(0x94D049BB133111EB)
    shift_a, shift_b, shift_c = map(convert, (30, 27, 31))
    mask_a, mask_b, mask_c = (convert(_LOW64 >> shift) for shift in (30, 27, 31))

    def mix(z: Any) -> Any:
        z = (z ^ ((z >> shift_a) & mask_a)) * factor_a
        z = (z ^ ((z >> shift_b) & mask_b)) * factor_b
        return z ^ ((z >> shift_c) & mask_c)

    return mix


STEP = signed(0x9E3779B97F4A7C15)
mix = mixer(signed)
_UNSIGNED_STEP = np.uint64(STEP & _LOW64)
_unsigned_mix = mixer(np.uint64)


def counter_hash(*counters: int) -> int:
    """64 bits from any number of counters; from four counters, the same as `bits`."""
    z = 0
    for counter in counters:
        z = mix((z ^ counter) + STEP) & _LOW64
    return z


def bits(
    seed: ArrayLike, epoch: ArrayLike, index: ArrayLike, draw: ArrayLike
) -> NDArray[np.uint64]:
    """64 random bits for each (seed, epoch, index, draw), broadcast as numpy does."""
    z: Any = np.uint64(0)
    with np.errstate(over="ignore"):  # numpy warns about scalar overflow, which is intended here
        for counter in (seed, epoch, index, draw):
            z = _unsigned_mix((z ^ np.asarray(counter).astype(np.uint64)) + _UNSIGNED_STEP)
    return z


def compiled_bits(compiled: Callable[[Callable[..., Any]], Any]) -> Any:
    """`bits` for four uint64 scalars, compiled by `compiled`, such as `numba.njit`."""
    mix, step = compiled(_unsigned_mix), _UNSIGNED_STEP

    @compiled
    def bits(seed, epoch, index, draw):
        z = mix(seed + step)
        z = mix((z ^ epoch) + step)
        z = mix((z ^ index) + step)
        return mix((z ^ draw) + step)

    return bits


def below(random_bits: ArrayLike, n: int) -> NDArray[np.int64]:
    """Whole numbers in 0..n-1 from the upper 32 bits. n < 2^31; the bias is below n / 2^32."""
    shift = np.uint64(32)
    return ((np.asarray(random_bits, np.uint64) >> shift) * np.uint64(n) >> shift).astype(np.int64)


def normal_table() -> NDArray[np.float32]:
    """65536 values at evenly spaced quantiles of the normal distribution.

    They are rounded, so that they do not depend on the version of scipy.
    """
    from scipy.special import ndtri  # scipy comes with the extra [train]

    return np.round(ndtri((np.arange(1 << 16) + 0.5) / (1 << 16)), 5).astype(np.float32)
