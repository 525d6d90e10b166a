"""The shared parts of the compiled loops: a loop over a batch, random numbers.

numba compiles each function at its first call in a process, without fastmath.
"""

# B batch

from functools import cache
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from pipeline.core.random import FLIP, SHIFT_X, SHIFT_Y, compiled_bits

compiled: Any = njit(nogil=True, fastmath=False, error_model="numpy")
bits = compiled_bits(compiled)
# Constants are uint64: numba 0.68.1 combines uint64 and int64 to float64.
_S11, _S32 = np.uint64(11), np.uint64(32)
_FLIP, _SHIFT_Y, _SHIFT_X = np.uint64(FLIP), np.uint64(SHIFT_Y), np.uint64(SHIFT_X)


class Decoder:
    """A compiled loop over the samples of a batch: from sample ids to float32 or uint8 [B, ...].

    Args:
        name: the decoded field of the file.
        what: the noun for error messages.
        shape: the shape of one output sample.
        decode_sample: a compiled function that decodes one sample (see `batch_loop`).
        parameters: the last argument of `decode_sample`.
        table: the output is uint8, and this is `Batch.table`; None: the output is float32.
        parallel: decode the samples of a batch on numba's threads.
    """

    def __init__(
        self,
        *,
        name: str,
        what: str,
        shape: tuple[int, ...],
        decode_sample: Any,
        parameters: Any,
        table: NDArray[np.float32] | None = None,
        parallel: bool,
    ) -> None:
        self.name, self.what, self.shape, self.table = name, what, shape, table
        self.dtype = np.dtype(np.float32 if table is None else np.uint8)
        self._decode_batch, self._parameters = batch_loop(decode_sample, parallel), parameters

    def __call__(self, rows_B: Any, memory: Any, records: Any, storage: Any) -> None:
        """Decode a batch.

        Args:
            rows_B: the number of each sample, plus the view number times the number of samples.
            memory: the output, (seed, epoch) as uint64 [B,2], and a status per sample, int32 [B,1],
                which is not 0 if the sample could not be decoded.
            records: of the field, for all samples of the file.
            storage: the file as uint8, the addresses of its samples in ascending order, and their
                sizes in bytes.
        """
        self._decode_batch(rows_B, *memory, records, storage, self._parameters)


@cache
def batch_loop(decode_sample: Any, parallel: bool) -> Any:
    """The compiled loop that calls `decode_sample` for each sample of a batch.

    It runs on numba's threads if `parallel`. A `raise` inside the loop would silently disable them.
    """

    def decode_batch(indices_B, out_B, keys_B2, status_B1, records, storage, parameters):
        for b in prange(len(indices_B)):
            decode_sample(b, indices_B, out_B, keys_B2, status_B1, records, storage, parameters)

    return njit(nogil=True, parallel=parallel, error_model="numpy")(decode_batch)


@compiled
def below(random_bits, n):
    """The same as `pipeline.core.random.below`, compiled."""
    return np.int64(((random_bits >> _S32) * np.uint64(n)) >> _S32)


@compiled
def uniform(random_bits):
    """The same as `pipeline.core.random.uniform`, compiled."""
    return np.float64(random_bits >> _S11) * 2.0**-53


@compiled
def draw_shift(reach, seed, epoch, index):
    """Draw the shift of a sample: (down, right) in -reach..reach pixels."""
    return (
        below(bits(seed, epoch, index, _SHIFT_Y), 2 * reach + 1) - reach,
        below(bits(seed, epoch, index, _SHIFT_X), 2 * reach + 1) - reach,
    )


@compiled
def draw_mirror(flip, seed, epoch, index):
    """Draw whether a sample is mirrored: never if `flip` is 0, with probability 1/2 if it is 1."""
    return flip == 1 and below(bits(seed, epoch, index, _FLIP), 2) == 1
