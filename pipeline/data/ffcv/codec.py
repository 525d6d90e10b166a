"""The functions that decode and resize stored images.

FFCV's library does both. Where FFCV cannot be imported (it builds on Linux alone), Pillow decodes
JPEGs and OpenCV resizes, under the interpreter's lock. OpenCV's function is the one that FFCV's
library calls, so raw images give the same bits. Of a JPEG, levels differ (docs/data.md): FFCV
decodes it with the fast inverse transform of libjpeg-turbo, Pillow with the accurate one. FFCV
refuses damaged JPEGs about which libjpeg-turbo only warns; Pillow decodes them.
"""

import io
import warnings
from typing import Any

import numpy as np
from numba import njit, objmode
from numba.core.errors import NumbaWarning
from PIL import Image

from pipeline.data.ffcv.loops import compiled

try:
    from pipeline.data.ffcv.api import imdecode, resize_crop
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
    _imdecode: Any = njit(nogil=True)(imdecode)
    resize_area: Any = njit(nogil=True)(resize_crop)

    @compiled
    def decode_jpg(stored, pixels_hw3):
        """Decode a JPEG to its pixels. The status is 0 if it succeeded."""
        h, w = pixels_hw3.shape[0], pixels_hw3.shape[1]
        return _imdecode(stored, pixels_hw3, h, w, h, w, 0, 0, 1, 1, False, False)


def _decode_by_pillow(stored: np.ndarray, pixels_hw3: np.ndarray) -> int:
    try:
        with Image.open(io.BytesIO(stored.tobytes())) as picture:
            pixels_hw3[...] = np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError):  # Pillow 13.0, for damaged files
        return 1
    return 0
