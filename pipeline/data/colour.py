"""RandAugment's operations on colour, compiled: two of ten are drawn for a view, and each is applied half of the time.

    magnitude ~ N(m, 1/2), clipped to 0..10

    autocontrast, equalize, invert                      have no strength
    posterize            4 - floor(4 magnitude / 10) bits stay; at 10 one, where timm asks Pillow for none, which it refuses
    solarize             levels from 256 - floor(25.6 magnitude) on are inverted
    solarize-add         floor(11 magnitude) is added to levels below 128
    colour, contrast, brightness, sharpness             other + f (view - other), the other grey, its mean grey, black, smoothed;
                                                        f = max(0.1, 1 +- 0.09 magnitude)

timm's "rand-m9-mstd0.5-inc1" without its rotations, shears and shifts, whose place a crop takes.

Source: Cubuk et al. 2020, arXiv:1909.13719; to the bit what timm 1.0.31 does with Pillow 13.0, for the same draws.
"""

# S side of a view

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.random import COLOUR

OPERATIONS = (
    *("autocontrast", "equalize", "invert", "posterize", "solarize", "solarize-add"),
    *("colour", "contrast", "brightness", "sharpness"),
)
BY_TABLE = 6  # the first so many change each level of a channel by a table
LAYERS, MOST, SPREAD = 2, 10.0, 0.5


def make(compiled: Callable[[Callable[..., Any]], Any], bits: Any, below: Any) -> tuple[Any, Any]:
    """`recolour(pixels_SS3, seed, epoch, index, tables)` and, for tests, `apply(pixels_SS3, operation, level, sign)`, both in
    place, on uint8. `tables` are augment.py's: strengths (colour, erase), aspect ratios, normal quantiles."""
    s48, s63 = np.uint64(48), np.uint64(63)
    draws = np.arange(COLOUR, COLOUR + 8 * LAYERS, dtype=np.uint64).reshape(LAYERS, 8)
    operations, by_table, layers, most, spread = len(OPERATIONS), BY_TABLE, LAYERS, MOST, SPREAD

    @compiled
    def recolour(pixels_SS3, seed, epoch, index, tables):
        magnitude, normals = tables[0][0], tables[2]
        if magnitude == 0:
            return
        for layer in range(layers):
            if bits(seed, epoch, index, draws[layer, 0]) >> s63 == 0:
                continue
            operation = below(bits(seed, epoch, index, draws[layer, 1]), operations)
            level = magnitude + spread * normals[bits(seed, epoch, index, draws[layer, 2]) >> s48]
            sign = 1.0 if bits(seed, epoch, index, draws[layer, 3]) >> s63 == 0 else -1.0
            apply(pixels_SS3, operation, min(max(level, 0.0), most), sign)

    @compiled
    def apply(pixels_SS3, operation, level, sign):
        if operation < by_table:
            tables = np.empty((3, 256), np.int64)
            for c in range(3):
                fill_table(tables[c], pixels_SS3[:, :, c], operation, level)
            for y in range(pixels_SS3.shape[0]):
                for x in range(pixels_SS3.shape[1]):
                    for c in range(3):
                        pixels_SS3[y, x, c] = tables[c, pixels_SS3[y, x, c]]
        else:
            blend(pixels_SS3, operation, np.float32(max(0.1, 1.0 + sign * (level / 10.0 * 0.9))))

    @compiled
    def fill_table(table, channel_SS, operation, level):
        """What becomes of each level of a channel."""
        for i in range(256):
            table[i] = i
        if operation < 2:
            counts = np.zeros(256, np.int64)
            for y in range(channel_SS.shape[0]):
                for x in range(channel_SS.shape[1]):
                    counts[channel_SS[y, x]] += 1
            lowest, highest = 0, 255
            while counts[lowest] == 0:
                lowest += 1
            while counts[highest] == 0:
                highest -= 1
            if operation == 0 and lowest < highest:
                scale = 255.0 / (highest - lowest)
                offset = -lowest * scale
                for i in range(256):
                    table[i] = min(max(int(i * scale + offset), 0), 255)
            if operation == 1 and lowest < highest:
                step = (counts.sum() - counts[highest]) // 255
                passed = step // 2
                for i in range(256):
                    if step > 0:
                        table[i] = min(passed // step, 255)
                        passed += counts[i]
        elif operation == 2:
            for i in range(256):
                table[i] = 255 - i
        elif operation == 3:
            unit = 1 << (8 - max(1, 4 - int(level / 10.0 * 4)))
            for i in range(256):
                table[i] = i // unit * unit
        elif operation == 4:
            for i in range(256 - min(256, int(level / 10.0 * 256)), 256):
                table[i] = 255 - i
        else:
            for i in range(128):
                table[i] = min(255, i + min(128, int(level / 10.0 * 110)))

    @compiled
    def luma(pixel_3):
        return (np.int64(pixel_3[0]) * 19595 + np.int64(pixel_3[1]) * 38470 + np.int64(pixel_3[2]) * 7471 + 32768) >> 16

    @compiled
    def blend(pixels_SS3, operation, factor):
        """Away from another picture by `factor`: 0 gives that one, 1 this one; in Pillow's float32, cut off and not rounded."""
        height, width = pixels_SS3.shape[0], pixels_SS3.shape[1]
        mean = np.int64(0)
        if operation == 7:
            total = np.int64(0)
            for y in range(height):
                for x in range(width):
                    total += luma(pixels_SS3[y, x])
            mean = int(total / (height * width) + 0.5)
        before_SS3 = pixels_SS3.copy()
        for y in range(height):
            for x in range(width):
                grey = luma(before_SS3[y, x]) if operation == 6 else mean
                for c in range(3):
                    here = np.int64(before_SS3[y, x, c])
                    other = grey
                    if operation == 9:
                        other = here  # Pillow's filter leaves the border as it is
                        if 0 < y < height - 1 and 0 < x < width - 1:
                            around = 4 * here
                            for row in range(y - 1, y + 2):
                                for column in range(x - 1, x + 2):
                                    around += np.int64(before_SS3[row, column, c])
                            other = (2 * around + 13) // 26  # its kernel of 1 and 5 over 13, rounded
                    value = np.float32(other) + factor * np.float32(here - other)
                    pixels_SS3[y, x, c] = np.uint8(min(max(value, np.float32(0)), np.float32(255)))

    return recolour, apply
