"""Encodes images to the bytes that a .beton stores.

In mode "jpg" a JPEG, also a progressive or grey one, is stored unchanged if it fits
`max_resolution` and FFCV's decoder accepts it without a warning. Pillow decodes all other images
(PNG, CMYK, a JPEG with stray bytes or too large) to RGB, shrinks them by area averaging and encodes
them again. EXIF orientation is ignored, as in torchvision's ImageFolder; pictures that are not
upright are counted as "not rotated".
"""

import ctypes
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.core.errors import DataError, require_data
from pipeline.core.random import bits
from pipeline.data.ffcv.format import JPG, RAW, Images
from pipeline.data.write.writer import Encoded

# Pillow 13.0 raises these for damaged files.
DAMAGED = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Item:
    """An image to encode: a file, or pixels uint8 [H,W] or [H,W,3]."""

    number: int  # its position in the set
    image: Path | np.ndarray
    label: int

    def __str__(self) -> str:
        return str(self.image) if isinstance(self.image, Path) else f"image {self.number}"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Encodes images as JPEG or raw pixels.

    `jpg_share`: in mode "mixed", the share stored as JPEG, chosen by a hash of the image's number.

    Raises: DataError for an option that is out of range.
    """

    mode: Literal["jpg", "raw", "mixed"]
    max_resolution: int | None = None  # the most pixels of the longer side
    quality: int = 90  # of JPEGs that are encoded again
    jpg_share: float = 0.5

    kind: ClassVar[Images] = Images()

    def __post_init__(self) -> None:
        require_data(
            self.mode in ("jpg", "raw", "mixed"),
            f"write: mode must be 'jpg', 'raw' or 'mixed'; got {self.mode!r}",
        )
        require_data(
            (self.max_resolution is None or self.max_resolution >= 1)
            and 1 <= self.quality <= 100
            and 0 <= self.jpg_share <= 1,
            "write: max_resolution must be 1 or more pixels, quality in 1..100, jpg_share in 0..1;"
            f" got max_resolution={self.max_resolution}, quality={self.quality},"
            f" jpg_share={self.jpg_share}",
        )

    def __call__(self, item: Item) -> Encoded | str:
        as_jpg = self.mode == "jpg" or (
            self.mode == "mixed" and int(bits(0, 0, item.number, 0)) < self.jpg_share * 2.0**64
        )
        try:
            if isinstance(item.image, Path):
                return _encode_file(item.image, self, as_jpg)
            return _encode_picture(Image.fromarray(item.image), self, as_jpg)
        except DataError:
            raise
        except UnidentifiedImageError:  # its text contains the address of an object
            return "it is no picture that Pillow can read"
        except DAMAGED as error:
            return f"{type(error).__name__}: {error}"


def _encode_file(path: Path, how: Encoding, as_jpg: bool) -> Encoded | str:
    content = path.read_bytes()
    if not content:
        return "it is empty"
    with Image.open(io.BytesIO(content)) as picture:
        width, height = picture.size
        fits = how.max_resolution is None or max(width, height) <= how.max_resolution
        if as_jpg and fits and picture.format == "JPEG" and _ffcv_decodes(content, height, width):
            attributes = {"mode": JPG, "height": height, "width": width}
            encoded = Encoded(content, attributes, {"as it is": 1})
        else:
            encoded = _encode_picture(picture, how, as_jpg)
        if isinstance(encoded, Encoded) and not _is_upright(picture):
            encoded.counted["not rotated"] = 1
        return encoded


def _is_upright(picture: Image.Image) -> bool:
    try:
        # values outside 1..8 have no meaning
        return picture.getexif().get(ExifTags.Base.Orientation, 1) not in range(2, 9)
    except (SyntaxError, struct.error):  # EXIF that Pillow 13.0 cannot read
        return True


def _encode_picture(picture: Image.Image, how: Encoding, as_jpg: bool) -> Encoded | str:
    if picture.mode.startswith(("I", "F")):
        return f"pixels of 8 bits are needed; got mode {picture.mode}"
    picture = picture.convert("RGB")  # decodes all of it, and raises if the file ends early
    longest = max(picture.size)
    if how.max_resolution is not None and longest > how.max_resolution:
        width, height = (
            max(1, round(side * how.max_resolution / longest)) for side in picture.size
        )
        picture = picture.resize((width, height), Image.Resampling.BOX)
    width, height = picture.size
    if max(width, height) > 65535:
        return f"a side must be at most 65535 pixels; got {width}x{height}"
    attributes = {"mode": JPG if as_jpg else RAW, "height": height, "width": width}
    if not as_jpg:
        return Encoded(picture.tobytes(), attributes, {"raw": 1})
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=how.quality)
    return Encoded(buffer.getvalue(), attributes, {"jpg": 1})


def _ffcv_decodes(content: bytes, height: int, width: int) -> bool:
    """Whether a training run's decoder accepts this JPEG without an error or a warning.

    The run treats both as damage.
    """
    pixels = np.empty((height, width, 3), np.uint8)
    memory = pixels.ctypes.data_as(ctypes.c_void_p)
    whole = (height, width, 0, 0, 1, 1, False, False)
    return _ffcv_imdecode()(content, len(content), height, width, memory, *whole) == 0


@cache
def _ffcv_imdecode() -> Callable[..., int]:
    """`imdecode` of FFCV's library, loaded without the package.

    The package would import torch and numba in each worker, which takes seconds.
    """
    package = PathFinder.find_spec("ffcv")
    folders = list(package.submodule_search_locations or []) if package else []
    libraries = [file for folder in folders for file in Path(folder).glob("_libffcv*.so")]
    require_data(
        libraries,
        "write: FFCV must be installed, its decoder judges what it will read; got no"
        " ffcv/_libffcv*.so",
    )
    function = ctypes.CDLL(str(libraries[0])).imdecode
    words = [ctypes.c_uint32] * 2
    # (bytes, size, height, width, pixels, crop height and width, offset x and y, scale as a
    # fraction, crop?, flip?) in 1.0.2
    function.argtypes = [
        ctypes.c_char_p,
        ctypes.c_uint64,
        *words,
        ctypes.c_void_p,
        *words * 3,
        ctypes.c_bool,
        ctypes.c_bool,
    ]
    return function
