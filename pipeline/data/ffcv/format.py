"""The layout of a .beton, and a writer with reproducible output for any number of processes.

    header | field descriptors | metadata, one record per sample | zeros up to a page | pages |
    allocation table

A file contains samples of one kind, images or arrays, each with a label. A sample lies within one
page. A single process feeds this writer in the order of the samples. In FFCV's own writer (1.0.2),
worker processes race for pages; it waits forever for a dead one and cannot store a JPEG unchanged.
FFCV reads the files of both writers.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.core.errors import DataError, require_data

PAGE_BYTES = 8 << 20  # FFCV's default
JPG, RAW = 0, 1  # FFCV's codes for the storage of an image


def _ffcv():
    """Import the needed parts of FFCV late: they import torch and numba, which takes seconds."""
    from pipeline.data.ffcv import api

    return api


@dataclass(frozen=True)
class Images:
    """RGB images of any sizes: FFCV's RGBImageField (type 2 in 1.0.2).

    A record is (mode, width, height, address).
    """

    name: ClassVar[str] = "image"
    type_id: ClassVar[int] = 2

    def field(self) -> Any:
        return _ffcv().RGBImageField()

    def record(self, address: int, *, mode: int, height: int, width: int) -> Any:
        return mode, width, height, address

    def attributes(self, record: Any) -> dict[str, int]:
        """The attributes of a sample, which `BetonWriter.add` takes beside its label."""
        mode, width, height, _ = record.tolist()
        return {"mode": mode, "height": height, "width": width}

    def addresses(self, records: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        return records["data_ptr"]

    def too_large(self, *, mode: int, height: int, width: int) -> str:
        return f"({width}x{height}); set max_resolution, or store it as jpg"


@dataclass(frozen=True)
class Arrays:
    """Arrays of one dtype and shape: FFCV's NDArrayField (type 4 in 1.0.2). A record is an address.

    `dtype`: numpy's name. uint16 is not supported, because FFCV warns whenever such a file is
    opened.
    """

    dtype: str
    shape: tuple[int, ...]

    name: ClassVar[str] = "array"
    type_id: ClassVar[int] = 4

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def field(self) -> Any:
        return _ffcv().NDArrayField(np.dtype(self.dtype), self.shape)

    def record(self, address: int) -> Any:
        return address

    def attributes(self, record: Any) -> dict[str, int]:
        return {}

    def addresses(self, records: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        return records

    def too_large(self) -> str:
        return f"({self.dtype} {'x'.join(map(str, self.shape))})"


Kind = Images | Arrays


@dataclass(frozen=True)
class Region:
    """A contiguous part of the file."""

    name: str
    offset: int  # bytes
    size: int  # bytes


class BetonWriter:
    """Writes samples of one kind, in order, to `path`, which must not be in use.

    `finish` completes the file and syncs it to disk. `capacity` is the maximum number of samples;
    space for their metadata is reserved at the front.
    """

    def __init__(
        self, path: Path, *, capacity: int, kind: Kind = Images(), page_bytes: int = PAGE_BYTES
    ) -> None:
        self.path, self.kind, self.page_bytes, self.samples = path, kind, page_bytes, 0
        self._metadata = np.zeros(capacity, _metadata_type(kind))
        self._table = np.zeros(capacity, _ffcv().ALLOC_TABLE_TYPE)
        self._pages_offset = (
            -(-(_metadata_offset() + self._metadata.nbytes) // page_bytes) * page_bytes
        )
        self._page = bytearray()
        self._pages = 0  # pages written so far
        self._file = path.open("wb")
        self._file.seek(self._pages_offset)

    def add(self, payload: bytes, *, label: int, **attributes: int) -> None:
        """Append one sample. Images also need `mode`, `height` and `width`.

        Raises: DataError if it does not fit into a page.
        """
        if len(payload) > self.page_bytes:
            raise DataError(
                f"write: a stored {self.kind.name} must fit a page of {self.page_bytes} bytes; "
                f"got {len(payload)} bytes {self.kind.too_large(**attributes)}"
            )
        if len(self._page) + len(payload) > self.page_bytes:
            self._flush()
        address = self._pages_offset + self._pages * self.page_bytes + len(self._page)
        self._page += payload
        self._metadata[self.samples] = (self.kind.record(address, **attributes), label)
        self._table[self.samples] = (self.samples, address, len(payload))
        self.samples += 1

    def finish(self) -> None:
        """Write the last page, the table, the metadata and the header, and sync them to disk."""
        if self._page:
            self._flush()
        table_offset = self._pages_offset + self._pages * self.page_bytes
        self._file.truncate(table_offset)  # without samples, nothing has been written so far
        self._file.seek(table_offset)
        self._file.write(self._table[: self.samples].tobytes())
        header = np.zeros((), _ffcv().HeaderType)
        for name, value in (
            ("version", _ffcv().CURRENT_VERSION),
            ("num_fields", 2),
            ("page_size", self.page_bytes),
            ("num_samples", self.samples),
            ("alloc_table_ptr", table_offset),
        ):
            header[name] = value
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
    """The regions of a .beton."""

    kind: Kind
    samples: int
    page_bytes: int
    front: tuple[Region, ...]  # header, field descriptors, metadata, padding (if any)
    pages: tuple[Region, ...]
    table: Region


def layout(path: Path) -> Layout:
    """The regions of a file. They cover it without gaps.

    Raises: DataError if the file is not a complete .beton of images or arrays with labels. This
    writer and FFCV produce such files.
    """
    size, header_size = path.stat().st_size, _ffcv().HeaderType.itemsize
    require_data(
        size >= header_size, f"{path}: not a .beton: {size} bytes are less than its header"
    )
    record = np.fromfile(path, _ffcv().HeaderType, count=1)[0]
    # FFCV's counts are 16-bit NumPy scalars, which overflow in arithmetic under NumPy 2.
    header = {name: int(record[name]) for name in record.dtype.names}
    samples, page_bytes = header["num_samples"], header["page_size"]
    require_data(
        header["version"] == _ffcv().CURRENT_VERSION,
        f"{path}: not a .beton of version {_ffcv().CURRENT_VERSION}; got version"
        f" {header['version']}",
    )
    require_data(
        page_bytes.bit_count() == 1,
        f"{path}: damaged header: page size must be a power of 2; got {page_bytes}",
    )
    fields = np.fromfile(
        path, _ffcv().FieldDescType, count=header["num_fields"], offset=header_size
    )
    kind = _kind(path, fields)
    metadata_size = samples * _metadata_type(kind).itemsize
    metadata_end = _metadata_offset() + metadata_size
    lowest = -(-metadata_end // page_bytes) * page_bytes
    table, table_size = header["alloc_table_ptr"], samples * _ffcv().ALLOC_TABLE_TYPE.itemsize
    require_data(
        table % page_bytes == 0 and table >= lowest and table + table_size == size,
        f"{path}: truncated or damaged: {size} bytes, but its header places a table of"
        f" {samples} samples at {table}",
    )
    first = _first_page(path, kind, samples, page_bytes, lowest)
    front = (
        Region("header", 0, header_size),
        Region("field descriptors", header_size, fields.nbytes),
        Region("metadata", _metadata_offset(), metadata_size),
        Region("padding", metadata_end, first - metadata_end),
    )
    pages = enumerate(range(first, table, page_bytes))
    return Layout(
        kind,
        samples,
        page_bytes,
        front=tuple(region for region in front if region.size),
        pages=tuple(Region(f"page {i}", at, page_bytes) for i, at in pages),
        table=Region("allocation table", table, table_size),
    )


@dataclass(frozen=True)
class Samples:
    """The samples of a file in index order: FFCV's records, addresses, labels and byte sizes."""

    kind: Kind
    records: np.ndarray[Any, Any]
    addresses: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]


def samples(path: Path) -> Samples:
    """Read the tables of a file.

    Raises: DataError if they contradict each other; also as `layout`.
    """
    where = layout(path)
    metadata = np.fromfile(
        path, _metadata_type(where.kind), count=where.samples, offset=_metadata_offset()
    )
    addresses = where.kind.addresses(metadata["f0"])
    table = np.fromfile(path, _ffcv().ALLOC_TABLE_TYPE, offset=where.table.offset)
    table = table[np.argsort(table["sample_id"], kind="stable")]
    start, end = where.table.offset - where.page_bytes * len(where.pages), where.table.offset
    require_data(
        np.array_equal(table["sample_id"], np.arange(where.samples))
        and np.array_equal(table["ptr"], addresses)
        and (
            not where.samples
            or (table["ptr"].min() >= start and (table["ptr"] + table["size"]).max() <= end)
        ),
        f"{path}: damaged: metadata and allocation table contradict each other",
    )
    return Samples(where.kind, metadata["f0"], addresses, metadata["f1"], table["size"])


_LABEL = ("label", 1)  # the name, and FFCV's type number of an IntField (1.0.2)


def _descriptors(kind: Kind) -> bytes:
    """The two field descriptors of a file, as FFCV writes them."""
    fields = np.zeros(2, _ffcv().FieldDescType)
    for descriptor, (name, type_id), field in zip(
        fields, ((kind.name, kind.type_id), _LABEL), (kind.field(), _ffcv().IntField()), strict=True
    ):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        descriptor["arguments"] = field.to_binary()[0]
    return fields.tobytes()


def _kind(path: Path, fields: np.ndarray[Any, Any]) -> Kind:
    """The kind of samples that a file's field descriptors declare."""
    found = [
        (bytes(field["name"]).rstrip(b"\0").decode(errors="replace"), int(field["type_id"]))
        for field in fields
    ]
    if found == [(Images.name, Images.type_id), _LABEL]:
        return Images()
    require_data(
        found == [(Arrays.name, Arrays.type_id), _LABEL],
        f"{path}: must hold the fields image or array, and label, in this order; got {found}",
    )
    try:
        field: Any = _ffcv().NDArrayField.from_binary(fields[0]["arguments"])
        return Arrays(field.dtype.name, tuple(int(side) for side in field.shape))
    # FFCV 1.0.2 raises these for meaningless bytes.
    except (ValueError, IndexError, TypeError, KeyError, AssertionError) as error:
        raise DataError(
            f"{path}: damaged field descriptors: no array's type and shape ({error})"
        ) from error


def _metadata_type(kind: Kind) -> np.dtype[Any]:
    return _ffcv().get_metadata_type([kind.field(), _ffcv().IntField()])


def _metadata_offset() -> int:
    return _ffcv().HeaderType.itemsize + 2 * _ffcv().FieldDescType.itemsize


def _first_page(path: Path, kind: Kind, samples: int, page_bytes: int, lowest: int) -> int:
    """The offset of the pages. If images were skipped, some reserved metadata is unused."""
    if not samples:
        return lowest
    metadata = np.fromfile(path, _metadata_type(kind), count=samples, offset=_metadata_offset())
    first = int(kind.addresses(metadata["f0"]).min()) // page_bytes * page_bytes
    if first < lowest:
        raise DataError(
            f"{path}: damaged metadata: a sample lies at {first}, before the first page at {lowest}"
        )
    return first
