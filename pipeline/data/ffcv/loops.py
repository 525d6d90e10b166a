"""The shared parts of the compiled loops: FFCV's operation, a loop over a batch, random numbers.

numba compiles each function at its first call in a process, without fastmath.
"""

# B batch

from functools import cache
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from pipeline.core.random import FLIP, SHIFT_X, SHIFT_Y, compiled_bits
from pipeline.data.ffcv.api import AllocationQuery, Operation, State

compiled: Any = njit(nogil=True, fastmath=False, error_model="numpy")
bits = compiled_bits(compiled)
# Constants are uint64: numba 0.68.1 combines uint64 and int64 to float64.
_S11, _S32 = np.uint64(11), np.uint64(32)
_FLIP, _SHIFT_Y, _SHIFT_X = np.uint64(FLIP), np.uint64(SHIFT_Y), np.uint64(SHIFT_X)


class Decoder(Operation):
    """The FFCV operation of a compiled loop: from sample ids to float32 or uint8 [B, ...].

    For each batch that is read ahead, FFCV allocates memory for the output, the pair (seed, epoch)
    and a status per sample. The pair cannot be a variable of a closure, because numba would compile
    it as a constant. The status is not 0 if the sample could not be decoded.

    Args:
        name: the decoded field of the file.
        what: the noun for error messages.
        shape: the shape of one output sample.
        decode_sample: a compiled function that decodes one sample (see `batch_loop`).
        parameters: the last argument of `decode_sample`.
        table: the output is uint8, and this is `Batch.table`; None: the output is float32.
        parallel: decode the samples of a batch on numba's threads.
    """

    KEYS, STATUS = 1, 2  # indices into the memory

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
        super().__init__()
        self.name, self.what, self.shape, self.table = name, what, shape, table
        self._decode_batch, self._parameters = batch_loop(decode_sample, parallel), parameters

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        dtype = np.dtype(np.float32 if self.table is None else np.uint8)
        return (
            State(jit_mode=True, device=previous_state.device, shape=self.shape, dtype=dtype),
            (
                AllocationQuery(self.shape, dtype),
                AllocationQuery((2,), np.dtype(np.uint64)),
                AllocationQuery((1,), np.dtype(np.int32)),
            ),
        )

    def generate_code(self) -> Any:
        # numba cannot read attributes of `self`
        decode_batch, parameters = self._decode_batch, self._parameters

        def decode(indices_B, memory, records, storage):
            out_B, keys_B2, status_B1 = memory
            decode_batch(indices_B, out_B, keys_B2, status_B1, records, storage, parameters)
            return out_B

        return decode


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
