"""The layout of a .beton, and a writer with reproducible output for any number of processes.

    header | field descriptors | metadata, one record per sample | zeros up to a page | pages |
    allocation table

A file contains samples of one kind, images or arrays, each with a label. Each sample is inside one
page. One process passes the samples to this writer in order. In FFCV's own writer (1.0.2), worker
processes race for pages. That writer waits forever for a dead worker, and cannot store a JPEG
unchanged. FFCV reads the files of both writers. This module needs no FFCV.

Source: FFCV 1.0.2, `ffcv.types` and `ffcv.fields`, for the layout.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.core.checks import require
from pipeline.core.errors import DataError, require_data

PAGE_BYTES = 8 << 20  # FFCV's default
JPG, RAW = 0, 1  # FFCV's codes for the storage of an image
VERSION = 2  # of the layout
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
_DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
_TABLE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_TYPES = (  # FFCV's fields by their number
    *("FloatField", "IntField", "RGBImageField", "BytesField", "NDArrayField", "JSONField"),
    "TorchTensorField",
)
_METADATA_OFFSET = _HEADER.itemsize + 2 * _DESCRIPTOR.itemsize
_LABEL, _LABEL_ID = "label", 1
_FIELDS = ("image (RGBImageField), label (IntField)", "array (NDArrayField), label (IntField)")
# Damaged headers and field descriptors raise these.
_DAMAGED = (LookupError, MemoryError, OverflowError, TypeError, ValueError)


@dataclass(frozen=True)
class Images:
    """RGB images of any sizes: FFCV's RGBImageField."""

    name: ClassVar[str] = "image"
    type_id: ClassVar[int] = 2
    record: ClassVar[np.dtype] = np.dtype(
        [("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]
    )

    def arguments(self) -> bytes:
        return b""


@dataclass(frozen=True)
class Arrays:
    """Arrays of one dtype and shape: FFCV's NDArrayField.

    An array's record is its address. `dtype`: numpy's name of the type. No writer uses uint16,
    because FFCV warns whenever such a file is opened.
    """

    dtype: str
    shape: tuple[int, ...]

    name: ClassVar[str] = "array"
    type_id: ClassVar[int] = 4
    record: ClassVar[np.dtype] = np.dtype("<u8")

    def arguments(self) -> bytes:
        """The shape with zeros up to 32 axes, the length of the type's JSON, the JSON."""
        type_json = json.dumps(np.dtype(self.dtype).descr).encode()
        lengths = np.zeros(33, "<u8")
        lengths[: len(self.shape)], lengths[32] = self.shape, len(type_json)
        return lengths.tobytes() + type_json

    @classmethod
    def from_arguments(cls, arguments: bytes) -> "Arrays":
        lengths = np.frombuffer(arguments, "<u8", 33).tolist()
        [(_, dtype)] = json.loads(arguments[264 : 264 + lengths[32]])
        return cls(np.dtype(dtype).name, tuple(lengths[: lengths.index(0)]))


Kind = Images | Arrays


class BetonWriter:
    """Writes samples of one kind, in order, to `path`. An existing file is overwritten.

    `finish` completes the file and syncs it to disk. `capacity` is the maximum number of samples.
    Space for their metadata is reserved at the front.
    """

    def __init__(
        self, path: Path, *, capacity: int, kind: Kind = Images(), page_bytes: int = PAGE_BYTES
    ) -> None:
        self.path, self.kind, self.page_bytes, self.samples = path, kind, page_bytes, 0
        self._metadata = np.zeros(capacity, _metadata_type(kind))
        self._table = np.zeros(capacity, _TABLE)
        self._pages_offset = (
            -(-(_METADATA_OFFSET + self._metadata.nbytes) // page_bytes) * page_bytes
        )
        self._page = bytearray()
        self._pages = 0  # pages written so far
        self._file = path.open("wb")
        self._file.seek(self._pages_offset)

    def add(self, payload: bytes, *, label: int, **attributes: int) -> None:
        """Append one sample. Images also need `mode`, `height` and `width`.

        Raises: DataError if the payload is larger than a page.
        """
        is_image = isinstance(self.kind, Images)
        require_data(
            len(payload) <= self.page_bytes,
            f"write: a stored {self.kind.name} must fit a page of {self.page_bytes} bytes; got"
            f" {len(payload)} bytes; "
            + ("set max_resolution, or store it as jpg" if is_image else "store fewer slices"),
        )
        if len(self._page) + len(payload) > self.page_bytes:
            self._flush()
        record = address = self._pages_offset + self._pages * self.page_bytes + len(self._page)
        self._page += payload
        if is_image:
            record = (attributes["mode"], attributes["width"], attributes["height"], address)
        self._metadata[self.samples] = (record, label)
        self._table[self.samples] = (self.samples, address, len(payload))
        self.samples += 1

    def finish(self) -> None:
        """Write the last page, then all parts that are not pages. Sync and close the file."""
        if self._page:
            self._flush()
        table_offset = self._pages_offset + self._pages * self.page_bytes
        self._file.truncate(table_offset)  # without samples, the file is still empty
        self._file.seek(table_offset)
        self._file.write(self._table[: self.samples].tobytes())
        self._file.seek(0)
        self._file.write(
            np.array((VERSION, 2, self.page_bytes, self.samples, table_offset), _HEADER).tobytes()
            + _descriptors(self.kind)
            + self._metadata[: self.samples].tobytes()
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
class Tables:
    """The regions and pages of a .beton, and the entries of its samples in index order.

    A region is a part of the file that is not a page. Pages and regions cover the file without
    gaps.
    """

    kind: Kind
    page_bytes: int
    pages: range  # the offset of each page
    regions: list[tuple[str, int, int]]  # name, offset, bytes
    records: np.ndarray[Any, Any]  # of the image or array field, as FFCV stores them
    addresses: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    sizes: np.ndarray[Any, Any]  # in bytes

    def payload(self, file: np.ndarray[Any, Any], number: int) -> bytes:
        """The stored bytes of a sample. `file`: the bytes of the file."""
        start = self.addresses[number]
        return file[start : start + self.sizes[number]].tobytes()


def read_tables(path: Path) -> Tables:
    """Read everything but the pages of a complete file from this writer or FFCV's.

    Some damaged bytes are accepted; `page_checks` finds them.

    Raises:
        DataError: the file is no .beton, its header or field descriptors are damaged, or its fields
            are neither image and label nor array and label.
        OSError: the storage fails.
    """
    with _naming_damage(path):
        header = np.fromfile(path, _HEADER, 1)[0].tolist()  # Python's integers do not overflow
        version, num_fields, page_bytes, samples, table_offset = header
        require(version == VERSION, f"the version must be {VERSION}; got {version}")
        descriptors = np.fromfile(path, _DESCRIPTOR, num_fields, offset=_HEADER.itemsize)
        fields = ", ".join(
            f"{name.decode(errors='replace')} ({_TYPES[type_id]})"
            for type_id, name, _ in descriptors.tolist()
        )
    require_data(
        fields in _FIELDS, f"{path}: must hold the fields {' or '.join(_FIELDS)}; got {fields}"
    )
    with _naming_damage(path):
        kind = (
            Images()
            if fields == _FIELDS[0]
            else Arrays.from_arguments(descriptors["arguments"][0].tobytes())
        )
        metadata = np.fromfile(path, _metadata_type(kind), samples, offset=_METADATA_OFFSET)
        table = np.fromfile(path, _TABLE, offset=table_offset)
    table = table[np.argsort(table["sample_id"], kind="stable")]
    records = metadata["f0"]
    addresses = records["data_ptr"] if isinstance(kind, Images) else records
    require_data(
        page_bytes.bit_count() == 1,
        f"{path}: damaged header: the page size must be a power of 2; got {page_bytes} bytes",
    )
    # A writer that skipped samples has reserved more metadata, so pages may begin after a gap.
    pages_offset = (
        int(addresses.min()) // page_bytes * page_bytes if len(addresses) else table_offset
    )
    metadata_end = _METADATA_OFFSET + metadata.nbytes
    regions = (
        ("header", 0, _HEADER.itemsize),
        ("field descriptors", _HEADER.itemsize, _METADATA_OFFSET - _HEADER.itemsize),
        ("metadata", _METADATA_OFFSET, metadata.nbytes),
        ("padding", metadata_end, pages_offset - metadata_end),
        ("allocation table", table_offset, table.nbytes),
    )
    return Tables(
        kind,
        page_bytes,
        pages=range(pages_offset, table_offset, page_bytes),
        regions=[region for region in regions if region[2]],
        records=records,
        addresses=addresses,
        labels=metadata["f1"],
        sizes=table["size"],
    )


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (*_DAMAGED, OSError) as error:
        # EINVAL: the header has an impossible table offset
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise DataError(
            f"{path}: no .beton, or its header or field descriptors are damaged"
            f" ({type(error).__name__}: {error})"
        ) from error


def _descriptors(kind: Kind) -> bytes:
    fields = [
        (kind.type_id, kind.name.encode(), kind.arguments()),
        (_LABEL_ID, _LABEL.encode(), b""),
    ]
    return np.array(fields, _DESCRIPTOR).tobytes()


def _metadata_type(kind: Kind) -> np.dtype:
    return np.dtype([("f0", kind.record), ("f1", "<i8")], align=True)
