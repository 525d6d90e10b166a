"""One sample to the bytes that a .beton stores, in this process or in several; here an image, from
a file or from memory.

A JPEG that fits `max_resolution` is stored as it is in mode "jpg", a progressive or grey one too,
provided that FFCV's decoder takes it without a warning. All else (PNG, CMYK, a JPEG with stray
bytes, one too large) is decoded by Pillow to RGB, shrunk by area averaging and encoded anew. EXIF
orientation is ignored, as torchvision's ImageFolder ignores it; pictures that have one other than
upright are counted as "not rotated".
"""

import ctypes
import io
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import PathFinder
from multiprocessing import get_context
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from typing import Literal, Protocol, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.core.errors import DataError, LoaderError
from pipeline.core.random import bits
from pipeline.data.ffcv.format import JPG, RAW, Images, Kind

CHUNK = 32  # samples a worker takes at a time


class Sample(Protocol):
    """What is to be stored; its text names it where something is wrong with it."""

    @property
    def label(self) -> int: ...


S = TypeVar("S", bound=Sample)
S_contra = TypeVar("S_contra", bound=Sample, contravariant=True)


class Encoder(Protocol[S_contra]):
    """How samples become bytes: a frozen dataclass, for its fields are kept in the manifest. Worker
    processes get a copy.
    """

    @property
    def kind(self) -> Kind: ...

    def __call__(self, sample: S_contra, /) -> "Encoded | Bad": ...


@dataclass(frozen=True)
class Encoded:
    payload: bytes
    attributes: dict[str, int]  # what the file records of it beside its label, see format.py
    counted: dict[str, int]  # what the manifest adds up over the samples
    groups: dict[str, str] = field(
        default_factory=dict
    )  # what the manifest keeps of each sample: what it belongs with


@dataclass(frozen=True)
class Bad:
    reason: str


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images are stored. `jpg_share`: the part stored as JPEG in mode "mixed", chosen by a hash
    of the image's number.
    """

    mode: Literal["jpg", "raw", "mixed"]
    max_resolution: int | None = None  # pixels of the longer side
    quality: int = 90  # of JPEGs encoded anew
    jpg_share: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in ("jpg", "raw", "mixed"):
            raise DataError(f"write: mode must be 'jpg', 'raw' or 'mixed'; got {self.mode!r}")
        if self.max_resolution is not None and self.max_resolution < 1:
            raise DataError(
                f"write: max_resolution must be 1 or more pixels; got {self.max_resolution}"
            )
        if not 1 <= self.quality <= 100:
            raise DataError(f"write: quality must be in 1..100; got {self.quality}")
        if not 0 <= self.jpg_share <= 1:
            raise DataError(f"write: jpg_share must be in 0..1; got {self.jpg_share}")

    @property
    def kind(self) -> Kind:
        return Images()

    def __call__(self, item: "Item") -> Encoded | Bad:
        return encode(item, self)


@dataclass(frozen=True)
class Item:
    """An image to encode: a file, or pixels uint8 [H,W] or [H,W,3]."""

    number: int  # among the candidates of its set
    image: "Path | np.ndarray"
    label: int

    def __str__(self) -> str:
        return str(self.image) if isinstance(self.image, Path) else f"image {self.number}"


def encode_all(
    items: Iterable[S], how: Encoder[S], *, workers: int, stall_s: float = 300.0
) -> Iterator[tuple[S, Encoded | Bad]]:
    """Encode in order, by `workers` processes (1: in this one).

    Raises: LoaderError if a worker process dies, or finishes nothing for `stall_s` seconds.
    """
    if workers == 1:
        for item in items:
            yield item, how(item)
        return
    # Spawned, not forked: this process may run threads (torch, numba), which a fork would leave in
    # an unknown state.
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=signal, initargs=(SIGINT, SIG_IGN)
    )
    pending: deque[tuple[list[S], Future[list[Encoded | Bad]]]] = deque()
    try:
        for chunk in _chunks(items):
            pending.append((chunk, pool.submit(_encode_chunk, chunk, how)))
            if len(pending) > 2 * workers:
                yield from _next(pending, stall_s)
        while pending:
            yield from _next(pending, stall_s)
    except BrokenProcessPool as error:  # from a result, or from handing out the next chunk
        waiting = f" while samples from {pending[0][0][0]} on were encoded" if pending else ""
        raise LoaderError(f"write: a worker process died{waiting}") from error
    finally:
        # CPython 3.11 to 3.13 offer no public way to end a worker that hangs; 3.14 has
        # terminate_workers().
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.kill()  # SIGTERM would not reach a stopped one
        pool.shutdown(wait=True, cancel_futures=True)


def encode(item: Item, how: Encoding) -> Encoded | Bad:
    """Encode one image; whatever is wrong with it is the reason that `Bad` gives."""
    as_jpg = how.mode == "jpg" or (
        how.mode == "mixed" and int(bits(0, 0, item.number, 0)) < how.jpg_share * 2.0**64
    )
    try:
        if isinstance(item.image, Path):
            return _encode_file(item.image, how, as_jpg)
        return _encode_picture(Image.fromarray(item.image), how, as_jpg)
    except DataError:
        raise
    except UnidentifiedImageError:  # whose text has the address of an object
        return Bad("it is no picture that Pillow can read")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # what Pillow 13.0 raises for damaged files
        return Bad(f"{type(error).__name__}: {error}")


def _encode_file(path: Path, how: Encoding, as_jpg: bool) -> Encoded | Bad:
    content = path.read_bytes()
    if not content:
        return Bad("it is empty")
    with Image.open(io.BytesIO(content)) as picture:
        width, height = picture.size
        fits = how.max_resolution is None or max(width, height) <= how.max_resolution
        if as_jpg and fits and picture.format == "JPEG" and _ffcv_decodes(content, height, width):
            encoded = _image(content, JPG, height, width, "as it is")
        else:
            encoded = _encode_picture(picture, how, as_jpg)
        if isinstance(encoded, Encoded) and not _is_upright(picture):
            encoded.counted["not rotated"] = 1
        return encoded


def _is_upright(picture: Image.Image) -> bool:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1) not in range(
            2, 9
        )  # others have no meaning
    except (SyntaxError, struct.error):  # EXIF that Pillow 13.0 cannot read
        return True


def _encode_picture(picture: Image.Image, how: Encoding, as_jpg: bool) -> Encoded | Bad:
    if picture.mode.startswith(("I", "F")):
        return Bad(f"pixels of 8 bits are needed; got mode {picture.mode}")
    picture = picture.convert("RGB")  # decodes it all: raises if the file ends early
    longest = max(picture.size)
    if how.max_resolution is not None and longest > how.max_resolution:
        width, height = (
            max(1, round(side * how.max_resolution / longest)) for side in picture.size
        )
        picture = picture.resize((width, height), Image.Resampling.BOX)
    width, height = picture.size
    if max(width, height) > 65535:
        return Bad(f"a side must be at most 65535 pixels; got {width}x{height}")
    if as_jpg:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=how.quality)
        return _image(buffer.getvalue(), JPG, height, width, "jpg")
    return _image(picture.tobytes(), RAW, height, width, "raw")


def _image(
    payload: bytes, mode: int, height: int, width: int, stored: Literal["as it is", "jpg", "raw"]
) -> Encoded:
    return Encoded(payload, {"mode": mode, "height": height, "width": width}, {stored: 1})


def _ffcv_decodes(content: bytes, height: int, width: int) -> bool:
    """Whether the decoder of the training run takes this JPEG without error or warning (the run
    treats both as damage).
    """
    pixels = np.empty((height, width, 3), np.uint8)
    sizes = (
        height,
        width,
        pixels.ctypes.data_as(ctypes.c_void_p),
        height,
        width,
        0,
        0,
        1,
        1,
        False,
        False,
    )
    return _ffcv_imdecode()(content, len(content), *sizes) == 0


@cache
def _ffcv_imdecode() -> Callable[..., int]:
    """`imdecode` of FFCV's library, found without importing the package: that takes torch and
    numba, seconds for each worker.
    """
    package = PathFinder.find_spec("ffcv")
    folders = list(package.submodule_search_locations or []) if package else []
    libraries = [file for folder in folders for file in Path(folder).glob("_libffcv*.so")]
    if not libraries:
        raise DataError(
            "write: FFCV must be installed, its decoder judges what it will read; got no"
            " ffcv/_libffcv*.so"
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


def _encode_chunk(chunk: list[S], how: Encoder[S]) -> list[Encoded | Bad]:
    return [how(item) for item in chunk]


def _chunks(items: Iterable[S]) -> Iterator[list[S]]:
    chunk: list[S] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _next(
    pending: deque[tuple[list[S], Future[list[Encoded | Bad]]]], stall_s: float
) -> Iterator[tuple[S, Encoded | Bad]]:
    chunk, future = pending.popleft()
    try:
        results = future.result(timeout=stall_s)
    except TimeoutError as error:
        raise LoaderError(
            f"write: no worker finished for {stall_s:g} s; waiting for samples {chunk[0]} to"
            f" {chunk[-1]}"
        ) from error
    yield from zip(chunk, results, strict=True)
