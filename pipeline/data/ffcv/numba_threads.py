"""TBB, the only threading layer of numba that is safe with more than one loader thread."""

import ctypes
import importlib
import sys
from pathlib import Path

import numba

from pipeline.core.errors import DataError

_POOL = "numba.np.ufunc.tbbpool"


def load_tbb() -> None:
    """Load numba's TBB module and keep it loaded until this process ends.

    At exit numba unloads the module and waits for an empty task that it gave TBB when its threads
    started (`unload_tbb` of numba 0.68.1). With one core TBB has no thread of its own, and after a
    fork, or when the thread that started TBB is gone, no thread is left to run that task, so the
    wait never ends. A reference that is never released keeps the module loaded.

    Raises:
        ImportError, OSError: TBB is not installed.
    """
    try:
        module = importlib.import_module(_POOL)  # asks the dynamic linker for libtbb.so.12
    except ImportError:
        # The wheel `tbb` puts its library where the linker does not look. Once it is loaded by its
        # path, the linker finds it.
        ctypes.CDLL(str(Path(sys.prefix) / "lib" / "libtbb.so.12"), mode=ctypes.RTLD_GLOBAL)
        module = importlib.import_module(_POOL)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))


def require_tbb() -> None:
    """Make numba use TBB. Of its other threading layers (0.68.1), OpenMP kills a forked child, and
    workqueue aborts with two loaders at the same time.

    Raises:
        DataError: TBB is not installed.
    """
    try:
        load_tbb()
    except (OSError, ImportError) as error:
        raise DataError(
            "data: more than 1 loader thread needs TBB (pip install tbb, or apt install libtbb12),"
            f" or set threads=1; got: {error}"
        ) from error
    numba.config.THREADING_LAYER = "tbb"  # pyright: ignore[reportAttributeAccessIssue]
