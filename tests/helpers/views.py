"""Views of stored images in plain Python, and those that a loader gives."""

import math

import cv2
import numpy as np

from pipeline.core.random import CROP, bits
from pipeline.data.ffcv.augment import level_table

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def crop_by_hand(h, w, seed, epoch, index, area=AREA, ratio=RATIO):
    """(top, left, height, width) as the docstrings have it, in Python's own numbers."""
    for attempt in range(10):
        draw = [int(bits(seed, epoch, index, CROP + 4 * attempt + i)) for i in range(4)]
        pixels = h * w * (area[0] + (area[1] - area[0]) * ((draw[0] >> 11) * 2.0**-53))
        aspect = round(
            math.exp(
                math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * ((draw[1] >> 52) + 0.5) / 4096
            ),
            6,
        )
        width, height = (
            math.floor(math.sqrt(pixels * aspect) + 0.5),
            math.floor(math.sqrt(pixels / aspect) + 0.5),
        )
        if 0 < width <= w and 0 < height <= h:
            return (
                (draw[2] >> 32) * (h - height + 1) >> 32,
                (draw[3] >> 32) * (w - width + 1) >> 32,
                height,
                width,
            )
    height = max(1, math.floor(w / ratio[0] + 0.5)) if w < ratio[0] * h else h
    width = max(1, math.floor(h * ratio[1] + 0.5)) if w > ratio[1] * h else w
    return (h - height) // 2, (w - width) // 2, height, width


def epoch_of(data, name, epoch=0):
    sizes = {"micro_batch": 8, "threads": 1}
    loader = data.val(**sizes) if name == "val" else data.train(seed=21, batch_size=8, **sizes)
    with loader.epoch(epoch) as batches:
        return [
            (int(i), x.numpy())
            for batch in batches
            for i, x in zip(batch.index, batch.x, strict=True)
        ]


def normalised(pixels_hw3):
    table = level_table(MEAN, STD)
    return np.stack([table[c][pixels_hw3[..., c]] for c in range(3)])


def resized(pixels, box, size):
    """OpenCV's function, which FFCV's library calls."""
    top, left, height, width = box
    crop = np.ascontiguousarray(pixels[top : top + height, left : left + width])
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
