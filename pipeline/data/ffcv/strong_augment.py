"""Strong augmentation, compiled: RandAugment's colour operations, and random erasing.

Of ten colour operations two are drawn for a view, independently, and each is applied with
probability 1/2.

    magnitude ~ N(m, 1/2), clipped to 0..10

    autocontrast, equalize, invert    have no strength
    posterize                         4 - floor(4 magnitude / 10) bits remain, at least one (at 10,
                                      timm asks Pillow for none, which Pillow refuses)
    solarize                          levels from 256 - floor(25.6 magnitude) on are inverted
    solarize-add                      floor(11 magnitude) is added to levels below 128
    colour, contrast, brightness,     other + f (view - other), where other is the grey view, its
    sharpness                         mean grey, black, or the smoothed view, and
                                      f = max(0.1, 1 +- 0.09 magnitude)

These are timm's "rand-m9-mstd0.5-inc1" without rotations, shears and shifts, which a crop replaces.

Random erasing replaces a rectangle of a normalised view by noise of mean 0 and standard deviation
1. The rectangle's area is a share 0.02 to 1/3 of the view. Its ratio of height to width is 0.3 to
1/0.3, uniform in the logarithm. Of ten attempts the first that fits is used.

Source: Cubuk et al. 2020, arXiv:1909.13719; for the same draws the colours equal those of timm
1.0.31 with Pillow 13.0 to the bit. Zhong et al. 2020, arXiv:1708.04896; the ranges of erasing are
those of timm 1.0.31 in its mode "pixel".
"""

# C channels, S side of a view

import math

import numpy as np

from pipeline.core.random import COLOUR, ERASE, ERASE_PIXELS
from pipeline.data.ffcv.loops import below, bits, compiled, unit

OPERATIONS = (
    *("autocontrast", "equalize", "invert", "posterize", "solarize", "solarize-add"),
    *("colour", "contrast", "brightness", "sharpness"),
)
BY_TABLE = 6  # the first 6 operations map the levels of a channel by a table
LAYERS, MOST, SPREAD = 2, 10.0, 0.5


_DRAWS = np.arange(COLOUR, COLOUR + 8 * LAYERS, dtype=np.uint64).reshape(LAYERS, 8)
_S48, _S63 = np.uint64(48), np.uint64(63)
_MANY = len(OPERATIONS)
# places in OPERATIONS
_AUTOCONTRAST, _EQUALIZE, _INVERT, _POSTERIZE, _SOLARIZE = range(5)
_COLOUR, _CONTRAST, _SHARPNESS = 6, 7, 9


@compiled
def luma(pixel_3):
    """Luma by ITU-R 601 in 16 bits; exact for grey."""
    return (
        np.int64(pixel_3[0]) * 19595
        + np.int64(pixel_3[1]) * 38470
        + np.int64(pixel_3[2]) * 7471
        + 32768
    ) >> 16


@compiled
def autocontrast(table, lowest, highest):
    scale = 255.0 / (highest - lowest)
    offset = -lowest * scale
    for i in range(256):
        table[i] = min(max(int(i * scale + offset), 0), 255)


@compiled
def equalize(table, counts, highest):
    step = (counts.sum() - counts[highest]) // 255
    passed = step // 2
    for i in range(256):
        if step > 0:
            table[i] = min(passed // step, 255)
            passed += counts[i]


@compiled
def spread_levels(table, channel_SS, operation):
    """Autocontrast and equalize, which depend on the levels of a channel."""
    counts = np.zeros(256, np.int64)
    for y in range(channel_SS.shape[0]):
        for x in range(channel_SS.shape[1]):
            counts[channel_SS[y, x]] += 1
    lowest, highest = 0, 255
    while counts[lowest] == 0:
        lowest += 1
    while counts[highest] == 0:
        highest -= 1
    if lowest < highest:
        if operation == _AUTOCONTRAST:
            autocontrast(table, lowest, highest)
        else:
            equalize(table, counts, highest)


@compiled
def fill_table(table, channel_SS, operation, level):
    """The new level for each level of a channel."""
    for i in range(256):
        table[i] = i
    if operation <= _EQUALIZE:
        spread_levels(table, channel_SS, operation)
    elif operation == _INVERT:
        for i in range(256):
            table[i] = 255 - i
    elif operation == _POSTERIZE:
        step = 1 << (8 - max(1, 4 - int(level / 10.0 * 4)))
        for i in range(256):
            table[i] = i // step * step
    elif operation == _SOLARIZE:
        for i in range(256 - min(256, int(level / 10.0 * 256)), 256):
            table[i] = 255 - i
    else:  # solarize-add
        for i in range(128):
            table[i] = min(255, i + min(128, int(level / 10.0 * 110)))


@compiled
def mean_luma(pixels_SS3):
    height, width = pixels_SS3.shape[0], pixels_SS3.shape[1]
    total = np.int64(0)
    for y in range(height):
        for x in range(width):
            total += luma(pixels_SS3[y, x])
    return int(total / (height * width) + 0.5)


@compiled
def smoothed(pixels_SS3, y, x, c):
    """Pillow's smoothing with a kernel of 1 and 5 over 13, rounded. The border is unchanged."""
    here = np.int64(pixels_SS3[y, x, c])
    if y == 0 or x == 0 or y == pixels_SS3.shape[0] - 1 or x == pixels_SS3.shape[1] - 1:
        return here
    around = 4 * here
    for row in range(y - 1, y + 2):
        for column in range(x - 1, x + 2):
            around += np.int64(pixels_SS3[row, column, c])
    return (2 * around + 13) // 26


@compiled
def blend(pixels_SS3, operation, factor):
    """Blend with another picture: factor 0 gives the other one, 1 this one. The result is
    truncated, in float32, as in Pillow.
    """
    before_SS3 = pixels_SS3.copy()
    grey = mean_luma(before_SS3) if operation == _CONTRAST else np.int64(0)
    for y in range(pixels_SS3.shape[0]):
        for x in range(pixels_SS3.shape[1]):
            if operation == _COLOUR:
                grey = luma(before_SS3[y, x])
            for c in range(3):
                here = np.int64(before_SS3[y, x, c])
                other = smoothed(before_SS3, y, x, c) if operation == _SHARPNESS else grey
                value = np.float32(other) + factor * np.float32(here - other)
                pixels_SS3[y, x, c] = np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@compiled
def apply(pixels_SS3, operation, level, sign):
    """Apply one operation in place. `sign`: of operations whose strength has two directions."""
    if operation >= BY_TABLE:
        blend(pixels_SS3, operation, np.float32(max(0.1, 1.0 + sign * (level / 10.0 * 0.9))))
        return
    tables = np.empty((3, 256), np.int64)
    for c in range(3):
        fill_table(tables[c], pixels_SS3[:, :, c], operation, level)
    for y in range(pixels_SS3.shape[0]):
        for x in range(pixels_SS3.shape[1]):
            for c in range(3):
                pixels_SS3[y, x, c] = tables[c, pixels_SS3[y, x, c]]


@compiled
def recolour(pixels_SS3, seed, epoch, index, strength, ratios, normals):
    """Apply the drawn operations to uint8 pixels in place. `strength`: (colour, erase). `normals`:
    quantiles of the normal distribution.
    """
    if strength[0] == 0:
        return
    for layer in range(LAYERS):
        if bits(seed, epoch, index, _DRAWS[layer, 0]) >> _S63 == 0:
            continue
        operation = below(bits(seed, epoch, index, _DRAWS[layer, 1]), _MANY)
        level = strength[0] + SPREAD * normals[bits(seed, epoch, index, _DRAWS[layer, 2]) >> _S48]
        sign = 1.0 if bits(seed, epoch, index, _DRAWS[layer, 3]) >> _S63 == 0 else -1.0
        apply(pixels_SS3, operation, min(max(level, 0.0), MOST), sign)


# ------------------------------------------------------------------------------------------ erasing

AREA, RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
_ATTEMPTS = 10
_ERASE_DRAWS = np.arange(ERASE + 8, ERASE + 8 + 4 * _ATTEMPTS, dtype=np.uint64).reshape(
    _ATTEMPTS, 4
)
_WHETHER, _PIXELS = np.uint64(ERASE), np.uint64(ERASE_PIXELS)
_FOUR, _S16, _S52 = np.uint64(4), np.uint64(16), np.uint64(52)


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
            (
                AREA[0]
                + (AREA[1] - AREA[0]) * unit(bits(seed, epoch, index, _ERASE_DRAWS[attempt, 0]))
            )
            * side
            * side
        )
        ratio = ratios[bits(seed, epoch, index, _ERASE_DRAWS[attempt, 1]) >> _S52]
        height = np.int64(math.floor(math.sqrt(area * ratio) + 0.5))
        width = np.int64(math.floor(math.sqrt(area / ratio) + 0.5))
        if height < side and width < side:
            top = below(bits(seed, epoch, index, _ERASE_DRAWS[attempt, 2]), side - height + 1)
            left = below(bits(seed, epoch, index, _ERASE_DRAWS[attempt, 3]), side - width + 1)
            fill(out_CSS[:, top : top + height, left : left + width], seed, epoch, index, normals)
            return
