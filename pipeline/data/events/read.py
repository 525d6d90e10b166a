"""From the counts of a file to float32 [B,T,C,S,S], in one compiled loop: sum slices, shift, mirror, normalise.

A recording moves and mirrors as one: its random numbers are drawn once, from (seed, epoch, sample), as those of images.
"""

# B batch, T time, C polarities of the output, S pixels a side

from functools import cache
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from pipeline.data.augment import functions
from pipeline.data.decoder import Decoder
from pipeline.data.format import Arrays
from pipeline.random import FLIP, SHIFT_X, SHIFT_Y


class DecodeEvents(Decoder):
    """`stored`: what the file holds, [slices, 2, S, S]. `shape`: (T, C, S, S), T a divisor of the slices, C 2 or 1 (their sum).

    Its status is not 0 where a sample's bytes are not those of `stored`.
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
        super().__init__(name=Arrays.name, what="the frames", shape=shape)
        self.parallel = parallel
        word = np.dtype(stored.dtype).itemsize
        self._options = np.array([stored.shape[0] // shape[0], stored.bytes, word, reach, int(flip)], np.int64)
        self._table = counts_of_words(stored.dtype)
        self._normal = np.array([mean, std], np.float32)

    def generate_code(self) -> Any:
        batch = compiled(self.parallel)
        options, table, normal = self._options, self._table, self._normal

        def decode(indices_B, memory, addresses, storage):
            out_BTCSS, keys_B2, status_B1 = memory
            batch(indices_B, out_BTCSS, keys_B2, status_B1, addresses, storage, options, table, normal)
            return out_BTCSS

        return decode


def counts_of_words(dtype: str) -> NDArray[np.float32]:
    """The count that each stored word means: [256] or [65536]. (numba 0.68.1 does not compute with float16 on a CPU.)"""
    kind = np.dtype(dtype)
    words = np.arange(1 << 8 * kind.itemsize, dtype=f"<u{kind.itemsize}")
    return words.view(kind.newbyteorder("<")).astype(np.float32)


@cache
def compiled(parallel: bool) -> Any:
    """The loop over a batch, over numba's threads or in one."""
    shared = functions()
    bits, below = shared.bits, shared.below
    draw_flip, draw_y, draw_x = np.uint64(FLIP), np.uint64(SHIFT_Y), np.uint64(SHIFT_X)

    @njit(nogil=True, fastmath=False, error_model="numpy")
    def sample(b, indices_B, out_BTCSS, keys, status, addresses, storage, options, table, normal):
        file, starts, sizes = storage
        merged, length, word, reach, flip = options[0], options[1], options[2], options[3], options[4]
        index = np.uint64(indices_B[b])
        address = addresses[index]
        stored = file[address : address + sizes[np.searchsorted(starts, address)]]
        status[b, 0] = 0 if len(stored) == length else 1
        if status[b, 0] != 0:
            return
        seed, epoch = keys[b, 0], keys[b, 1]
        top, left, mirrored = np.int64(0), np.int64(0), flip == 1 and below(bits(seed, epoch, index, draw_flip), 2) == 1
        if reach > 0:
            top = below(bits(seed, epoch, index, draw_y), 2 * reach + 1) - reach
            left = below(bits(seed, epoch, index, draw_x), 2 * reach + 1) - reach
        out_TCSS = out_BTCSS[b]
        steps, channels, side = out_TCSS.shape[0], out_TCSS.shape[1], out_TCSS.shape[2]
        out_TCSS[...] = 0
        for at in range(steps * merged * 2):  # slices, and the two polarities of each
            step, polarity = at // (2 * merged), at % 2
            channel = polarity if channels == 2 else 0
            for y in range(side):
                row = top + y
                if row < 0 or row >= side:
                    continue
                for x in range(side):
                    column = left + (side - 1 - x if mirrored else x)
                    if column < 0 or column >= side:
                        continue
                    place = (at * side + row) * side + column
                    value = np.int64(stored[place]) if word == 1 else (
                        np.int64(stored[2 * place]) | np.int64(stored[2 * place + 1]) << 8
                    )  # fmt: skip
                    out_TCSS[step, channel, y, x] += table[value]
        for channel in range(channels):
            mean, std = normal[0, channel], normal[1, channel]
            if mean != 0 or std != 1:
                for step in range(steps):
                    for y in range(side):
                        for x in range(side):
                            out_TCSS[step, channel, y, x] = (out_TCSS[step, channel, y, x] - mean) / std

    if not parallel:

        def batch(indices_B, out_BTCSS, keys, status, addresses, storage, options, table, normal):
            for b in range(len(indices_B)):
                sample(b, indices_B, out_BTCSS, keys, status, addresses, storage, options, table, normal)

        return njit(nogil=True, error_model="numpy")(batch)

    def batch_parallel(indices_B, out_BTCSS, keys, status, addresses, storage, options, table, normal):
        for b in prange(len(indices_B)):
            sample(b, indices_B, out_BTCSS, keys, status, addresses, storage, options, table, normal)

    return njit(nogil=True, parallel=True, error_model="numpy")(batch_parallel)
