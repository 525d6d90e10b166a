"""The layout of a .beton, and a writer of it whose output does not depend on how many processes
encode.

    header | field descriptors | metadata, one record a sample | zeros up to a page | pages |
    allocation table

A file holds samples of one kind, images or arrays, and a label beside each. A sample lies whole
within one page. FFCV's own writer (1.0.2) lets its worker processes race for pages, waits for ever
for one that died, and cannot store a JPEG as it is; this one is fed by a single process, in the
order of the samples. FFCV reads both.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.core.errors import DataError

PAGE_BYTES = 8 << 20  # FFCV's default
JPG, RAW = 0, 1  # FFCV's codes of how an image is stored


@dataclass(frozen=True)
class Images:
    """RGB images, each of its own size: FFCV's RGBImageField (type 2 in 1.0.2); a record is (mode,
    width, height, address).
    """

    name: ClassVar[str] = "image"
    type_id: ClassVar[int] = 2

    def field(self) -> Any:
        from pipeline.data.ffcv.api import RGBImageField

        return RGBImageField()

    def record(self, address: int, *, mode: int, height: int, width: int) -> Any:
        return mode, width, height, address

    def about(self, record: Any) -> dict[str, int]:
        """What `BetonWriter.add` was told of a sample beside its label."""
        mode, width, height, _ = record.tolist()
        return {"mode": mode, "height": height, "width": width}

    def addresses(self, records: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        return records["data_ptr"]

    def too_large(self, *, mode: int, height: int, width: int) -> str:
        return f"({width}x{height}); set max_resolution, or store it as jpg"


@dataclass(frozen=True)
class Arrays:
    """Arrays of one type and shape: FFCV's NDArrayField (type 4 in 1.0.2); a record is an address.

    `dtype` is numpy's name of it. Not uint16, of which FFCV warns whenever such a file is opened.
    """

    dtype: str
    shape: tuple[int, ...]

    name: ClassVar[str] = "array"
    type_id: ClassVar[int] = 4

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def field(self) -> Any:
        from pipeline.data.ffcv.api import NDArrayField

        return NDArrayField(np.dtype(self.dtype), self.shape)

    def record(self, address: int) -> Any:
        return address

    def about(self, record: Any) -> dict[str, int]:
        return {}

    def addresses(self, records: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        return records

    def too_large(self) -> str:
        return f"({self.dtype} {'x'.join(map(str, self.shape))})"


Kind = Images | Arrays


@dataclass(frozen=True)
class Region:
    """A run of bytes of the file."""

    name: str
    offset: int  # bytes
    size: int  # bytes


class BetonWriter:
    """Writes samples of one kind in order to `path`, which must not be in use; `finish` makes the
    file whole and durable.

    `capacity`: the most samples that may come; room for their metadata is left at the front.
    """

    def __init__(
        self, path: Path, *, capacity: int, kind: Kind = Images(), page_bytes: int = PAGE_BYTES
    ) -> None:
        from pipeline.data.ffcv.api import ALLOC_TABLE_TYPE

        self.path, self.kind, self.page_bytes, self.samples = path, kind, page_bytes, 0
        self._metadata = np.zeros(capacity, _metadata_type(kind))
        self._table = np.zeros(capacity, ALLOC_TABLE_TYPE)
        self._pages_offset = (
            -(-(_metadata_offset() + self._metadata.nbytes) // page_bytes) * page_bytes
        )
        self._page = bytearray()
        self._pages = 0  # written out
        self._file = path.open("wb")
        self._file.seek(self._pages_offset)

    def add(self, payload: bytes, *, label: int, **about: int) -> None:
        """Append one sample; of an image also its `mode`, `height` and `width`.

        Raises: DataError if it does not fit a page.
        """
        if len(payload) > self.page_bytes:
            raise DataError(
                f"write: a stored {self.kind.name} must fit a page of {self.page_bytes} bytes; "
                f"got {len(payload)} bytes {self.kind.too_large(**about)}"
            )
        if len(self._page) + len(payload) > self.page_bytes:
            self._flush()
        address = self._pages_offset + self._pages * self.page_bytes + len(self._page)
        self._page += payload
        self._metadata[self.samples] = (self.kind.record(address, **about), label)
        self._table[self.samples] = (self.samples, address, len(payload))
        self.samples += 1

    def finish(self) -> None:
        """Write what is left, the table, the metadata and the header; then wait until the disk has
        it.
        """
        from pipeline.data.ffcv.api import CURRENT_VERSION, HeaderType

        if self._page:
            self._flush()
        table_offset = self._pages_offset + self._pages * self.page_bytes
        self._file.write(self._table[: self.samples].tobytes())
        header = np.zeros((), HeaderType)
        header["version"], header["num_fields"], header["page_size"] = (
            CURRENT_VERSION,
            2,
            self.page_bytes,
        )
        header["num_samples"], header["alloc_table_ptr"] = self.samples, table_offset
        self._file.seek(0)
        self._file.write(
            header.tobytes() + _descriptors(self.kind) + self._metadata[: self.samples].tobytes()
        )
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        self._page += bytes(self.page_bytes - len(self._page))
        self._file.write(self._page)
        self._page = bytearray()
        self._pages += 1


@dataclass(frozen=True)
class Layout:
    """Where what lies in a .beton."""

    kind: Kind
    samples: int
    page_bytes: int
    front: tuple[Region, ...]  # header, field descriptors, metadata, padding (if any)
    pages: tuple[Region, ...]
    table: Region


def layout(path: Path) -> Layout:
    """The regions of a file, which cover it without gap.

    Raises: DataError if the file is not a whole .beton of images or arrays, and labels, as written
    here or by FFCV."""
    from pipeline.data.ffcv.api import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType

    size = path.stat().st_size
    if size < HeaderType.itemsize:
        raise DataError(f"{path}: not a .beton: {size} bytes are less than its header")
    header = np.fromfile(path, HeaderType, count=1)[0]
    # FFCV's counts are NumPy scalars of 16 bits, which overflow in arithmetic under NumPy 2.
    samples, page_bytes, table = (
        int(header["num_samples"]),
        int(header["page_size"]),
        int(header["alloc_table_ptr"]),
    )
    if int(header["version"]) != CURRENT_VERSION:
        raise DataError(
            f"{path}: not a .beton of version {CURRENT_VERSION}; got version"
            f" {int(header['version'])}"
        )
    if page_bytes < 1 or page_bytes & (page_bytes - 1):
        raise DataError(f"{path}: damaged header: page size must be a power of 2; got {page_bytes}")
    fields = np.fromfile(
        path, FieldDescType, count=int(header["num_fields"]), offset=HeaderType.itemsize
    )
    kind = _kind(path, fields)
    metadata_size = samples * _metadata_type(kind).itemsize
    metadata_end = _metadata_offset() + metadata_size
    lowest = -(-metadata_end // page_bytes) * page_bytes
    if table % page_bytes or table < lowest or table + samples * ALLOC_TABLE_TYPE.itemsize != size:
        raise DataError(
            f"{path}: truncated or damaged: {size} bytes, but its header places a table of"
            f" {samples} samples at {table}"
        )
    first = _first_page(path, kind, samples, page_bytes, lowest)
    front = [
        Region("header", 0, HeaderType.itemsize),
        Region("field descriptors", HeaderType.itemsize, fields.nbytes),
        Region("metadata", _metadata_offset(), metadata_size),
        Region("padding", metadata_end, first - metadata_end),
    ]
    pages = [
        Region(f"page {i}", at, page_bytes) for i, at in enumerate(range(first, table, page_bytes))
    ]
    front_regions, table_region = (
        tuple(r for r in front if r.size),
        Region("allocation table", table, size - table),
    )
    return Layout(kind, samples, page_bytes, front_regions, tuple(pages), table_region)


@dataclass(frozen=True)
class Samples:
    """The samples of a file, in index order: what FFCV records of each, addresses in the file,
    labels, and bytes in the file.
    """

    kind: Kind
    records: np.ndarray[Any, Any]
    addresses: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]


def samples(path: Path) -> Samples:
    """Raises: DataError if the file's tables contradict each other."""
    from pipeline.data.ffcv.api import ALLOC_TABLE_TYPE

    where = layout(path)
    metadata = np.fromfile(
        path, _metadata_type(where.kind), count=where.samples, offset=_metadata_offset()
    )
    addresses = where.kind.addresses(metadata["f0"])
    table = np.fromfile(path, ALLOC_TABLE_TYPE, offset=where.table.offset)
    table = table[np.argsort(table["sample_id"], kind="stable")]
    start, end = where.table.offset - where.page_bytes * len(where.pages), where.table.offset
    if (
        not np.array_equal(table["sample_id"], np.arange(where.samples))
        or not np.array_equal(table["ptr"], addresses)
        or (
            where.samples
            and (table["ptr"].min() < start or (table["ptr"] + table["size"]).max() > end)
        )
    ):
        raise DataError(f"{path}: damaged: metadata and allocation table contradict each other")
    return Samples(where.kind, metadata["f0"], addresses, metadata["f1"], table["size"])


_LABEL = ("label", 1)  # name, and FFCV's type number: IntField (1.0.2)


def _descriptors(kind: Kind) -> bytes:
    """The two field descriptors of a file, as FFCV writes them."""
    from pipeline.data.ffcv.api import FieldDescType, IntField

    fields = np.zeros(2, FieldDescType)
    for descriptor, (name, type_id), field in zip(
        fields, ((kind.name, kind.type_id), _LABEL), (kind.field(), IntField()), strict=True
    ):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        descriptor["arguments"] = field.to_binary()[0]
    return fields.tobytes()


def _kind(path: Path, fields: np.ndarray[Any, Any]) -> Kind:
    """What kind of samples a file's field descriptors speak of."""
    from pipeline.data.ffcv.api import NDArrayField

    found = [
        (bytes(field["name"]).rstrip(b"\0").decode(errors="replace"), int(field["type_id"]))
        for field in fields
    ]
    if found == [(Images.name, Images.type_id), _LABEL]:
        return Images()
    if found != [(Arrays.name, Arrays.type_id), _LABEL]:
        raise DataError(
            f"{path}: must hold the fields image or array, and label, in this order; got {found}"
        )
    try:
        field: Any = NDArrayField.from_binary(fields[0]["arguments"])
        return Arrays(field.dtype.name, tuple(int(side) for side in field.shape))
    except (
        ValueError,
        IndexError,
        TypeError,
        KeyError,
        AssertionError,
    ) as error:  # what FFCV 1.0.2 raises for bytes that say nothing
        raise DataError(
            f"{path}: damaged field descriptors: no array's type and shape ({error})"
        ) from error


def _metadata_type(kind: Kind) -> np.dtype[Any]:
    from pipeline.data.ffcv.api import IntField, get_metadata_type

    return get_metadata_type([kind.field(), IntField()])


def _metadata_offset() -> int:
    from pipeline.data.ffcv.api import FieldDescType, HeaderType

    return HeaderType.itemsize + 2 * FieldDescType.itemsize


def _first_page(path: Path, kind: Kind, samples: int, page_bytes: int, lowest: int) -> int:
    """Where the pages begin: with skipped images there is more room for metadata than samples
    use.
    """
    if not samples:
        return lowest
    metadata = np.fromfile(path, _metadata_type(kind), count=samples, offset=_metadata_offset())
    first = int(kind.addresses(metadata["f0"]).min()) // page_bytes * page_bytes
    if first < lowest:
        raise DataError(
            f"{path}: damaged metadata: a sample lies at {first}, before the first page at {lowest}"
        )
    return first
