"""The shared parts of the compiled loops: how they are compiled, the decoder of a batch, random
numbers.

numba compiles each function at its first call, without fastmath. It saves the loops over a batch
for later processes with the same sources, numba and kind of processor.
"""

# B batch

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import config, njit
from numpy.typing import NDArray

from pipeline.core import random
from pipeline.core.errors import require_data
from pipeline.core.files import cache_folder, lock_within

numba_config: Any = config  # its names have no types
require_data(
    not numba_config.DISABLE_JIT,
    "data: the loops call compiled libraries and must be compiled; got NUMBA_DISABLE_JIT=1",
)


def saved_loops() -> Path | None:
    """The folder of the compiled loops; None if it cannot be written.

    Its name is a hash of every source file that they are made of. numba (0.68.1) itself compiles a
    saved function again only if the function's own file has changed, and not what it calls.
    """
    sources = (*sorted(Path(__file__).parent.glob("*.py")), Path(random.__file__))
    name = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]
    numbas = numba_config.CACHE_DIR  # $NUMBA_CACHE_DIR
    try:
        root = Path(numbas).expanduser() / "spiketrain" if numbas else cache_folder()
        folder = root / f"loops-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder


FOLDER = saved_loops()
LOCK_TIMEOUT_S = 10.0
compiled: Any = njit(nogil=True, error_model="numpy")


class _Cache:
    """numba's cache of a function. Where the cache fails, the function is compiled as if it had
    none: a full disk or a damaged file ends no run.
    """

    def __init__(self, numbas: Any, lock: Path) -> None:
        self._numbas, self._lock = numbas, lock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._numbas, name)

    def load_overload(self, *words: Any) -> Any:
        try:
            return self._numbas.load_overload(*words)
        except Exception as error:  # a damaged pickle raises almost anything
            self._warn("load", error)
            return None

    def save_overload(self, *words: Any) -> None:
        try:
            # Without the lock, two processes could save two signatures under one number.
            with self._lock.open("a") as lock:
                if not lock_within(lock, LOCK_TIMEOUT_S):
                    raise TimeoutError("another process holds its lock")
                self._numbas.save_overload(*words)
        except OSError as error:
            self._warn("save", error)

    def _warn(self, what: str, error: Exception) -> None:
        warnings.warn(
            f"data: numba could not {what} a compiled loop in {self._lock.parent}, and this start"
            f" compiles it ({type(error).__name__}: {error})",
            stacklevel=2,
        )


def batch_loop(decode_batch: Callable[..., Any], *, parallel: bool, saved: bool = True) -> Any:
    """The compiled loop over a batch, on numba's threads if `parallel`.

    It is saved with all that it calls. `saved=False` is for a loop that calls Python, which numba
    cannot save. `decode_batch` must not be a closure over a compiled function, because numba would
    save it anew in each process. A `raise` inside the loop would silently disable numba's threads.
    """
    options: Any = {"nogil": True, "error_model": "numpy", "parallel": parallel}
    unsaved = njit(**options)(decode_batch)
    if not saved or FOLDER is None:
        return unsaved
    usual = numba_config.CACHE_DIR
    # A folder for each, because numba would load the serial loop as the parallel one.
    folder = FOLDER / ("parallel" if parallel else "serial")
    numba_config.CACHE_DIR = str(folder)
    try:
        loop: Any = njit(**options, cache=True)(decode_batch)
    except RuntimeError:  # numba found no folder
        return unsaved
    finally:
        numba_config.CACHE_DIR = usual
    if folder not in Path(loop.stats.cache_path).parents:  # numba chose another folder
        return unsaved
    loop._cache = _Cache(loop._cache, FOLDER / "lock")
    return loop


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
