"""Strong augmentation, compiled: RandAugment's colour operations, cutout, and random erasing.

Two of ten colour operations are drawn for each view, independently. Each is applied with
probability 1/2 and with its own magnitude, which is normally distributed with mean `colour` and
standard deviation 1/2, and clipped to 0..10.

    autocontrast, equalize, invert    do not depend on the magnitude
    posterize                         4 - floor(4 magnitude / 10) bits remain, at least one (at 10,
                                      timm asks Pillow for none, which Pillow refuses)
    solarize                          levels from 256 - floor(25.6 magnitude) on are inverted
    solarize-add                      floor(11 magnitude) is added to levels below 128
    colour, contrast, brightness,     other + f (view - other), where other is the grey view, its
    sharpness                         mean grey, black, or the smoothed view, in this order, and
                                      f = max(0.1, 1 +- 0.09 magnitude)

These are timm's "rand-m9-mstd0.5-inc1" without rotations, shears and shifts. A random crop takes
their place.

Cutout sets a square of a normalised view to 0, the mean. Its centre is uniform over the view, and
what lies outside the view is clipped.

Random erasing replaces a rectangle of a normalised view by noise of mean 0 and standard deviation
1. The rectangle's area is a share 0.02 to 1/3 of the view. Its ratio of height to width is 0.3 to
1/0.3, uniform in the logarithm. The first of ten attempts that fits is used. If none fits, nothing
is erased.

Source: Cubuk et al. 2020, arXiv:1909.13719 (RandAugment); for the same draws the colours equal
those of timm 1.0.31 with Pillow 13.0 to the bit. DeVries, Taylor 2017, arXiv:1708.04552 (cutout).
Zhong et al. 2020, arXiv:1708.04896 (random erasing); the ranges are those of timm 1.0.31 in its
mode "pixel".
"""

# C channels, S side of a view

import math

import numpy as np

from pipeline.core.random import COLOUR, CUTOUT_X, CUTOUT_Y, ERASE, ERASE_PIXELS
from pipeline.core.saved_loops import compiled
from pipeline.data.ffcv.loops import below, bits, uniform

OPERATIONS = (
    *("autocontrast", "equalize", "invert", "posterize", "solarize", "solarize-add"),
    *("colour", "contrast", "brightness", "sharpness"),
)
TABLE_OPERATIONS = 6  # the first 6 operations map the levels of a channel by a table
LAYERS, MAX_MAGNITUDE, MAGNITUDE_STD = 2, 10.0, 0.5
AREA, RATIO, ATTEMPTS = (0.02, 1 / 3), (0.3, 1 / 0.3), 10  # of erasing

# indices of OPERATIONS
_AUTOCONTRAST, _EQUALIZE, _INVERT, _POSTERIZE, _SOLARIZE, _SOLARIZE_ADD = range(TABLE_OPERATIONS)
_COLOUR, _CONTRAST, _SHARPNESS, _OPERATION_COUNT = 6, 7, 9, len(OPERATIONS)
# The draws are tables, because arithmetic on a loop counter would turn uint64 into float64.
_DRAWS = np.arange(COLOUR, COLOUR + 8 * LAYERS, dtype=np.uint64).reshape(LAYERS, 8)
_ERASE_DRAWS = np.arange(ERASE + 8, ERASE + 8 + 4 * ATTEMPTS, dtype=np.uint64).reshape(ATTEMPTS, 4)
_IS_ERASED, _NOISE, _ONE, _FOUR = map(np.uint64, (ERASE, ERASE_PIXELS, 1, 4))
_CUTOUT_Y, _CUTOUT_X = np.uint64(CUTOUT_Y), np.uint64(CUTOUT_X)
_S16, _S48, _S52, _S63 = map(np.uint64, (16, 48, 52, 63))


@compiled
def luma(pixel_3):
    """Luma by ITU-R 601, from weights of 16 bits. A grey pixel keeps its level."""
    red, green, blue = np.int64(pixel_3[0]), np.int64(pixel_3[1]), np.int64(pixel_3[2])
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


@compiled
def fill_table(table, channel_SS, operation, magnitude):
    """Set `table[i]` to the new level of the pixels with level i in a channel."""
    counts, lowest, highest = np.zeros(256, np.int64), 255, 0
    if operation <= _EQUALIZE:
        for row_S in channel_SS:
            for value in row_S:
                counts[value] += 1
                lowest, highest = min(lowest, value), max(highest, value)
    scale = 255.0 / (highest - lowest)  # of autocontrast
    step = (channel_SS.size - counts[highest]) // 255  # pixels per level, of equalize
    cumulated = step // 2  # of equalize
    level_step = 1 << (8 - max(1, 4 - int(magnitude / 10.0 * 4)))  # of posterize
    threshold = 256 - min(256, int(magnitude / 10.0 * 256))  # of solarize
    addend = min(128, int(magnitude / 10.0 * 110))  # of solarize-add
    for i in range(256):
        new = i
        if operation == _AUTOCONTRAST and lowest < highest:
            new = int(i * scale - lowest * scale)
        elif operation == _EQUALIZE and lowest < highest and step > 0:
            new = cumulated // step
            cumulated += counts[i]
        elif operation == _INVERT or (operation == _SOLARIZE and i >= threshold):
            new = 255 - i
        elif operation == _POSTERIZE:
            new = i // level_step * level_step
        elif operation == _SOLARIZE_ADD and i < 128:
            new = i + addend
        table[i] = min(max(new, 0), 255)


@compiled
def smooth_level(pixels_SS3, y, x, c):
    """The level of one channel of a pixel after Pillow's smoothing, rounded.

    The kernel of 3 x 3 weights is 5/13 in the middle and 1/13 elsewhere. The border is unchanged.
    """
    level = np.int64(pixels_SS3[y, x, c])
    if y == 0 or x == 0 or y == pixels_SS3.shape[0] - 1 or x == pixels_SS3.shape[1] - 1:
        return level
    weighted_sum = 4 * level
    for row in range(y - 1, y + 2):
        for column in range(x - 1, x + 2):
            weighted_sum += np.int64(pixels_SS3[row, column, c])
    return (2 * weighted_sum + 13) // 26


@compiled
def blend(pixels_SS3, operation, factor):
    """Blend a view in place with the other view of the operation: other + factor (view - other).

    The result is computed in float32 and truncated, as in Pillow.
    """
    before_SS3, grey = pixels_SS3.copy(), np.int64(0)  # the other view of "brightness" is black
    height, width = pixels_SS3.shape[:2]
    if operation == _CONTRAST:
        for row_S3 in before_SS3:
            for pixel_3 in row_S3:
                grey += luma(pixel_3)
        grey = int(grey / (height * width) + 0.5)
    for y in range(height):
        for x in range(width):
            if operation == _COLOUR:
                grey = luma(before_SS3[y, x])
            for c in range(3):
                level = np.int64(before_SS3[y, x, c])
                other = smooth_level(before_SS3, y, x, c) if operation == _SHARPNESS else grey
                value = np.float32(other) + factor * np.float32(level - other)
                pixels_SS3[y, x, c] = np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@compiled
def apply_operation(pixels_SS3, operation, magnitude, sign):
    """Apply one operation in place. Only the last four operations use `sign` (1 or -1)."""
    if operation >= TABLE_OPERATIONS:
        blend(pixels_SS3, operation, np.float32(max(0.1, 1.0 + sign * (magnitude / 10.0 * 0.9))))
        return
    tables = np.empty((3, 256), np.int64)
    for c in range(3):
        fill_table(tables[c], pixels_SS3[:, :, c], operation, magnitude)
    for row_S3 in pixels_SS3:
        for pixel_3 in row_S3:
            for c in range(3):
                pixel_3[c] = tables[c, pixel_3[c]]


@compiled
def recolour(pixels_SS3, seed, epoch, index, colour, normals):
    """Apply the drawn operations to uint8 pixels in place; none if `colour` is 0.

    `normals`: quantiles of the normal distribution.
    """
    for layer in range(LAYERS if colour > 0 else 0):
        if bits(seed, epoch, index, _DRAWS[layer, 0]) >> _S63 == 1:  # with probability 1/2
            operation = below(bits(seed, epoch, index, _DRAWS[layer, 1]), _OPERATION_COUNT)
            normal = normals[bits(seed, epoch, index, _DRAWS[layer, 2]) >> _S48]
            magnitude = min(max(colour + MAGNITUDE_STD * normal, 0.0), MAX_MAGNITUDE)
            sign = 1.0 if bits(seed, epoch, index, _DRAWS[layer, 3]) >> _S63 == 0 else -1.0
            apply_operation(pixels_SS3, operation, magnitude, sign)


@compiled
def cut_out(out_CSS, seed, epoch, index, length):
    """Set a square of `length` pixels a side to 0 in place. With `length` 0, nothing changes."""
    side = out_CSS.shape[1]
    top = below(bits(seed, epoch, index, _CUTOUT_Y), side) - length // 2
    left = below(bits(seed, epoch, index, _CUTOUT_X), side) - length // 2
    out_CSS[:, max(0, top) : max(0, top + length), max(0, left) : max(0, left + length)] = 0


@compiled
def fill_with_noise(out_Chw, seed, epoch, index, normals):
    """Fill a rectangle with noise. A draw of 64 bits gives four values."""
    position, random_bits = np.uint64(0), np.uint64(0)
    for rows_hw in out_Chw:
        for row_w in rows_hw:
            for x in range(len(row_w)):
                if position % _FOUR == 0:
                    random_bits = bits(seed, epoch, index, _NOISE + position // _FOUR)
                row_w[x] = normals[random_bits >> _S48]
                random_bits, position = random_bits << _S16, position + _ONE


@compiled
def erase(out_CSS, seed, epoch, index, probability, ratios, normals):
    """With the given probability, erase a random rectangle of a view in place.

    `ratios`: a table over the range RATIO. `normals`: quantiles of the normal distribution.
    """
    if uniform(bits(seed, epoch, index, _IS_ERASED)) >= probability:
        return
    side = out_CSS.shape[1]
    for attempt in range(ATTEMPTS):
        share = uniform(bits(seed, epoch, index, _ERASE_DRAWS[attempt, 0]))
        area = (AREA[0] + (AREA[1] - AREA[0]) * share) * side * side
        ratio = ratios[bits(seed, epoch, index, _ERASE_DRAWS[attempt, 1]) >> _S52]
        height = np.int64(math.floor(math.sqrt(area * ratio) + 0.5))
        width = np.int64(math.floor(math.sqrt(area / ratio) + 0.5))
        if height < side and width < side:
            top = below(bits(seed, epoch, index, _ERASE_DRAWS[attempt, 2]), side - height + 1)
            left = below(bits(seed, epoch, index, _ERASE_DRAWS[attempt, 3]), side - width + 1)
            fill_with_noise(
                out_CSS[:, top : top + height, left : left + width], seed, epoch, index, normals
            )
            return
