"""Decodes stored counts to float32 [B,T,C,S,S] in one compiled loop.

The loop sums slices, shifts, mirrors and normalises. All frames of a recording are shifted and
mirrored alike. The random numbers depend on (seed, epoch, sample), as for images.
"""

# B batch, T time, C polarities of the output, S pixels a side

import math

import numpy as np

from pipeline.data.ffcv.format import Arrays
from pipeline.data.ffcv.loops import Decoder, compiled, mirrored, shifted


class DecodeEvents(Decoder):
    """Decodes event frames.

    The status of a sample is not 0 if its number of bytes differs from that of `stored`.

    Args:
        stored: the file's arrays, [slices, 2, S, S].
        shape: (T, C, S, S), with T a divisor of the slices, and C 2 or 1 (the sum of both
            polarities).
    """

    def __init__(
        self,
        stored: Arrays,
        *,
        shape: tuple[int, ...],
        reach: int = 0,
        flip: bool = False,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        parallel: bool,
    ) -> None:
        kind = np.dtype(stored.dtype)
        word, stored_bytes = kind.itemsize, math.prod(stored.shape) * kind.itemsize
        options = np.array(
            [stored.shape[0] // shape[0], stored_bytes, word, reach, int(flip)], np.int64
        )
        # The count of each stored word, as a table: numba 0.68.1 has no float16 on a CPU.
        words = np.arange(1 << 8 * word, dtype=f"<u{word}")
        counts = words.view(kind.newbyteorder("<")).astype(np.float32)
        super().__init__(
            name=Arrays.name,
            what="the frames",
            shape=shape,
            sample=sample,
            how=(options, counts, np.array([mean, std], np.float32)),
            parallel=parallel,
        )


@compiled
def add_slice(out_SS, stored, first, word, top, left, is_mirrored, table):
    """Add the shifted and mirrored counts of one slice and polarity.

    They begin at word `first`.
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
            place = first + row * side + column
            if word == 1:
                value = np.int64(stored[place])
            else:
                value = np.int64(stored[2 * place]) | np.int64(stored[2 * place + 1]) << 8
            out_SS[y, x] += table[value]


@compiled
def sample(b, indices_B, out_BTCSS, keys, status, addresses, storage, how):
    """Decode one recording."""
    options, table, normal = how
    file, starts, sizes = storage
    merged, length, word, reach, flip = options[0], options[1], options[2], options[3], options[4]
    index = np.uint64(indices_B[b])
    address = addresses[index]
    stored = file[address : address + sizes[np.searchsorted(starts, address)]]
    status[b, 0] = 0 if len(stored) == length else 1
    if status[b, 0] != 0:
        return
    top, left = shifted(reach, keys[b, 0], keys[b, 1], index)
    is_mirrored = mirrored(flip, keys[b, 0], keys[b, 1], index)
    out_TCSS = out_BTCSS[b]
    steps, channels, side = out_TCSS.shape[0], out_TCSS.shape[1], out_TCSS.shape[2]
    out_TCSS[...] = 0
    for at in range(steps * merged * 2):  # slices, and the two polarities of each
        channel = at % 2 if channels == 2 else 0
        out_SS = out_TCSS[at // (2 * merged), channel]
        add_slice(out_SS, stored, at * side * side, word, top, left, is_mirrored, table)
    for channel in range(channels):
        mean, std = normal[0, channel], normal[1, channel]
        if mean != 0 or std != 1:
            out_TCSS[:, channel] = (out_TCSS[:, channel] - mean) / std
