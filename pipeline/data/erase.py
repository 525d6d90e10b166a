"""Random erasing, compiled: a rectangle of a normalised view becomes noise of mean 0 and standard deviation 1.

Its area is a share 0.02 to 1/3 of the view, its ratio of height to width 0.3 to 1/0.3, evenly spaced in the logarithm; of ten
attempts the first that fits is taken.

Source: Zhong et al. 2020, arXiv:1708.04896; choices as of timm 1.0.31 in its mode "pixel".
"""

# C channels, S side of a view

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.random import ERASE, ERASE_PIXELS

AREA, RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


def make(compiled: Callable[[Callable[..., Any]], Any], bits: Any, below: Any) -> Any:
    """`erase(out_CSS, seed, epoch, index, tables)`, in place; `tables` as in colour.py."""
    s11, s16, s48, s52 = np.uint64(11), np.uint64(16), np.uint64(48), np.uint64(52)
    draw_whether, draw_pixels, four = np.uint64(ERASE), np.uint64(ERASE_PIXELS), np.uint64(4)
    draws = np.arange(ERASE + 8, ERASE + 48, dtype=np.uint64).reshape(10, 4)
    smallest, largest = AREA

    @compiled
    def unit(random_bits):
        return np.float64(random_bits >> s11) * 2.0**-53

    @compiled
    def erase(out_CSS, seed, epoch, index, tables):
        probability, ratios, normals = tables[0][1], tables[1], tables[2]
        if unit(bits(seed, epoch, index, draw_whether)) >= probability:
            return
        side = out_CSS.shape[1]
        for attempt in range(10):
            area = (smallest + (largest - smallest) * unit(bits(seed, epoch, index, draws[attempt, 0]))) * side * side
            ratio = ratios[bits(seed, epoch, index, draws[attempt, 1]) >> s52]
            height = np.int64(math.floor(math.sqrt(area * ratio) + 0.5))
            width = np.int64(math.floor(math.sqrt(area / ratio) + 0.5))
            if height < side and width < side:
                top = below(bits(seed, epoch, index, draws[attempt, 2]), side - height + 1)
                left = below(bits(seed, epoch, index, draws[attempt, 3]), side - width + 1)
                fill(out_CSS[:, top : top + height, left : left + width], seed, epoch, index, normals)
                return

    @compiled
    def fill(out_Chw, seed, epoch, index, normals):
        """Four values of each draw, 16 bits for each."""
        place, random_bits = np.uint64(0), np.uint64(0)
        for c in range(out_Chw.shape[0]):
            for y in range(out_Chw.shape[1]):
                for x in range(out_Chw.shape[2]):
                    if place % four == 0:
                        random_bits = bits(seed, epoch, index, draw_pixels + place // four)
                    out_Chw[c, y, x] = normals[random_bits >> s48]
                    random_bits = random_bits << s16
                    place += np.uint64(1)

    return erase
