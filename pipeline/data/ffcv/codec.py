"""The functions that decode and resize stored images.

FFCV's library does both. Where FFCV cannot be imported (it builds on Linux alone), Pillow decodes
JPEGs and OpenCV resizes, under the interpreter's lock. OpenCV's function is the one that FFCV's
library calls, so raw images give the same bits. Of a JPEG, levels differ (docs/data.md): FFCV
decodes it with the fast inverse transform of libjpeg-turbo, Pillow with the accurate one. FFCV
refuses damaged JPEGs about which libjpeg-turbo only warns; Pillow decodes them.
"""

import ctypes
import io
import warnings
from typing import Any

import llvmlite.binding
import numpy as np
from numba import objmode, types
from numba.core.errors import NumbaWarning
from PIL import Image

from pipeline.core.saved_loops import compiled

try:
    from pipeline.data.ffcv.api import ctypes_imdecode, ctypes_resize
except ImportError as error:
    import cv2

    HAS_FFCV = False
    warnings.warn(
        f"data: FFCV cannot be imported ({error}): Pillow decodes images in one thread, which reads"
        " nothing ahead and is slower",
        stacklevel=2,
    )
    # The loops call Python, so numba (0.68.1) warns that they hold the interpreter's lock.
    warnings.filterwarnings("ignore", "Code running in object mode", NumbaWarning)

    @compiled
    def decode_jpg(stored, pixels_hw3):
        with objmode(status="int32"):
            status = _decode_by_pillow(stored, pixels_hw3)
        return status

    @compiled
    def resize_area(pixels_hw3, top, bottom, left, right, out_SS3):
        with objmode():
            crop_hw3, size = pixels_hw3[top:bottom, left:right], out_SS3.shape[:2]
            out_SS3[...] = cv2.resize(crop_hw3, size, interpolation=cv2.INTER_AREA)

else:
    HAS_FFCV = True

    def _called_by_name(function: Any, *arguments: Any) -> Any:
        """A function of FFCV's library for compiled code. numba saves no code that has its address,
        which FFCV's own wrappers compile to.
        """
        name = f"ffcv_{function.__name__}"
        llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
        return types.ExternalFunction(name, types.int32(*arguments))

    _int, _word, _address = types.int64, types.uint32, types.uintp
    _imdecode = _called_by_name(
        *(ctypes_imdecode, _address, types.uint64, _word, _word, _address),
        *(6 * (_word,)),
        *(types.boolean, types.boolean),
    )
    _resize = _called_by_name(
        *(ctypes_resize, _int, _address, _int, _int, _int, _int, _int, _int),
        *(_address, _int, _int),
    )

    @compiled
    def decode_jpg(stored, pixels_hw3):
        """Decode a JPEG to its pixels. The status is 0 if it succeeded."""
        h, w = pixels_hw3.shape[0], pixels_hw3.shape[1]
        source, target = stored.ctypes.data, pixels_hw3.ctypes.data
        return _imdecode(source, stored.size, h, w, target, h, w, 0, 0, 1, 1, False, False)

    @compiled
    def resize_area(pixels_hw3, top, bottom, left, right, out_SS3):
        """Resize a crop by areas, as OpenCV does."""
        h, w, side = pixels_hw3.shape[0], pixels_hw3.shape[1], out_SS3.shape[0]
        source, target = pixels_hw3.ctypes.data, out_SS3.ctypes.data
        _resize(0, source, h, w, top, bottom, left, right, target, side, side)


def _decode_by_pillow(stored: np.ndarray, pixels_hw3: np.ndarray) -> int:
    try:
        with Image.open(io.BytesIO(stored.tobytes())) as picture:
            pixels_hw3[...] = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError):  # Pillow 13.0, for damaged files
        return 1
    return 0
