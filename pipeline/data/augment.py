"""From a stored image to a normalised float32 one, [H,W,C] to [C,H,W], in one compiled loop:

    decode, crop, recolour (colour.py), mirror, normalise, erase (erase.py)

Each random number is a pure function of (seed, epoch, copy, sample, draw), so a view comes out the same, bit for bit, in any
thread, batch, rank and process. Compiled without fastmath; ratios come from a table, because `exp` depends on the machine's libm.

FFCV's own decoders (1.0.2) draw from numba's generator of each thread, which no seed reaches, and ignore what `imdecode` returns.
"""

# B batch, S side of the output, C channels of the output, h w of a stored image

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from pipeline.data import colour as colours
from pipeline.data import erase as erasing
from pipeline.data.decoder import Decoder
from pipeline.data.ffcv_api import imdecode, resize_crop
from pipeline.data.format import JPG, Images
from pipeline.random import CROP, FLIP, SHIFT_X, SHIFT_Y, compiled_bits, normal_table

RESIZED, CENTRE, WINDOW = 0, 1, 2  # random resized crop; central square, resized; window of the output's size, never resized


class Decode(Decoder):
    """From the images of a file to float32 [B,C,S,S]. Its status is what the JPEG decoder returned.

    `strong`: compiled with what `colour` and `erase` need. Evaluation shares the loop of its training, and both are 0 there.
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
        erase: float = 0.0,
        strong: bool = False,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        parallel: bool,
    ) -> None:
        super().__init__(name=Images.name, what="the JPEG", shape=(channels, size, size))
        self.parallel = parallel
        self._options = np.array([kind, reach, int(flip)], np.int64)
        self._area, self._ratios, self._lookup = np.array(area, np.float64), ratio_table(ratio), lookup(mean, std)
        assert strong or colour == erase == 0
        self._strength, self._strong = np.array([colour, erase], np.float64), strong

    def generate_code(self) -> Any:
        batch = compiled(self.parallel, self._strong)
        options, area, ratios, table = self._options, self._area, self._ratios, self._lookup
        tables = (self._strength, ratio_table(erasing.RATIO), normal_table())

        # Options travel in arrays: numba would compile the loop anew for each kind of number.
        def decode(indices_B, memory, records, storage):
            out_BCSS, keys_B2, status_B1 = memory
            batch(indices_B, out_BCSS, keys_B2, status_B1, records, storage, options, area, ratios, table, tables)
            return out_BCSS

        return decode


def ratio_table(ratio: tuple[float, float]) -> NDArray[np.float64]:
    """4096 aspect ratios (width / height), evenly spaced in their logarithm, rounded so that libm does not matter."""
    low, high = (math.log(each) for each in ratio)
    return np.array([round(math.exp(low + (high - low) * (i + 0.5) / 4096), 6) for i in range(4096)])


def lookup(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """The normalised value of each channel's 256 levels: [C,256]."""
    levels = np.arange(256) / 255.0
    return ((levels - np.array(mean)[:, None]) / np.array(std)[:, None]).astype(np.float32)


@cache
def functions() -> SimpleNamespace:
    """The compiled parts. `crop_box(h, w, seed, epoch, index, area, ratios)` is (top, left, height, width)."""
    compiled_here = njit(nogil=True, fastmath=False, error_model="numpy")
    bits = compiled_bits(compiled_here)
    s32, s11, s52 = np.uint64(32), np.uint64(11), np.uint64(52)
    # Draws of a crop as a table of uint64: arithmetic on a loop's counter would turn it into int64 and then float64.
    draws = np.arange(CROP, CROP + 40, dtype=np.uint64).reshape(10, 4)

    @compiled_here
    def below(random_bits, n):
        return np.int64(((random_bits >> s32) * np.uint64(n)) >> s32)

    @compiled_here
    def crop_box(h, w, seed, epoch, index, area, ratios):
        for attempt in range(10):
            unit = np.float64(bits(seed, epoch, index, draws[attempt, 0]) >> s11) * 2.0**-53
            pixels = np.float64(h * w) * (area[0] + (area[1] - area[0]) * unit)
            ratio = ratios[bits(seed, epoch, index, draws[attempt, 1]) >> s52]
            width = np.int64(math.floor(math.sqrt(pixels * ratio) + 0.5))
            height = np.int64(math.floor(math.sqrt(pixels / ratio) + 0.5))
            if 0 < width <= w and 0 < height <= h:
                top = below(bits(seed, epoch, index, draws[attempt, 2]), h - height + 1)
                left = below(bits(seed, epoch, index, draws[attempt, 3]), w - width + 1)
                return top, left, height, width
        # Rarely: the largest central crop whose ratio is within bounds, as torchvision's RandomResizedCrop has it.
        width, height = w, h
        if w < ratios[0] * h:
            height = max(1, np.int64(math.floor(w / ratios[0] + 0.5)))
        elif w > ratios[-1] * h:
            width = max(1, np.int64(math.floor(h * ratios[-1] + 0.5)))
        return (h - height) // 2, (w - width) // 2, height, width

    @compiled_here
    def put(out_CSS, pixels_hw3, top, left, mirrored, table):
        """Normalise the window at (top, left), which may reach beyond the image: what lies outside is black."""
        channels, side = out_CSS.shape[0], out_CSS.shape[1]
        h, w = pixels_hw3.shape[0], pixels_hw3.shape[1]
        for y in range(side):
            row = top + y
            for x in range(side):
                column = left + (side - 1 - x if mirrored else x)
                inside = 0 <= row < h and 0 <= column < w
                if channels == 3:
                    for c in range(3):
                        out_CSS[c, y, x] = table[c, pixels_hw3[row, column, c] if inside else 0]
                else:  # luma by ITU-R 601 in 16 bits, exact for grey
                    level = np.int64(0)
                    if inside:
                        red, green, blue = pixels_hw3[row, column, 0], pixels_hw3[row, column, 1], pixels_hw3[row, column, 2]
                        level = (np.int64(red) * 19595 + np.int64(green) * 38470 + np.int64(blue) * 7471 + 32768) >> 16
                    out_CSS[0, y, x] = table[0, level]

    return SimpleNamespace(bits=bits, below=below, crop_box=crop_box, put=put)


@cache
def sampler(strong: bool) -> Any:
    """From one sample's place to its view. Without strong augmentation there is half as much to compile: 3 s instead of 7."""
    compiled_here = njit(nogil=True, fastmath=False, error_model="numpy")
    shared = functions()
    bits, below, crop_box, put = shared.bits, shared.below, shared.crop_box, shared.put
    resize: Any = njit(nogil=True)(resize_crop)
    decode_jpg: Any = njit(nogil=True)(imdecode)
    jpg = JPG
    s32, draw_flip, draw_y, draw_x = np.uint64(32), np.uint64(FLIP), np.uint64(SHIFT_Y), np.uint64(SHIFT_X)

    @compiled_here
    def nothing(_, seed, epoch, index, tables):
        pass

    recolour, erase = nothing, nothing
    if strong:
        recolour, erase = colours.make(compiled_here, bits, below)[0], erasing.make(compiled_here, bits, below)

    @compiled_here
    def window(pixels_hw3, top, left, side):
        """A copy of the window at (top, left), what lies outside of the image black."""
        out_SS3 = np.zeros((side, side, 3), np.uint8)
        for y in range(max(0, -top), min(side, pixels_hw3.shape[0] - top)):
            for x in range(max(0, -left), min(side, pixels_hw3.shape[1] - left)):
                for c in range(3):
                    out_SS3[y, x, c] = pixels_hw3[top + y, left + x, c]
        return out_SS3

    @compiled_here
    def view(out_CSS, pixels_hw3, seed, epoch, index, options, area, ratios, table, tables):
        """One decoded image, all that is done to it."""
        side, kind, reach, flip = out_CSS.shape[1], options[0], options[1], options[2]
        h, w = np.int64(pixels_hw3.shape[0]), np.int64(pixels_hw3.shape[1])
        mirrored = flip == 1 and below(bits(seed, epoch, index, draw_flip), 2) == 1
        if kind == WINDOW:
            top, left = (h - side) // 2, (w - side) // 2
            if reach > 0:
                top += below(bits(seed, epoch, index, draw_y), 2 * reach + 1) - reach
                left += below(bits(seed, epoch, index, draw_x), 2 * reach + 1) - reach
            if strong:
                shown = window(pixels_hw3, top, left, side)
                recolour(shown, seed, epoch, index, tables)
                put(out_CSS, shown, 0, 0, mirrored, table)
            else:
                put(out_CSS, pixels_hw3, top, left, mirrored, table)
            erase(out_CSS, seed, epoch, index, tables)
            return
        if kind == RESIZED:
            top, left, height, width = crop_box(h, w, seed, epoch, index, area, ratios)
        else:
            height = max(1, np.int64(area[0] * min(h, w)))
            width = height
            top, left = (h - height) // 2, (w - width) // 2
        resized = np.empty((side, side, 3), np.uint8)
        resize(pixels_hw3, top, top + height, left, left + width, resized)
        recolour(resized, seed, epoch, index, tables)
        put(out_CSS, resized, 0, 0, mirrored, table)
        erase(out_CSS, seed, epoch, index, tables)

    @compiled_here
    def sample(b, indices_B, out_BCSS, keys, status, records, storage, options, area, ratios, table, tables):
        file, addresses, sizes = storage
        samples = np.uint64(len(records))
        copy, index = np.uint64(indices_B[b]) // samples, np.uint64(indices_B[b]) % samples  # see reader.py
        record = records[index]
        address = record["data_ptr"]
        stored = file[address : address + sizes[np.searchsorted(addresses, address)]]
        h, w = np.int64(record["height"]), np.int64(record["width"])
        seed, epoch = keys[b, 0], keys[b, 1] + (copy << s32)
        status[b, 0] = 0
        if record["mode"] == jpg:
            # Scratch memory here, not in FFCV's: that would be one image of the largest size for each sample in flight.
            pixels = np.empty((h, w, 3), np.uint8)
            status[b, 0] = decode_jpg(stored, pixels, h, w, h, w, 0, 0, 1, 1, False, False)
            if status[b, 0] == 0:
                view(out_BCSS[b], pixels, seed, epoch, index, options, area, ratios, table, tables)
        else:
            pixels_hw3 = stored.reshape((h, w, 3))
            view(out_BCSS[b], pixels_hw3, seed, epoch, index, options, area, ratios, table, tables)

    return sample


@cache
def compiled(parallel: bool, strong: bool) -> Any:
    """The loop over a batch, over numba's threads or in one. (A `raise` inside it would cost the parallelism in silence.)"""
    sample = sampler(strong)
    if not parallel:

        def batch(indices_B, out_BCSS, keys, status, records, storage, options, area, ratios, table, tables):
            for b in range(len(indices_B)):
                sample(b, indices_B, out_BCSS, keys, status, records, storage, options, area, ratios, table, tables)

        return njit(nogil=True, error_model="numpy")(batch)

    def batch_parallel(indices_B, out_BCSS, keys, status, records, storage, options, area, ratios, table, tables):
        for b in prange(len(indices_B)):
            sample(b, indices_B, out_BCSS, keys, status, records, storage, options, area, ratios, table, tables)

    return njit(nogil=True, parallel=True, error_model="numpy")(batch_parallel)
