"""Writes image sets: Fashion-MNIST from its four files, or pictures in a folder for each class.

An image that is stored as JPEG keeps its bytes if it is a JPEG (also a progressive or grey one)
that fits `max_resolution`, that the decoder of runs accepts without a warning, and that needs no
rotation. Pillow decodes all other images (PNG, CMYK, a JPEG with stray bytes or too large) to RGB,
and shrinks them by area averaging if they are too large. They are then stored as a new JPEG or as
raw pixels. Of 16 bits the upper 8 are stored, of several frames the first. Transparency is dropped,
as in torchvision's ImageFolder.
"""

import ctypes
import gzip
import io
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import distribution
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pipeline.core.code_version import NOT_INSTALLED, installed_version
from pipeline.core.errors import DataError, require_data
from pipeline.core.files import cache_folder
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
# A file with one of these suffixes counts as unreadable if Pillow cannot read it. A file with
# another suffix is then left out.
IMAGE_SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png"),
    *(".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
# Pillow 13.0 raises these for damaged files and for files that are no images.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)


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
    """Encodes pixels as JPEG or raw pixels.

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
            return self._encode(item.image, as_jpg)
        except UnidentifiedImageError:
            return "it is no picture that Pillow can read"
        except PILLOW_ERRORS as error:
            return f"{type(error).__name__}: {error}"

    def _encode(self, image: Any, as_jpg: bool) -> Encoded | str:
        return _encode_picture(Image.fromarray(image), self, as_jpg)


@dataclass(frozen=True, kw_only=True)
class FileEncoding(Encoding):
    """Encodes files in the same way.

    `exif`: "apply" rotates and mirrors a picture by its EXIF orientation, and counts it as
    "rotated". "ignore" stores the pixels as they are in the file, as torchvision's ImageFolder
    does, and counts the picture as "not rotated". Pillow 13.0 always applies the orientation of a
    TIFF.
    """

    exif: Literal["apply", "ignore"]

    def _encode(self, image: Any, as_jpg: bool) -> Encoded | str:
        with Image.open(image) as picture:
            width, height = picture.size
            fits = self.max_resolution is None or max(width, height) <= self.max_resolution
            is_rotated = self.exif == "apply" and _orientation(picture) != 1
            may_keep_bytes = as_jpg and fits and not is_rotated and picture.format == "JPEG"
            content = image.read_bytes() if may_keep_bytes else b""
            if may_keep_bytes and _ffcv_decodes(content, height, width):
                attributes = {"mode": JPG, "height": height, "width": width}
                encoded = Encoded(content, attributes, {"as it is": 1})
            else:
                upright = ImageOps.exif_transpose(picture) if is_rotated else picture
                encoded = _encode_picture(upright, self, as_jpg)
            if isinstance(encoded, Encoded) and (is_rotated or _orientation(picture) != 1):
                encoded.counts["rotated" if is_rotated else "not rotated"] = 1
            return encoded


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none, or one without meaning."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, struct.error):  # EXIF that Pillow 13.0 cannot read
        return 1
    return orientation if orientation in range(1, 9) else 1


def _encode_picture(picture: Image.Image, encoding: Encoding, as_jpg: bool) -> Encoded | str:
    if picture.mode == "F":
        return "pixels of 8 or 16 bits are needed; got floats"
    if picture.mode.startswith("I"):
        levels_HW = np.asarray(picture)
        if levels_HW.min() < 0 or levels_HW.max() > 65535:
            return f"pixels of at most 16 bits are needed; got levels up to {levels_HW.max()}"
        picture = Image.fromarray((levels_HW >> 8).astype(np.uint8))
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

    A run stops at both. Where FFCV is not installed, Pillow decodes in runs, and raises here. FFCV
    refuses CMYK, so such a file would stop a run on another machine.
    """
    if installed_version("ffcv") == NOT_INSTALLED:
        picture = Image.open(io.BytesIO(content))
        picture.load()
        return picture.mode in ("RGB", "L")
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
    exif: Literal["apply", "ignore"] = "apply",
    val: float | None = None,
    workers: int = 1,
    max_unreadable: float = 0.0,
    progress: Progress | None = None,
    existing: Existing = "refuse",
) -> list[Manifest]:
    """Write images in ImageNet's layout, or from one folder of class folders (`folder_sets`).

    Args:
        mode: "jpg" stores every image as JPEG, unchanged where possible (see the head of the file);
            "raw" stores pixels; "mixed" stores half of the images as "jpg" does and half as "raw"
            does.
        max_resolution: pixels of the longer side; larger images are shrunk.
        quality: of the JPEGs that Pillow encodes; None: 90.
        exif: see FileEncoding.
        val: as in `folder_sets`.
        max_unreadable, existing: as in `write_sets`.

    Raises:
        DataError: an option is unknown or has no effect; also as `folder_sets` and `write_sets`.
        LoaderError: as `write_sets`.
    """
    require_data(
        (quality is None or mode != "raw") and exif in ("apply", "ignore"),
        "write_folder: exif must be 'apply' or 'ignore', and quality has no effect in mode 'raw';"
        f" got exif={exif!r}, quality={quality}, mode={mode!r}",
    )
    return write_sets(
        folder_sets(Path(source), val),
        Path(out),
        FileEncoding(
            mode=mode,
            max_resolution=max_resolution,
            quality=90 if quality is None else quality,
            exif=exif,
        ),
        workers=workers,
        max_unreadable=max_unreadable,
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


def folder_sets(source: Path, val: float | None = None) -> list[Source]:
    """The images in the class folders of `source/train` and `source/val`, or of `source`.

    A label is the position of a class folder in the sorted names. The images of a class are all
    pictures in its folder and its subfolders, by name. Hidden entries, links to folders, and files
    that are no pictures are left out.

    Args:
        val: None: the sets are in `source/train` and `source/val`. Else the class folders are in
            `source`, and about this share of each class is for evaluation: the images with the
            lowest hashes of their files. So the split depends on no file's name, and copies of an
            image are in the same set.

    Raises: DataError if a folder is missing or empty, the classes of the two sets differ, `val` is
        out of range or has no effect, or a class cannot be split.
    """
    parts = ("train", "val")
    if val is not None:
        require_data(
            0 < val < 1 and not any((source / part).is_dir() for part in parts),
            "write_folder: val must be a share in 0..1, both excluded, of class folders; it has no"
            f" effect on the folders train and val; got {val} of {source}",
        )
        return _split_by_content(_read_classes(source, "train"), val)
    sets = [_read_classes(source / part, part) for part in parts]
    train, val_classes = (set(each.classes) for each in sets)
    require_data(
        train == val_classes,
        f"write_folder: train and val of {source} must have the same classes; train alone has"
        f" {first_few(sorted(train - val_classes)) or 'none'}, val alone"
        f" {first_few(sorted(val_classes - train)) or 'none'}",
    )
    return sets


def _fashion_folder(source: Path | None) -> Path:
    if source is not None:
        return Path(source)
    if FASHION_PACKAGE.is_dir():
        return FASHION_PACKAGE
    try:
        from torchvision.datasets import FashionMNIST

        return Path(FashionMNIST(str(cache_folder()), download=True).raw_folder)
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


def _read_classes(folder: Path, name: str) -> Source:
    require_data(
        folder.is_dir(),
        f"write_folder: {folder.absolute()} must be a folder of class folders; it does not exist;"
        " to split one folder of class folders, use --val 0.1",
    )
    entries = sorted(os.scandir(folder), key=attrgetter("name"))
    classes = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    require_data(
        classes, f"write_folder: {folder.absolute()} must hold a folder for each class; it has none"
    )
    left_out = [
        {"image": entry.path, "reason": "beside the class folders"}
        for entry in entries
        if entry.name not in classes
    ]
    items: list[Item] = []
    for label, class_name in enumerate(classes):
        before = len(items)
        for path, reason in files_in(folder / class_name):
            if reason:
                left_out.append({"image": str(path), "reason": reason})
            else:
                items.append(Item(len(items), path, label))
        require_data(
            len(items) != before,
            f"write_folder: class folder {folder / class_name} must hold images; it has none",
        )
    return Source(name, classes, items, str(folder.absolute()), left_out)


def files_in(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files of a folder and its subfolders, each with the reason to leave it out, or ""."""
    for entry in sorted(os.scandir(folder), key=attrgetter("name")):
        path = Path(entry.path)
        if entry.name.startswith("."):
            yield path, "hidden"
        elif entry.is_dir(follow_symlinks=False):
            yield from files_in(path)
        elif not entry.is_file():  # links to folders may form a ring
            yield path, "a link to a folder" if entry.is_dir() else "no file"
        elif path.suffix.lower() not in IMAGE_SUFFIXES and not _is_picture(path):
            yield path, "it is no picture that Pillow can read"
        else:
            yield path, ""


def _is_picture(path: Path) -> bool:
    try:
        Image.open(path).close()
    except UnidentifiedImageError:
        return False
    except PILLOW_ERRORS:
        return True  # the encoder names the error
    return True


def _split_by_content(whole: Source, val: float) -> list[Source]:
    digests = [_content_digest(item.image) for item in whole.items]
    of_class: defaultdict[int, set[bytes]] = defaultdict(set)
    for item, digest in zip(whole.items, digests, strict=True):
        of_class[item.label].add(digest)
    is_val: dict[bytes, bool] = {}
    for label, own in of_class.items():
        require_data(
            len(own) > 1,
            f"write_folder: class {whole.classes[label]!r} must hold 2 or more different images to"
            " be split; got 1",
        )
        wanted = min(max(1, round(val * len(own))), len(own) - 1)
        # A copy in an earlier class has decided the part of an image.
        wanted -= sum(is_val.get(digest, False) for digest in own)
        for position, digest in enumerate(sorted(own - is_val.keys())):
            is_val[digest] = position < wanted
    parts: tuple[list[Item], list[Item]] = ([], [])
    for item, digest in zip(whole.items, digests, strict=True):
        part = parts[is_val[digest]]
        part.append(replace(item, number=len(part)))
    origin = f"{whole.origin}, {val:g} of each class for evaluation"
    return [
        Source("train", whole.classes, parts[0], origin, whole.left_out),
        Source("val", whole.classes, parts[1], origin),
    ]


def _content_digest(path: Path) -> bytes:
    try:
        return xxhash.xxh3_128_digest(path.read_bytes())
    except OSError:
        return b""  # the encoder names the error
