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
from typing import Literal

import numpy as np
from numba import prange
from numpy.typing import NDArray

from pipeline.core.random import CROP, normal_table
from pipeline.core.saved_loops import compiled
from pipeline.data.ffcv import strong_augment
from pipeline.data.ffcv.bicubic import resize_bicubic
from pipeline.data.ffcv.codec import HAS_FFCV, decode_jpg, resize_area
from pipeline.data.ffcv.format import JPG, Images
from pipeline.data.ffcv.loops import (
    Decoder,
    batch_loop,
    below,
    bits,
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
        strong: the loop has `colour` and `erase`. If training needs them, evaluation needs them
            too, because it uses the same loop with both at 0.
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
        is_bicubic = resize == "bicubic" and kind != WINDOW  # a window is not resized
        table = level_table(mean, std)
        levels = np.tile(np.arange(256, dtype=np.uint8), (channels, 1))
        super().__init__(
            name=Images.name,
            what="the JPEG",
            shape=(channels, size, size),
            decode_batch=LOOPS[strong or is_bicubic, parallel],
            parameters=(
                # Arrays, because numba would compile the loop again for each type of a number.
                np.array([kind, reach, flip, cutout, is_bicubic], np.int64),
                np.array(area, np.float64),
                ratio_table(ratio),
                levels if has_levels else table,
                np.array([colour, erase], np.float64),
                ratio_table(strong_augment.RATIO),
                normal_table(),
            ),
            table=table if has_levels else None,
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
def draw_crop(h, w, side, options, area, ratios, seed, epoch, index):
    """The crop of an image: (top, left, height, width). A window may reach beyond the image."""
    kind, reach = options[0], options[1]
    if kind == WINDOW:
        down, right = draw_shift(reach, seed, epoch, index)
        return (h - side) // 2 + down, (w - side) // 2 + right, side, side
    if kind == RESIZED:
        return crop_box(h, w, seed, epoch, index, area, ratios)
    size = max(1, np.int64(area[0] * min(h, w)))
    return (h - size) // 2, (w - size) // 2, size, size


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
def open_image(b, indices_B, side, keys_B2, status_B1, records, storage, parameters):
    """Decode sample b of the batch.

    Returns its pixels [h,w,3], its crop as from `draw_crop`, and (seed, epoch, sample) of its
    random numbers. `status_B1[b]` is not 0 if it cannot be decoded.
    """
    options, area, ratios = parameters[0], parameters[1], parameters[2]
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
        # Allocated here, because FFCV's memory would hold an image of the largest size for each
        # sample that is read ahead.
        pixels_hw3 = np.empty((h, w, 3), np.uint8)
        status_B1[b, 0] = decode_jpg(stored, pixels_hw3)
    else:
        pixels_hw3 = stored.reshape((h, w, 3)).copy()
    crop = draw_crop(h, w, side, options, area, ratios, seed, epoch, index)
    return pixels_hw3, crop, (seed, epoch, index)


@compiled
def write_view(out_CSS, view_SS3, seed, epoch, index, parameters):
    """Mirror, normalise and cut out."""
    options, table = parameters[0], parameters[3]
    is_mirrored = draw_mirror(options[2], seed, epoch, index)
    write_normalised(out_CSS, view_SS3, is_mirrored, table)
    strong_augment.cut_out(out_CSS, seed, epoch, index, options[3])


@compiled
def area_view(pixels_hw3, crop, side, options):
    """The crop as a view [S,S,3]. One that is no window is resized by areas."""
    top, left, height, width = crop
    if options[0] == WINDOW:
        return crop_window(pixels_hw3, top, left, side)
    view_SS3 = np.empty((side, side, 3), np.uint8)
    resize_area(pixels_hw3, top, top + height, left, left + width, view_SS3)
    return view_SS3


@compiled
def bicubic_view(pixels_hw3, crop, side):
    """The crop as a view [S,S,3], resized bicubically."""
    top, left, height, width = crop
    view_SS3 = np.empty((side, side, 3), np.uint8)
    resize_bicubic(pixels_hw3, top, top + height, left, left + width, view_SS3)
    return view_SS3


@compiled
def decode_image(b, indices_B, out_BCSS, keys_B2, status_B1, records, storage, parameters):
    """Decode sample b of the batch to its view `out_BCSS[b]`."""
    options, side = parameters[0], out_BCSS.shape[2]
    pixels_hw3, crop, (seed, epoch, index) = open_image(
        b, indices_B, side, keys_B2, status_B1, records, storage, parameters
    )
    if status_B1[b, 0] == 0:
        view_SS3 = area_view(pixels_hw3, crop, side, options)
        write_view(out_BCSS[b], view_SS3, seed, epoch, index, parameters)


@compiled
def decode_any_image(b, indices_B, out_BCSS, keys_B2, status_B1, records, storage, parameters):
    """`decode_image` with bicubic resizing, recolouring and erasing, which compile for longer."""
    options, side = parameters[0], out_BCSS.shape[2]
    strengths, ratios, normals = parameters[4], parameters[5], parameters[6]
    pixels_hw3, crop, (seed, epoch, index) = open_image(
        b, indices_B, side, keys_B2, status_B1, records, storage, parameters
    )
    if status_B1[b, 0] == 0:
        if options[4]:
            view_SS3 = bicubic_view(pixels_hw3, crop, side)
        else:
            view_SS3 = area_view(pixels_hw3, crop, side, options)
        strong_augment.recolour(view_SS3, seed, epoch, index, strengths[0], normals)
        write_view(out_BCSS[b], view_SS3, seed, epoch, index, parameters)
        strong_augment.erase(out_BCSS[b], seed, epoch, index, strengths[1], ratios, normals)


def decode_images(indices_B, out_BCSS, keys_B2, status_B1, records, storage, parameters):
    for b in prange(len(indices_B)):
        decode_image(b, indices_B, out_BCSS, keys_B2, status_B1, records, storage, parameters)


def decode_any_images(indices_B, out_BCSS, keys_B2, status_B1, records, storage, parameters):
    for b in prange(len(indices_B)):
        decode_any_image(b, indices_B, out_BCSS, keys_B2, status_B1, records, storage, parameters)


LOOPS = {
    (has_all, parallel): batch_loop(loop, parallel=parallel, saved=HAS_FFCV)
    for has_all, loop in ((False, decode_images), (True, decode_any_images))
    for parallel in (False, True)
}
