"""Loops that numba compiles once and saves for later processes.

A later process loads a loop if its sources, numba and the kind of processor are the same.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from numba import config, njit
from numba.core.caching import FunctionCache

from pipeline.core.files import cache_folder, lock_within

numba_config: Any = config  # its names have no types
LOCK_TIMEOUT_S = 10.0
_OPTIONS: Any = {"nogil": True, "error_model": "numpy"}

compiled: Any = njit(**_OPTIONS)  # for what a loop calls; it is saved with the loop


def folder_of(kind: str, sources: Iterable[Path]) -> Path | None:
    """The folder of the compiled loops of one kind; None if it cannot be written.

    Its name is a hash of this file and of `sources`, every source file that they are made of. numba
    (0.68.1) itself compiles a saved function again only if the function's own file has changed, and
    not what it calls or how it is compiled.
    """
    files = (Path(__file__), *sources)
    name = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    numbas = numba_config.CACHE_DIR  # $NUMBA_CACHE_DIR
    try:
        root = Path(numbas).expanduser() / "spiketrain" if numbas else cache_folder()
        folder = root / f"{kind}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder


def saved_in(folder: Path | None, function: Callable[..., Any], *, parallel: bool = False) -> Any:
    """The compiled `function`, saved in `folder` with all that it calls; None: it is not saved.

    `parallel` is that of `numba.njit`. `function` must not be a closure over a compiled function,
    because numba would save it anew in each process.
    """
    loop: Any = njit(**_OPTIONS, parallel=parallel)(function)
    if folder is None:
        return loop
    usual = numba_config.CACHE_DIR
    numba_config.CACHE_DIR = str(folder)
    try:
        cache: Any = FunctionCache(function)
    except RuntimeError:  # numba found no folder
        return loop
    finally:
        numba_config.CACHE_DIR = usual
    if folder in Path(cache.cache_path).parents:  # numba may choose another folder
        loop._cache = _Cache(cache, folder / "lock")
    return loop


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
            f"numba could not {what} a compiled loop in {self._lock.parent}, and this start"
            f" compiles it ({type(error).__name__}: {error})",
            stacklevel=2,
        )
