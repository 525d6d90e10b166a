"""TBB, the one of numba's threading layers that more than one loader thread is safe with: loaded,
and demanded in one line.
"""

import ctypes
import importlib
import sys
from pathlib import Path

import numba

from pipeline.core.errors import DataError

_POOL = "numba.np.ufunc.tbbpool"


def load_tbb() -> None:
    """Load numba's module of TBB, for as long as this process lives.

    As an interpreter ends, numba unloads the module and waits for an empty task that it gave TBB at
    the start of its threads (`unload_tbb` of numba 0.68.1). On one core TBB has no thread of its
    own, and after a fork, or where the thread that began it is gone, nobody is left to do that
    task: the wait never ended. A reference that is never given back keeps the module loaded.

    Raises: ImportError, OSError where there is no TBB.
    """
    try:
        module = importlib.import_module(_POOL)  # asks the dynamic linker for libtbb.so.12
    except ImportError:
        # The wheel `tbb` puts its library where the linker does not look; once loaded by its path,
        # it answers numba's request.
        ctypes.CDLL(str(Path(sys.prefix) / "lib" / "libtbb.so.12"), mode=ctypes.RTLD_GLOBAL)
        module = importlib.import_module(_POOL)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))


def require_tbb() -> None:
    """Of numba's threading layers, OpenMP's kills a forked child and workqueue aborts with two
    loaders at once (0.68.1).

    Raises: DataError where there is no TBB.
    """
    try:
        load_tbb()
    except (OSError, ImportError) as error:
        raise DataError(
            "data: more than 1 loader thread needs TBB (pip install tbb, or apt install libtbb12),"
            f" or set threads=1; got: {error}"
        ) from error
    numba.config.THREADING_LAYER = "tbb"  # pyright: ignore[reportAttributeAccessIssue]
