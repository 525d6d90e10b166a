"""The layout of a .beton, and a writer with reproducible output for any number of processes.

    header | field descriptors | metadata, one record per sample | zeros up to a page | pages |
    allocation table

A file contains samples of one kind, images or arrays, each with a label. Each sample is inside one
page. One process passes the samples to this writer in order. In FFCV's own writer (1.0.2), worker
processes race for pages. That writer waits forever for a dead worker, and cannot store a JPEG
unchanged. FFCV reads the files of both writers.
"""

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.core.errors import DataError, require_data

PAGE_BYTES = 8 << 20  # FFCV's default
JPG, RAW = 0, 1  # FFCV's codes for the storage of an image
# FFCV 1.0.2 raises these for damaged headers and field descriptors.
_DAMAGED = (AssertionError, LookupError, MemoryError, OverflowError, TypeError, ValueError)
_LABEL, _LABEL_ID = "label", 1  # the name, and FFCV's type number of an IntField (1.0.2)
_FIELDS = ("image (RGBImageField), label (IntField)", "array (NDArrayField), label (IntField)")


def _ffcv():
    """Import FFCV when it is first needed: it imports torch and numba, which takes seconds."""
    from pipeline.data.ffcv import api

    return api


@dataclass(frozen=True)
class Images:
    """RGB images of any sizes: FFCV's RGBImageField (type 2 in 1.0.2).

    An image's record is (mode, width, height, address).
    """

    name: ClassVar[str] = "image"
    type_id: ClassVar[int] = 2

    def field(self) -> Any:
        return _ffcv().RGBImageField()


@dataclass(frozen=True)
class Arrays:
    """Arrays of one dtype and shape: FFCV's NDArrayField (type 4 in 1.0.2).

    An array's record is its address. `dtype`: numpy's name of the type. No writer uses uint16,
    because FFCV warns whenever such a file is opened.
    """

    dtype: str
    shape: tuple[int, ...]

    name: ClassVar[str] = "array"
    type_id: ClassVar[int] = 4

    def field(self) -> Any:
        return _ffcv().NDArrayField(np.dtype(self.dtype), self.shape)


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
        record = _ffcv().get_metadata_type([kind.field(), _ffcv().IntField()])
        self._metadata = np.zeros(capacity, record)
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
            np.array(
                (_ffcv().CURRENT_VERSION, 2, self.page_bytes, self.samples, table_offset),
                _ffcv().HeaderType,
            ).tobytes()
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


def read_tables(path: Path) -> Tables:
    """Read everything but the pages of a complete file from this writer or FFCV's.

    FFCV's reader accepts some damaged bytes; `page_checks` finds them.

    Raises:
        DataError: the file is no .beton, its header or field descriptors are damaged, or its fields
            are neither image and label nor array and label.
        OSError: the storage fails.
    """
    try:
        reader = _ffcv().Reader(str(path))
    except (*_DAMAGED, OSError) as error:
        # EINVAL: the header has an impossible table offset
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise DataError(
            f"{path}: no .beton, or its header or field descriptors are damaged"
            f" ({type(error).__name__}: {error})"
        ) from error
    fields = ", ".join(f"{name} ({type(each).__name__})" for name, each in reader.handlers.items())
    require_data(
        fields in _FIELDS, f"{path}: must hold the fields {' or '.join(_FIELDS)}; got {fields}"
    )
    field = next(iter(reader.handlers.values()))
    kind = (
        Images() if fields == _FIELDS[0] else Arrays(field.dtype.name, tuple(map(int, field.shape)))
    )
    table = reader.alloc_table[np.argsort(reader.alloc_table["sample_id"], kind="stable")]
    records = reader.metadata["f0"]
    addresses = records["data_ptr"] if isinstance(kind, Images) else records
    # Python's integers do not overflow; FFCV's do under NumPy 2.
    page_bytes, table_offset = int(reader.page_size), int(reader.header["alloc_table_ptr"])
    require_data(
        page_bytes.bit_count() == 1,
        f"{path}: damaged header: the page size must be a power of 2; got {page_bytes} bytes",
    )
    # A writer that skipped samples has reserved more metadata, so pages may begin after a gap.
    pages_offset = (
        int(addresses.min()) // page_bytes * page_bytes if len(addresses) else table_offset
    )
    header_size, metadata_offset = _ffcv().HeaderType.itemsize, _metadata_offset()
    metadata_end = metadata_offset + reader.metadata.nbytes
    regions = (
        ("header", 0, header_size),
        ("field descriptors", header_size, metadata_offset - header_size),
        ("metadata", metadata_offset, metadata_end - metadata_offset),
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
        labels=reader.metadata["f1"],
        sizes=table["size"],
    )


def _descriptors(kind: Kind) -> bytes:
    descriptors = np.zeros(2, _ffcv().FieldDescType)
    fields = ((kind.name, kind.type_id, kind.field()), (_LABEL, _LABEL_ID, _ffcv().IntField()))
    for descriptor, (name, type_id, field) in zip(descriptors, fields, strict=True):
        descriptor["type_id"] = type_id
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
        descriptor["arguments"] = field.to_binary()[0]
    return descriptors.tobytes()


def _metadata_offset() -> int:
    return _ffcv().HeaderType.itemsize + 2 * _ffcv().FieldDescType.itemsize
