"""The shared parts of the compiled loops: FFCV's operation, a loop over a batch, random numbers.

numba compiles the functions at their first call, without fastmath, once per process.
"""

# B batch

from functools import cache
from typing import Any

import numpy as np
from numba import njit, prange

from pipeline.core.random import FLIP, SHIFT_X, SHIFT_Y, compiled_bits
from pipeline.data.ffcv.api import AllocationQuery, Operation, State

compiled: Any = njit(nogil=True, fastmath=False, error_model="numpy")
bits = compiled_bits(compiled)
# Constants are uint64: numba 0.68.1 combines uint64 and int64 to float64.
_S11, _S32 = np.uint64(11), np.uint64(32)
_FLIP, _SHIFT_Y, _SHIFT_X = np.uint64(FLIP), np.uint64(SHIFT_Y), np.uint64(SHIFT_X)


class Decoder(Operation):
    """The FFCV operation of a compiled loop: from sample ids to float32 [B, ...].

    Its memory holds, for each batch in flight, the output, the pair (seed, epoch), and a status per
    sample. In a closure, numba would freeze the pair. The status is not 0 if the sample could not
    be decoded.

    Args:
        name: the decoded field of the file.
        what: the noun for error messages.
        shape: the shape of one output sample.
        sample: a compiled function that fills one sample; `how` is its last argument.
    """

    KEYS, STATUS = 1, 2  # indices into the memory

    def __init__(
        self, *, name: str, what: str, shape: tuple[int, ...], sample: Any, how: Any, parallel: bool
    ) -> None:
        super().__init__()
        self.name, self.what, self.shape = name, what, shape
        self._batch, self._how = over_batch(sample, parallel), how

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        pixels = np.dtype(np.float32)
        state = State(jit_mode=True, device=previous_state.device, shape=self.shape, dtype=pixels)
        memory = (
            AllocationQuery(self.shape, pixels),
            AllocationQuery((2,), np.dtype(np.uint64)),
            AllocationQuery((1,), np.dtype(np.int32)),
        )
        return state, memory

    def generate_code(self) -> Any:
        batch, how = self._batch, self._how

        def decode(indices_B, memory, records, storage):
            out_B, keys_B2, status_B1 = memory
            batch(indices_B, out_B, keys_B2, status_B1, records, storage, how)
            return out_B

        return decode


@cache
def over_batch(sample: Any, parallel: bool) -> Any:
    """The loop over a batch, on numba's threads if `parallel`.

    A `raise` inside it would silently disable the parallelism.
    """

    def batch(indices_B, out_B, keys, status, records, storage, how):
        for b in prange(len(indices_B)):
            sample(b, indices_B, out_B, keys, status, records, storage, how)

    return njit(nogil=True, parallel=parallel, error_model="numpy")(batch)


@compiled
def below(random_bits, n):
    """As `pipeline.core.random.below`."""
    return np.int64(((random_bits >> _S32) * np.uint64(n)) >> _S32)


@compiled
def unit(random_bits):
    """A number in 0..1, 1 excluded."""
    return np.float64(random_bits >> _S11) * 2.0**-53


@compiled
def shifted(reach, seed, epoch, index):
    """The shift of a sample, (down, right) in -reach..reach pixels."""
    down = below(bits(seed, epoch, index, _SHIFT_Y), 2 * reach + 1) - reach
    return down, below(bits(seed, epoch, index, _SHIFT_X), 2 * reach + 1) - reach


@compiled
def mirrored(flip, seed, epoch, index):
    """Whether a sample is mirrored; with `flip` 1, the probability is 1/2."""
    return flip == 1 and below(bits(seed, epoch, index, _FLIP), 2) == 1
