"""Writes image sets: Fashion-MNIST from its four files, or a folder in ImageNet's layout.

An image that is stored as JPEG keeps its bytes if it is a JPEG (also a progressive or grey one)
that fits `max_resolution` and that FFCV's decoder accepts without a warning. Pillow decodes all
other images (PNG, CMYK, a JPEG with stray bytes or too large) to RGB, and shrinks them by area
averaging if they are too large. They are then stored as a new JPEG or as raw pixels. EXIF
orientation is ignored, as in torchvision's ImageFolder. Images that are not upright are counted as
"not rotated".
"""

import ctypes
import gzip
import io
import os
import struct
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import distribution
from operator import attrgetter
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.core.errors import DataError, require_data
from pipeline.core.random import bits
from pipeline.core.units import first_few
from pipeline.data.ffcv.format import JPG, RAW, Images
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.write.writer import Encoded, Existing, Progress, Source, write_sets

FASHION_PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
# Pillow 13.0 raises these for damaged files and for files that are no images.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Item:
    """An image to encode: a file, or pixels uint8 [H,W] or [H,W,3]."""

    number: int  # the position of the image in the set
    image: Path | np.ndarray
    label: int

    def __str__(self) -> str:
        return str(self.image) if isinstance(self.image, Path) else f"image {self.number}"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Encodes images as JPEG or raw pixels.

    Mode "mixed" stores half of the images as JPEG, selected by a hash of the image's number.

    Raises: DataError if an option is out of range.
    """

    mode: Literal["jpg", "raw", "mixed"]
    max_resolution: int | None = None  # pixels of the longer side; larger images are shrunk
    quality: int = 90  # of the JPEGs that Pillow encodes
    jpg_share: float = field(default=0.5, init=False)  # of mode "mixed"; manifests store it

    kind: ClassVar[Images] = Images()

    def __post_init__(self) -> None:
        require_data(
            self.mode in ("jpg", "raw", "mixed")
            and (self.max_resolution is None or self.max_resolution >= 1)
            and 1 <= self.quality <= 100,
            "write: mode must be 'jpg', 'raw' or 'mixed', max_resolution 1 or more pixels, quality"
            f" in 1..100; got mode={self.mode!r}, max_resolution={self.max_resolution},"
            f" quality={self.quality}",
        )

    def __call__(self, item: Item) -> Encoded | str:
        as_jpg = self.mode == "jpg" or (
            self.mode == "mixed" and int(bits(0, 0, item.number, 0)) < self.jpg_share * 2.0**64
        )
        try:
            if isinstance(item.image, Path):
                return _encode_file(item.image, self, as_jpg)
            return _encode_picture(Image.fromarray(item.image), self, as_jpg)
        except UnidentifiedImageError:
            return "it is no picture that Pillow can read"
        except PILLOW_ERRORS as error:
            return f"{type(error).__name__}: {error}"


def _encode_file(path: Path, encoding: Encoding, as_jpg: bool) -> Encoded | str:
    with Image.open(path) as picture:
        width, height = picture.size
        fits = encoding.max_resolution is None or max(width, height) <= encoding.max_resolution
        may_keep_bytes = as_jpg and fits and picture.format == "JPEG"
        content = path.read_bytes() if may_keep_bytes else b""
        if may_keep_bytes and _ffcv_decodes(content, height, width):
            attributes = {"mode": JPG, "height": height, "width": width}
            encoded = Encoded(content, attributes, {"as it is": 1})
        else:
            encoded = _encode_picture(picture, encoding, as_jpg)
        try:
            orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
        except (SyntaxError, struct.error):  # EXIF that Pillow 13.0 cannot read
            orientation = 1
        # values outside 1..8 have no meaning
        if isinstance(encoded, Encoded) and orientation in range(2, 9):
            encoded.counts["not rotated"] = 1
        return encoded


def _encode_picture(picture: Image.Image, encoding: Encoding, as_jpg: bool) -> Encoded | str:
    if picture.mode.startswith(("I", "F")):
        return f"pixels of 8 bits are needed; got mode {picture.mode}"
    picture = picture.convert("RGB")  # decodes all of it, and raises if the file ends early
    longest = max(picture.size)
    if encoding.max_resolution is not None and longest > encoding.max_resolution:
        width, height = (
            max(1, round(side * encoding.max_resolution / longest)) for side in picture.size
        )
        picture = picture.resize((width, height), Image.Resampling.BOX)
    width, height = picture.size
    if max(width, height) > 65535:
        return f"a side must be at most 65535 pixels; got {width}x{height}"
    attributes = {"mode": JPG if as_jpg else RAW, "height": height, "width": width}
    if not as_jpg:
        return Encoded(picture.tobytes(), attributes, {"raw": 1})
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=encoding.quality)
    return Encoded(buffer.getvalue(), attributes, {"jpg": 1})


def _ffcv_decodes(content: bytes, height: int, width: int) -> bool:
    """Whether the decoder of training runs accepts this JPEG without an error or a warning.

    A run stops at both.
    """
    pixels = np.empty((height, width, 3), np.uint8)
    memory = pixels.ctypes.data_as(ctypes.c_void_p)
    whole_image = (height, width, 0, 0, 1, 1, False, False)
    return _ffcv_imdecode()(content, len(content), height, width, memory, *whole_image) == 0


@cache
def _ffcv_imdecode() -> Callable[..., int]:
    """`imdecode` of FFCV's library, loaded without the package.

    The package would import torch and numba in each worker, which takes seconds.
    """
    library = next(Path(str(distribution("ffcv").locate_file("ffcv"))).glob("_libffcv*.so"))
    function = ctypes.CDLL(str(library)).imdecode
    two_integers = [ctypes.c_uint32] * 2
    function.argtypes = [  # in 1.0.2
        ctypes.c_char_p,  # JPEG
        ctypes.c_uint64,  # its bytes
        *two_integers,  # height and width
        ctypes.c_void_p,  # pixels
        *two_integers,  # height and width of the crop
        *two_integers,  # x and y of the crop
        *two_integers,  # numerator and denominator of the scale
        ctypes.c_bool,  # whether to crop
        ctypes.c_bool,  # whether to flip
    ]
    return function


def write_fashion(
    out: Path,
    *,
    workers: int = 1,
    source: Path | None = None,
    progress: Progress | None = None,
    existing: Existing = "refuse",
) -> list[Manifest]:
    """Write Fashion-MNIST: 60000 + 10000 grey images of 28x28.

    They are stored raw with three equal channels, because FFCV stores only RGB.

    Args:
        source: a folder with the set's four files; None: Debian's package dataset-fashion-mnist,
            else torchvision's download.
        existing: as in `write_sets`.

    Raises:
        DataError: no source is available, or a file of the source is missing or damaged; also as
            `write_sets`.
        LoaderError: as `write_sets`.
    """
    return write_sets(
        fashion_sets(source),
        Path(out),
        Encoding(mode="raw"),
        workers=workers,
        progress=progress,
        existing=existing,
    )


def write_folder(
    source: Path,
    out: Path,
    *,
    mode: Literal["jpg", "raw", "mixed"] = "jpg",
    max_resolution: int | None = None,
    quality: int | None = None,
    workers: int = 1,
    max_bad: int = 0,
    progress: Progress | None = None,
    existing: Existing = "refuse",
) -> list[Manifest]:
    """Write images in ImageNet's layout: `source/train/<class>/*` and `source/val/<class>/*`.

    Args:
        mode: "jpg" stores every image as JPEG, unchanged where possible (see the head of the file);
            "raw" stores pixels; "mixed" stores half of the images as "jpg" does and half as "raw"
            does.
        max_resolution: pixels of the longer side; larger images are shrunk.
        quality: of the JPEGs that Pillow encodes; None: 90.
        max_bad, existing: as in `write_sets`.

    Raises:
        DataError: an option has no effect, a folder is missing or empty, or the classes of the two
            sets differ; also as `write_sets`.
        LoaderError: as `write_sets`.
    """
    require_data(
        quality is None or mode != "raw",
        f"write_folder: quality has no effect in mode 'raw'; got {quality}",
    )
    return write_sets(
        folder_sets(Path(source)),
        Path(out),
        Encoding(
            mode=mode,
            max_resolution=max_resolution,
            quality=90 if quality is None else quality,
        ),
        workers=workers,
        max_bad=max_bad,
        progress=progress,
        existing=existing,
    )


def fashion_sets(source: Path | None = None) -> list[Source]:
    """Fashion-MNIST from `source`, from Debian's package, or from torchvision's download.

    Raises: DataError if no place has the set, or a file is missing or damaged.
    Source: Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747.
    """
    folder, sets = _fashion_folder(source), []
    for name, prefix in (("train", "train"), ("val", "t10k")):
        images_NHW = _read_idx(folder, f"{prefix}-images-idx3-ubyte")
        labels_N = _read_idx(folder, f"{prefix}-labels-idx1-ubyte")
        require_data(
            images_NHW.shape == (len(labels_N), 28, 28) and labels_N.max(initial=0) <= 9,
            f"write_fashion: {folder}: {prefix} must hold 28x28 images with labels 0..9; got"
            f" {images_NHW.shape}",
        )
        items = list(map(Item, range(len(labels_N)), images_NHW, labels_N.tolist()))
        sets.append(Source(name, FASHION_CLASSES, items, str(folder)))
    return sets


def folder_sets(source: Path) -> list[Source]:
    """The images `source/train/<class>/*` and `source/val/<class>/*`.

    A label is the position of a class folder in the sorted names. Images are sorted by class, then
    by name.

    Hidden files and folders, folders inside a class folder, files beside the class folders, and
    files without the suffix of an image (`IMAGE_SUFFIXES`) are omitted.

    Raises: DataError if a folder is missing or empty, or the classes of the two sets differ.
    """
    sets = [_folder_set(source / name, name) for name in ("train", "val")]
    train, val = (set(each.classes) for each in sets)
    require_data(
        train == val,
        f"write_folder: train and val of {source} must have the same classes; train alone has"
        f" {first_few(sorted(train - val)) or 'none'}, val alone"
        f" {first_few(sorted(val - train)) or 'none'}",
    )
    return sets


def _fashion_folder(source: Path | None) -> Path:
    if source is not None:
        return Path(source)
    if FASHION_PACKAGE.is_dir():
        return FASHION_PACKAGE
    try:
        from torchvision.datasets import FashionMNIST

        root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "spiketrain"
        return Path(FashionMNIST(str(root), download=True).raw_folder)
    # No torchvision, no network or a full disk: the user has the same choice in each case.
    except Exception as error:
        raise DataError(
            f"write_fashion: Fashion-MNIST is not in {FASHION_PACKAGE}, and torchvision cannot"
            f" download it ({type(error).__name__}: {error}); `apt install dataset-fashion-mnist`,"
            " or name a folder that has its files: --source"
        ) from error


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Read an array in MNIST's format, with or without gzip.

    The format is two zero bytes, 8 (uint8), the number of axes, their lengths (big-endian uint32),
    and the values.
    """
    packed, plain = folder / f"{name}.gz", folder / name
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.is_file() else plain.read_bytes()
        require_data(content[:3] == b"\0\0\x08", "no array of uint8")
        header_bytes = 4 + 4 * content[3]
        shape = np.frombuffer(content[4:header_bytes], ">u4").tolist()
        return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise DataError(
            f"write_fashion: {packed}, or {plain.name} beside it, must be a complete file in"
            f" MNIST's format; got {error}"
        ) from error


def _folder_set(folder: Path, name: str) -> Source:
    require_data(
        folder.is_dir(),
        f"write_folder: {folder.absolute()} must be a folder of class folders; it does not exist",
    )
    by_name = attrgetter("name")
    entries = sorted(os.scandir(folder), key=by_name)
    classes = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    require_data(
        classes, f"write_folder: {folder.absolute()} must hold a folder for each class; it has none"
    )
    items: list[Item] = []
    left_out: defaultdict[str, list[str]] = defaultdict(list)  # the paths of each kind of entry
    for entry in entries:
        if entry.name not in classes:
            left_out["beside the class folders"].append(entry.path)
    for label, class_name in enumerate(classes):
        before = len(items)
        for entry in sorted(os.scandir(folder / class_name), key=by_name):
            suffix = Path(entry.name).suffix.lower()
            if entry.name.startswith("."):
                left_out["hidden"].append(entry.path)
            elif not entry.is_file():
                left_out["no file"].append(entry.path)
            elif suffix not in IMAGE_SUFFIXES:
                left_out[f"suffix {suffix!r}"].append(entry.path)
            else:
                items.append(Item(len(items), Path(entry.path), label))
        require_data(
            len(items) != before,
            f"write_folder: class folder {folder / class_name} must hold images"
            f" ({' '.join(sorted(IMAGE_SUFFIXES))})",
        )
    left_out_lines = (
        f"{len(paths)} ({kind}), such as {paths[0]}" for kind, paths in sorted(left_out.items())
    )
    return Source(name, classes, items, str(folder.absolute()), tuple(left_out_lines))
