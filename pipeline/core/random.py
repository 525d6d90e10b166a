"""Random numbers as a pure function of counters.

The numbers are the same on any rank, in any thread and after any restart.

    z = mix(seed + g)
    z = mix((z ^ epoch) + g)
    z = mix((z ^ index) + g)
    bits = mix((z ^ draw) + g)

g is the increment of splitmix64, and `mix` is its finaliser. All numbers are modulo 2^64. The
global generators of Python, numpy and torch are neither read nor advanced.

An epoch may hold several views of a sample (`repeats` in data/order.py). Each further view of a
sample uses epoch + view_number * 2^32 in place of the epoch.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014,
doi:10.1145/2660193.2660195 (the finaliser is Stafford's variant 13).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The numbers of the draws. A new use takes new numbers. Existing numbers never change. Three pairs
# of uses share numbers, because no data set has both: moving shapes and saccades; flashes and
# stamps; ORDER and the images that are stored as JPEG. These numbers are in the modules that use
# them:
#     0                            data/write/images.py, the images that mode "mixed" stores as JPEG
#     64 to 68                     data/datasets/synthetic.py
#     80                           data/datasets/tasks.py
#     256 to 262, 512 to 1311      data/write/generated_events.py, moving shapes
#     768, 1024 to 1423            data/write/generated_events.py, saccades
#     1536 to 1543, 2048 upwards   data/write/generated_events.py, flashes
#     2048 to 2057                 data/write/stamps.py
ORDER, FLIP, SHIFT_Y, SHIFT_X = 0, 1, 2, 3
CUTOUT_Y, CUTOUT_X = 4, 5
HELD_OUT = 8
# the shuffled order of evaluation samples, in which each sample is the donor of the one before it:
# benchmarks/carryover.py
DONOR = 9
PAGE = 10  # the samples whose pages are checked: data/ffcv/page_checks.py
# the samples of an evaluation with counted activity: measure/activity.py, energy.py
COUNTED = 11
# the state of global generators while an item of a torch Dataset is read:
# data/datasets/torch_dataset.py
ITEM = 12
# attempt a of a random resized crop draws CROP + 4 * a + (0 area, 1 ratio, 2 top, 3 left)
CROP = 16
# These draws use the step instead of the epoch: data/mixing.py.
MIX, MIX_BY_CUT, MIX_SHARE, MIX_Y, MIX_X = 96, 97, 98, 99, 100
# layer l draws COLOUR + 8 * l + (0 whether, 1 which operation, 2 magnitude, 3 sign)
COLOUR = 112
# whether to erase; attempt a draws ERASE + 8 + 4 * a + (0 area, 1 ratio, 2 top, 3 left)
ERASE = 136
ERASE_PIXELS = 1 << 20  # the first of many draws, one per 4 pixels

_LOW64 = (1 << 64) - 1


def signed(number: int) -> int:
    """An unsigned 64-bit number as a signed one with the same bits.

    torch has no arithmetic of unsigned 64-bit numbers.
    """
    return number - (1 << 64) if number >> 63 else number


def mixer(convert: Callable[[int], Any]) -> Callable[[Any], Any]:
    """The finaliser of splitmix64, with its constants converted by `convert`.

    `convert=np.uint64` is for numpy and numba, where a signed number must not overflow.
    `convert=signed` is for torch and for Python's int. Only the low 64 bits of the result are
    valid. The masks make the shifts of signed numbers logical.
    """
    factor_a, factor_b = convert(0xBF58476D1CE4E5B9), convert(0x94D049BB133111EB)
    shift_a, shift_b, shift_c = map(convert, (30, 27, 31))
    mask_a, mask_b, mask_c = (convert(_LOW64 >> shift) for shift in (30, 27, 31))

    def mix(z: Any) -> Any:
        z = (z ^ ((z >> shift_a) & mask_a)) * factor_a
        z = (z ^ ((z >> shift_b) & mask_b)) * factor_b
        return z ^ ((z >> shift_c) & mask_c)

    return mix


INCREMENT = signed(0x9E3779B97F4A7C15)  # of splitmix64
mix = mixer(signed)
UNSIGNED_INCREMENT = np.uint64(INCREMENT & _LOW64)
unsigned_mix = mixer(np.uint64)


def counter_hash(*counters: int) -> int:
    """64 bits from any number of counters; from four counters, the same as `bits`."""
    return hash_on_device(*counters) & _LOW64


def hash_on_device(*counters: Any) -> Any:
    """The bits of `counter_hash` as a signed number, from numbers and int64 tensors. Tensors are
    broadcast, and the result is on their device. Without a tensor, it is an int.
    """
    z: Any = 0
    for counter in counters:
        z = mix((z ^ counter) + INCREMENT)
        z = signed(z & _LOW64) if isinstance(z, int) else z
    return z


def bits(
    seed: ArrayLike, epoch: ArrayLike, index: ArrayLike, draw: ArrayLike
) -> NDArray[np.uint64]:
    """64 random bits for each (seed, epoch, index, draw), broadcast as numpy does."""
    z: Any = np.uint64(0)
    with np.errstate(over="ignore"):  # numpy warns about scalar overflow, which is intended here
        for counter in (seed, epoch, index, draw):
            z = unsigned_mix((z ^ np.asarray(counter).astype(np.uint64)) + UNSIGNED_INCREMENT)
    return z


def below(random_bits: ArrayLike, n: int) -> NDArray[np.int64]:
    """Whole numbers in 0..n-1 from the upper 32 bits. n must be below 2^31.

    The probability of each number is at least (1 - n / 2^32) / n and at most (1 + n / 2^32) / n.
    """
    shift = np.uint64(32)
    return ((np.asarray(random_bits, np.uint64) >> shift) * np.uint64(n) >> shift).astype(np.int64)


def uniform(random_bits: ArrayLike) -> NDArray[np.float64]:
    """Numbers in 0..1, 1 excluded, from the upper 53 bits."""
    return np.asarray((np.asarray(random_bits, np.uint64) >> np.uint64(11)) * 2.0**-53, np.float64)


def normal_table() -> NDArray[np.float32]:
    """65536 values at evenly spaced quantiles of the normal distribution.

    They are rounded, so that they do not depend on the version of scipy.
    """
    from scipy.special import ndtri  # scipy comes with the extra [train]

    return np.round(ndtri((np.arange(1 << 16) + 0.5) / (1 << 16)), 5).astype(np.float32)
