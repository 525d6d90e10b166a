"""Bicubic resizing, compiled: the crop is antialiased where it shrinks, in fixed point.

The levels equal those of Pillow's `picture.crop(box).resize(size, BICUBIC)`, which torchvision and
timm use, to the bit. Only Pillow 13.0 differs, for crops that it makes wider and less high: it
resizes their columns first, earlier versions always the rows.

Source: Keys 1981, doi:10.1109/TASSP.1981.1163711, with a = -1/2; the fixed point is that of
Pillow's `Resample.c`.
"""

# h w of a crop, n its side in one direction, S output side, K weights of an output pixel

import math

import numpy as np

from pipeline.core.saved_loops import compiled

_BITS = 22  # after the point of a weight


@compiled
def keys_kernel(x):
    x = abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return near if x < 1 else far if x < 2 else 0.0


@compiled
def bicubic_weights(n, side):
    """The first input pixel of each output pixel, [S], and the weights from there on, [S,K]."""
    scale = n / side
    widening = max(scale, 1.0)
    support = 2 * widening
    first_S = np.zeros(side, np.int64)
    weights_SK = np.zeros((side, 2 * np.int64(math.ceil(support)) + 1))
    for i in range(side):
        centre = (i + 0.5) * scale
        first_S[i] = max(0, int(centre - support + 0.5))
        for k in range(min(n, int(centre + support + 0.5)) - first_S[i]):
            weights_SK[i, k] = keys_kernel((k + first_S[i] - centre + 0.5) * (1.0 / widening))
        weights_SK[i] /= weights_SK[i].sum()
    return first_S, np.rint(weights_SK * (1 << _BITS)).astype(np.int64)


@compiled
def resize_rows(pixels_hn3, out_hS3):
    """Resize along the second axis."""
    n, side = pixels_hn3.shape[1], out_hS3.shape[1]
    first_S, weights_SK = bicubic_weights(n, side)
    for y in range(len(out_hS3)):
        for i in range(side):
            for c in range(3):
                level = np.int64(1 << (_BITS - 1))
                for k in range(min(weights_SK.shape[1], n - first_S[i])):
                    level += weights_SK[i, k] * np.int64(pixels_hn3[y, first_S[i] + k, c])
                out_hS3[y, i, c] = min(max(level >> _BITS, 0), 255)


@compiled
def resize_bicubic(pixels_hw3, top, bottom, left, right, out_SS3):
    """Resize a crop of an image to `out_SS3`: its rows first, then its columns."""
    rows_hS3 = np.empty((bottom - top, out_SS3.shape[1], 3), np.uint8)
    resize_rows(pixels_hw3[top:bottom, left:right], rows_hS3)
    resize_rows(rows_hS3.transpose(1, 0, 2), out_SS3.transpose(1, 0, 2))
