"""TBB, the one of numba's threading layers that more than one loader thread is safe with: found, or asked for in a line."""

import ctypes
import importlib
import sys
from pathlib import Path

import numba

from pipeline.data.errors import DataError


def demand_tbb() -> None:
    """Of numba's threading layers, OpenMP's kills a forked child and workqueue aborts with two loaders at once (0.68.1).

    Raises: DataError where there is no TBB.
    """
    name = "numba.np.ufunc.tbbpool"  # importing it asks the dynamic linker for libtbb.so.12
    try:
        importlib.import_module(name)
    except ImportError:
        # The wheel `tbb` puts its library where the linker does not look; once loaded by its path, it answers numba's request.
        try:
            ctypes.CDLL(str(Path(sys.prefix) / "lib" / "libtbb.so.12"), mode=ctypes.RTLD_GLOBAL)
            importlib.import_module(name)
        except (OSError, ImportError) as error:
            raise DataError(
                "data: more than 1 loader thread needs TBB (pip install tbb, or apt install libtbb12), or set threads=1; "
                f"got: {error}"
            ) from error
    numba.config.THREADING_LAYER = "tbb"  # pyright: ignore[reportAttributeAccessIssue]
