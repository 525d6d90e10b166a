"""Decodes stored images [H,W,C] to normalised float32 [C,H,W] in one compiled loop:

    decode, crop, recolour, mirror, normalise, cut out, erase (strong_augment.py)

With `has_levels` the loop writes the levels, uint8, in place of their normalised values.

Each random number is a pure function of (seed, epoch, view number, sample, draw). A view is
therefore the same, bit for bit, in any thread, batch, rank and process. The loop is compiled
without fastmath. Ratios come from a table, because `exp` depends on the machine's libm.

FFCV's own decoders (1.0.2) ignore the status that `imdecode` returns. They use the generator of
each numba thread, which cannot be seeded from outside.
"""

# B batch, S output side, C output channels, h w of a stored image

import math
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.core.random import CROP, normal_table
from pipeline.data.ffcv import strong_augment
from pipeline.data.ffcv.bicubic import resize_bicubic
from pipeline.data.ffcv.codec import decode_jpg, resize_area
from pipeline.data.ffcv.format import JPG, Images
from pipeline.data.ffcv.loops import (
    Decoder,
    below,
    bits,
    compiled,
    draw_mirror,
    draw_shift,
    uniform,
)

# Kinds of crops: a random resized crop; the resized central square; a window of the output's size,
# not resized.
RESIZED, CENTRE, WINDOW = 0, 1, 2
_ATTEMPTS = 10
# The draws of a crop as a table, because arithmetic on a loop counter would turn uint64 into
# float64.
_DRAWS = np.arange(CROP, CROP + 4 * _ATTEMPTS, dtype=np.uint64).reshape(_ATTEMPTS, 4)
_S32, _S52 = np.uint64(32), np.uint64(52)


class DecodeImages(Decoder):
    """Decodes images to [B,C,S,S]. The status is that of the JPEG decoder.

    Args:
        kind: RESIZED, CENTRE or WINDOW.
        reach: the maximum shift of a window in pixels.
        area: for RESIZED, the range of the crop's share of the image's area; for CENTRE, the first
            value is the crop's share of the shorter side.
        ratio: the range of the crop's width / height, for RESIZED.
        colour, cutout, erase, resize: as in `Beton`.
        strong: compile the functions of `colour` and `erase`. If training needs them, evaluation
            needs them too, because it uses the same loop with `colour` and `erase` at 0.
        has_levels: see `pipeline.data.base.Batch`.
    """

    def __init__(
        self,
        *,
        kind: int,
        size: int,
        channels: int,
        reach: int = 0,
        flip: bool = False,
        area: tuple[float, float] = (1.0, 1.0),
        ratio: tuple[float, float] = (1.0, 1.0),
        colour: float = 0.0,
        cutout: int = 0,
        erase: float = 0.0,
        strong: bool = False,
        resize: Literal["area", "bicubic"] = "area",
        mean: tuple[float, ...],
        std: tuple[float, ...],
        has_levels: bool = False,
        parallel: bool,
    ) -> None:
        assert (strong or colour == erase == 0) and not (has_levels and (cutout or erase))
        table = level_table(mean, std)
        levels = np.tile(np.arange(256, dtype=np.uint8), (channels, 1))
        super().__init__(
            name=Images.name,
            what="the JPEG",
            shape=(channels, size, size),
            decode_sample=image_decoder(strong, resize),
            parameters=(
                # Arrays, because numba would compile the loop again for each type of a number.
                np.array([kind, reach, int(flip), cutout], np.int64),
                np.array(area, np.float64),
                ratio_table(ratio),
                levels if has_levels else table,
                np.array([colour, erase], np.float64),
                ratio_table(strong_augment.RATIO),
                normal_table(),
            ),
            table=table if has_levels else None,
            parallel=parallel,
        )


def ratio_table(ratio: tuple[float, float]) -> NDArray[np.float64]:
    """4096 aspect ratios (width / height), evenly spaced in their logarithm.

    They are rounded, because machines' libm may differ in the last digit.
    """
    low, high = (math.log(each) for each in ratio)
    return np.array(
        [round(math.exp(low + (high - low) * (i + 0.5) / 4096), 6) for i in range(4096)]
    )


def level_table(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """The normalised value of each channel's 256 levels: [C,256]."""
    mean_C1, std_C1 = np.array(mean)[:, None], np.array(std)[:, None]
    return ((np.arange(256) / 255.0 - mean_C1) / std_C1).astype(np.float32)


@compiled
def crop_box(h, w, seed, epoch, index, area, ratios):
    """Draw a random resized crop of an image: (top, left, height, width)."""
    for attempt in range(_ATTEMPTS):
        share = uniform(bits(seed, epoch, index, _DRAWS[attempt, 0]))
        pixels = np.float64(h * w) * (area[0] + (area[1] - area[0]) * share)
        ratio = ratios[bits(seed, epoch, index, _DRAWS[attempt, 1]) >> _S52]
        width = np.int64(math.floor(math.sqrt(pixels * ratio) + 0.5))
        height = np.int64(math.floor(math.sqrt(pixels / ratio) + 0.5))
        if 0 < width <= w and 0 < height <= h:
            top = below(bits(seed, epoch, index, _DRAWS[attempt, 2]), h - height + 1)
            left = below(bits(seed, epoch, index, _DRAWS[attempt, 3]), w - width + 1)
            return top, left, height, width
    # All attempts failed, which is rare: use the largest central crop whose ratio is within
    # bounds, as in torchvision's RandomResizedCrop.
    width, height = w, h
    if w < ratios[0] * h:
        height = max(1, np.int64(math.floor(w / ratios[0] + 0.5)))
    elif w > ratios[-1] * h:
        width = max(1, np.int64(math.floor(h * ratios[-1] + 0.5)))
    return (h - height) // 2, (w - width) // 2, height, width


@compiled
def crop_window(pixels_hw3, top, left, side):
    """A copy of the window at (top, left). Pixels outside the image are black."""
    out_SS3 = np.zeros((side, side, 3), np.uint8)
    for y in range(max(0, -top), min(side, pixels_hw3.shape[0] - top)):
        for x in range(max(0, -left), min(side, pixels_hw3.shape[1] - left)):
            for c in range(3):
                out_SS3[y, x, c] = pixels_hw3[top + y, left + x, c]
    return out_SS3


@compiled
def crop_image(pixels_hw3, resize, side, options, area, ratios, seed, epoch, index):
    """Crop an image. A crop that is not a window is resized to `side` pixels a side by `resize`."""
    kind, reach = options[0], options[1]
    h, w = pixels_hw3.shape[0], pixels_hw3.shape[1]
    if kind == WINDOW:
        down, right = draw_shift(reach, seed, epoch, index)
        return crop_window(pixels_hw3, (h - side) // 2 + down, (w - side) // 2 + right, side)
    if kind == RESIZED:
        top, left, height, width = crop_box(h, w, seed, epoch, index, area, ratios)
    else:
        height = max(1, np.int64(area[0] * min(h, w)))
        top, left, width = (h - height) // 2, (w - height) // 2, height
    out_SS3 = np.empty((side, side, 3), np.uint8)
    resize(pixels_hw3, top, top + height, left, left + width, out_SS3)
    return out_SS3


@compiled
def write_normalised(out_CSS, pixels_SS3, is_mirrored, table):
    """Mirror the pixels of a view into `out_CSS`, and look each level up in `table` [C,256]."""
    channels, side = out_CSS.shape[0], out_CSS.shape[1]
    for y in range(side):
        for x in range(side):
            pixel_3 = pixels_SS3[y, side - 1 - x if is_mirrored else x]
            for c in range(channels):
                level = np.int64(pixel_3[c]) if channels == 3 else strong_augment.luma(pixel_3)
                out_CSS[c, y, x] = table[c, level]


@compiled
def no_augmentation(_, seed, epoch, index, strength, ratios, normals):
    """Takes the place of `recolour` and `erase` if they are not compiled."""


@cache
def image_decoder(strong: bool, resize: Literal["area", "bicubic"]) -> Any:
    """The compiled function that decodes one sample of a batch to its view.

    Without strong augmentation the function compiles in half the time.
    """
    resize_crop = resize_bicubic if resize == "bicubic" else resize_area
    recolour = strong_augment.recolour if strong else no_augmentation
    erase = strong_augment.erase if strong else no_augmentation

    @compiled
    def decode_image(b, indices_B, out_BCSS, keys_B2, status_B1, records, storage, parameters):
        options, area, ratios, table, strengths, erase_ratios, normals = parameters
        file, addresses, sizes = storage
        # The row encodes the sample and the view number (reader.py).
        samples, row = np.uint64(len(records)), np.uint64(indices_B[b])
        view_number, index = row // samples, row % samples
        seed, epoch = keys_B2[b, 0], keys_B2[b, 1] + (view_number << _S32)
        record = records[index]
        address = record["data_ptr"]
        stored = file[address : address + sizes[np.searchsorted(addresses, address)]]
        h, w = np.int64(record["height"]), np.int64(record["width"])
        status_B1[b, 0] = 0
        if record["mode"] == JPG:
            # Allocated here, because FFCV's memory would hold an image of the largest size for
            # each sample that is read ahead.
            pixels_hw3 = np.empty((h, w, 3), np.uint8)
            status_B1[b, 0] = decode_jpg(stored, pixels_hw3)
        else:
            pixels_hw3 = stored.reshape((h, w, 3)).copy()
        if status_B1[b, 0] == 0:
            side = out_BCSS.shape[2]
            view_SS3 = crop_image(
                pixels_hw3, resize_crop, side, options, area, ratios, seed, epoch, index
            )
            recolour(view_SS3, seed, epoch, index, strengths[0], erase_ratios, normals)
            is_mirrored = draw_mirror(options[2], seed, epoch, index)
            write_normalised(out_BCSS[b], view_SS3, is_mirrored, table)
            strong_augment.cut_out(out_BCSS[b], seed, epoch, index, options[3])
            erase(out_BCSS[b], seed, epoch, index, strengths[1], erase_ratios, normals)

    return decode_image
