"""Decodes stored counts to float32 [B,T,C,S,S] in one compiled loop.

The loop shifts and mirrors slices, sums the slices of each frame, and normalises the sums. All
frames of a recording have the same shift and the same mirroring. The random numbers depend on
(seed, epoch, sample), as for images.
"""

# B batch, T time, C polarities of the output, S pixels a side

import math

import numpy as np
from numba import prange

from pipeline.core.saved_loops import compiled
from pipeline.data.ffcv.format import Arrays
from pipeline.data.ffcv.loops import Decoder, batch_loop, draw_mirror, draw_shift


class DecodeEvents(Decoder):
    """Decodes event frames.

    The status of a sample is 0 if it has as many bytes as an array of `kind`, else 1.

    Args:
        kind: the dtype and the shape [slices, 2, S, S] of the file's arrays.
        shape: (T, C, S, S). T divides the number of slices. C is 2, or 1 for the sum of both
            polarities.
        reach: the maximum shift in pixels.
        flip: mirror with probability 1/2.
    """

    def __init__(
        self,
        kind: Arrays,
        *,
        shape: tuple[int, ...],
        reach: int = 0,
        flip: bool = False,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        parallel: bool,
    ) -> None:
        dtype = np.dtype(kind.dtype)
        word_bytes, array_bytes = dtype.itemsize, math.prod(kind.shape) * dtype.itemsize
        options = np.array(
            [kind.shape[0] // shape[0], array_bytes, word_bytes, reach, int(flip)], np.int64
        )
        # The count for each possible stored word. numba 0.68.1 has no float16 on a CPU.
        words = np.arange(1 << 8 * word_bytes, dtype=f"<u{word_bytes}")
        counts = words.view(dtype.newbyteorder("<")).astype(np.float32)
        super().__init__(
            name=Arrays.name,
            what="the frames",
            shape=shape,
            decode_batch=LOOPS[parallel],
            parameters=(options, counts, np.array([mean, std], np.float32)),
        )


@compiled
def add_slice(out_SS, stored, first_word, word_bytes, top, left, is_mirrored, counts):
    """Add the shifted and mirrored counts of one slice and polarity to `out_SS`.

    `first_word`: the index of the first of these counts in `stored`, in words.
    """
    side = out_SS.shape[0]
    for y in range(side):
        row = top + y
        if row < 0 or row >= side:
            continue
        for x in range(side):
            column = left + (side - 1 - x if is_mirrored else x)
            if column < 0 or column >= side:
                continue
            position = first_word + row * side + column
            if word_bytes == 1:
                word = np.int64(stored[position])
            else:  # two bytes, the lower one first
                word = np.int64(stored[2 * position]) | np.int64(stored[2 * position + 1]) << 8
            out_SS[y, x] += counts[word]


@compiled
def decode_recording(b, indices_B, out_BTCSS, keys_B2, status_B1, addresses, storage, parameters):
    """Decode sample b of the batch into `out_BTCSS[b]`."""
    options, counts, mean_std_2C = parameters
    file, sample_addresses, sizes = storage
    slices_per_step, array_bytes, word_bytes = options[0], options[1], options[2]
    reach, flip = options[3], options[4]
    index = np.uint64(indices_B[b])
    address = addresses[index]
    stored = file[address : address + sizes[np.searchsorted(sample_addresses, address)]]
    status_B1[b, 0] = 0 if len(stored) == array_bytes else 1
    if status_B1[b, 0] != 0:
        return
    top, left = draw_shift(reach, keys_B2[b, 0], keys_B2[b, 1], index)
    is_mirrored = draw_mirror(flip, keys_B2[b, 0], keys_B2[b, 1], index)
    out_TCSS = out_BTCSS[b]
    steps, channels, side = out_TCSS.shape[0], out_TCSS.shape[1], out_TCSS.shape[2]
    out_TCSS[...] = 0
    for plane in range(steps * slices_per_step * 2):  # each slice has two planes, one per polarity
        channel = plane % 2 if channels == 2 else 0
        out_SS = out_TCSS[plane // (2 * slices_per_step), channel]
        add_slice(out_SS, stored, plane * side * side, word_bytes, top, left, is_mirrored, counts)
    for channel in range(channels):
        mean, std = mean_std_2C[0, channel], mean_std_2C[1, channel]
        if mean != 0 or std != 1:
            out_TCSS[:, channel] = (out_TCSS[:, channel] - mean) / std


def decode_recordings(indices_B, out_BTCSS, keys_B2, status_B1, records, storage, parameters):
    for b in prange(len(indices_B)):
        decode_recording(b, indices_B, out_BTCSS, keys_B2, status_B1, records, storage, parameters)


LOOPS = {parallel: batch_loop(decode_recordings, parallel=parallel) for parallel in (False, True)}
