"""Random erasing, compiled: a rectangle of a normalised view is replaced by noise of mean 0 and
standard deviation 1.

The rectangle's area is a share 0.02 to 1/3 of the view. Its ratio of height to width is 0.3 to
1/0.3, uniform in the logarithm. Of ten attempts the first that fits is used.

Source: Zhong et al. 2020, arXiv:1708.04896; the ranges are those of timm 1.0.31 in its mode
"pixel".
"""

# C channels, S side of a view

import math

import numpy as np

from pipeline.core.random import ERASE, ERASE_PIXELS
from pipeline.data.ffcv.loops import below, bits, compiled, unit

AREA, RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
_ATTEMPTS = 10
_DRAWS = np.arange(ERASE + 8, ERASE + 8 + 4 * _ATTEMPTS, dtype=np.uint64).reshape(_ATTEMPTS, 4)
_WHETHER, _PIXELS = np.uint64(ERASE), np.uint64(ERASE_PIXELS)
_FOUR, _S16, _S48, _S52 = np.uint64(4), np.uint64(16), np.uint64(48), np.uint64(52)


@compiled
def fill(out_Chw, seed, epoch, index, normals):
    """Fill with noise: four values from each draw, of 16 bits each."""
    place, random_bits = np.uint64(0), np.uint64(0)
    for c in range(out_Chw.shape[0]):
        for y in range(out_Chw.shape[1]):
            for x in range(out_Chw.shape[2]):
                if place % _FOUR == 0:
                    random_bits = bits(seed, epoch, index, _PIXELS + place // _FOUR)
                out_Chw[c, y, x] = normals[random_bits >> _S48]
                random_bits = random_bits << _S16
                place += np.uint64(1)


@compiled
def erase(out_CSS, seed, epoch, index, strength, ratios, normals):
    """Erase in place. `strength`: (colour, erase). `ratios`, `normals`: tables of RATIO and of
    normal quantiles.
    """
    if unit(bits(seed, epoch, index, _WHETHER)) >= strength[1]:
        return
    side = out_CSS.shape[1]
    for attempt in range(_ATTEMPTS):
        area = (
            (AREA[0] + (AREA[1] - AREA[0]) * unit(bits(seed, epoch, index, _DRAWS[attempt, 0])))
            * side
            * side
        )
        ratio = ratios[bits(seed, epoch, index, _DRAWS[attempt, 1]) >> _S52]
        height = np.int64(math.floor(math.sqrt(area * ratio) + 0.5))
        width = np.int64(math.floor(math.sqrt(area / ratio) + 0.5))
        if height < side and width < side:
            top = below(bits(seed, epoch, index, _DRAWS[attempt, 2]), side - height + 1)
            left = below(bits(seed, epoch, index, _DRAWS[attempt, 3]), side - width + 1)
            fill(out_CSS[:, top : top + height, left : left + width], seed, epoch, index, normals)
            return
