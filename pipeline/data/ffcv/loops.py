"""The shared parts of the compiled loops: how they are compiled, the decoder of a batch, random
numbers.

numba compiles each function at its first call, without fastmath. It saves the loops over a batch
for later processes with the same sources, numba and kind of processor.
"""

# B batch

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import random
from pipeline.core.errors import require_data
from pipeline.core.saved_loops import compiled, folder_of, numba_config, saved_in

require_data(
    not numba_config.DISABLE_JIT,
    "data: the loops call compiled libraries and must be compiled; got NUMBA_DISABLE_JIT=1",
)


def saved_loops() -> Path | None:
    """The folder of the compiled loops; None if it cannot be written."""
    sources = (*sorted(Path(__file__).parent.glob("*.py")), Path(random.__file__))
    return folder_of("loops", sources)


FOLDER = saved_loops()


def batch_loop(decode_batch: Callable[..., Any], *, parallel: bool, saved: bool = True) -> Any:
    """The compiled loop over a batch, on numba's threads if `parallel`.

    It is saved with all that it calls. `saved=False` is for a loop that calls Python, which numba
    cannot save. `decode_batch` must not be a closure over a compiled function, because numba would
    save it anew in each process. A `raise` inside the loop would silently disable numba's threads.
    """
    # A folder for each, because numba would load the serial loop as the parallel one.
    folder = FOLDER / ("parallel" if parallel else "serial") if saved and FOLDER else None
    return saved_in(folder, decode_batch, parallel=parallel)


# Constants are uint64: numba 0.68.1 combines uint64 and int64 to float64.
_S11, _S32 = np.uint64(11), np.uint64(32)
_FLIP, _SHIFT_Y, _SHIFT_X = map(np.uint64, (random.FLIP, random.SHIFT_Y, random.SHIFT_X))
_INCREMENT = random.UNSIGNED_INCREMENT


class Decoder:
    """A compiled loop over the samples of a batch: from sample ids to float32 or uint8 [B, ...].

    Args:
        name: the decoded field of the file.
        what: the noun for error messages.
        shape: the shape of one output sample.
        decode_batch: a loop from `batch_loop`.
        parameters: the last argument of `decode_batch`.
        table: the output is uint8, and this is `Batch.table`; None: the output is float32.
    """

    def __init__(
        self,
        *,
        name: str,
        what: str,
        shape: tuple[int, ...],
        decode_batch: Any,
        parameters: Any,
        table: NDArray[np.float32] | None = None,
    ) -> None:
        self.name, self.what, self.shape, self.table = name, what, shape, table
        self.dtype = np.dtype(np.float32 if table is None else np.uint8)
        self._decode_batch, self._parameters = decode_batch, parameters

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


_mix = compiled(random.unsigned_mix)


@compiled
def bits(seed, epoch, index, draw):
    """The same as `pipeline.core.random.bits`, compiled, for four uint64 scalars."""
    z = _mix(seed + _INCREMENT)
    z = _mix((z ^ epoch) + _INCREMENT)
    z = _mix((z ^ index) + _INCREMENT)
    return _mix((z ^ draw) + _INCREMENT)


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
