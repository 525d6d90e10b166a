"""Loads TBB, the threading layer of numba for more than one loader thread.

numba's other threading layers (0.68.1) fail here: OpenMP kills a forked child, workqueue aborts
when two loaders run at once.
"""

import ctypes
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

from pipeline.core.errors import DataError, require_data
from pipeline.core.saved_loops import numba_config

_TBB_MODULE = "numba.np.ufunc.tbbpool"


def load_tbb() -> None:
    """Load numba's TBB module and keep it loaded until this process ends.

    When numba starts its threads, it gives TBB an empty task. When it unloads the module at exit,
    it waits for this task (`unload_tbb` of numba 0.68.1). This wait never ends if no thread is left
    to run the task: TBB has no thread of its own on one core, and none after a fork or after the
    end of the thread that started TBB. Our reference is never released, so the module stays loaded.

    Raises:
        ImportError, OSError: TBB is not installed.
    """
    try:
        module = importlib.import_module(_TBB_MODULE)  # asks the dynamic linker for libtbb.so.12
    except ImportError:
        # The wheel `tbb` installs the library in a folder that the linker does not search. After
        # this call has loaded the library by its path, the linker finds it.
        ctypes.CDLL(str(Path(sys.prefix) / "lib" / "libtbb.so.12"), mode=ctypes.RTLD_GLOBAL)
        module = importlib.import_module(_TBB_MODULE)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))


def require_tbb() -> None:
    """Make numba use TBB.

    Raises:
        DataError: TBB or FFCV is not installed. Without FFCV, one thread decodes (codec.py).
    """
    require_data(
        find_spec("ffcv") is not None,
        "data: more than 1 loader thread needs FFCV; install it or set threads=1",
    )
    try:
        load_tbb()
    except (OSError, ImportError) as error:
        raise DataError(
            "data: more than 1 loader thread needs TBB; install it (pip install tbb, or apt install"
            f" libtbb12) or set threads=1; got: {error}"
        ) from error
    numba_config.THREADING_LAYER = "tbb"
