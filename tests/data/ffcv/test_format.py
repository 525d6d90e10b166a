"""The layout of a file, and where damage is found in it."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from pipeline.core import files
from pipeline.data.base import DataError
from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.events import Events
from pipeline.data.ffcv.format import read_tables
from pipeline.data.ffcv.page_checks import verify
from tests.helpers.damage import flip

DATA = {
    "photos": lambda folder: Beton(folder, classes=2, size=8),
    "moving": lambda folder: Events(folder, classes=16, steps=4, size=16),
}


@pytest.fixture(params=DATA)
def data(request, tmp_path) -> Beton | Events:
    """A copy of images and of recordings, which a test may damage."""
    return DATA[request.param](
        shutil.copytree(request.getfixturevalue(request.param), tmp_path / "data")
    )


def regions(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each region and of each page, in the file's order."""
    tables = read_tables(path)
    places = {name: (offset, size) for name, offset, size in tables.regions}
    places |= {f"page {i}": (at, tables.page_bytes) for i, at in enumerate(tables.pages)}
    return dict(sorted(places.items(), key=lambda each: each[1]))


def test_whole_files_pass_and_regions_cover_them(photos):
    path, end = photos / "train.beton", 0
    for offset, size in regions(path).values():
        assert offset == end
        end += size
    assert end == path.stat().st_size
    train, val = verify(photos)
    found = (train.samples, val.samples, train.classes, sum(train.histogram))
    assert found == (61, 13, ["china", "flower"], 61)
    assert verify(photos / "val.beton") == [val]


@pytest.mark.parametrize(
    "name", ["header", "field descriptors", "metadata", "padding", "page 0", "allocation table"]
)
def test_a_flipped_bit_is_located(data, name):
    path = data.folder / "train.beton"
    offset, size = regions(path)[name]
    flip(path, offset + size // 3)
    said = rf"train\.beton is damaged: {name} \(bytes {offset} to .* differs from its manifest"
    for look in (data.check, lambda: verify(data.folder)):
        with pytest.raises(DataError, match=said):
            look()


@pytest.mark.parametrize("times", [files.TRIES - 1, files.TRIES])
@pytest.mark.parametrize("name", ["header", "page 0", "allocation table"])
def test_a_bad_sector_is_located_once_it_stays_one(folder, name, times, monkeypatch):
    path, pread = folder / "train.beton", os.pread
    left = [OSError(errno.EIO, os.strerror(errno.EIO))] * times
    begin, _ = regions(path)[name]

    def fails(file, length, offset):
        if offset == begin and left:
            raise left.pop()
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", fails)
    monkeypatch.setattr(files, "TRY_S", 0.0)
    if times < files.TRIES:
        verify(path)
        assert not left
        return
    said = rf"train\.beton is damaged: {name} \(bytes {begin} to .* cannot be read \(Input/output"
    with pytest.raises(DataError, match=rf"{said} error\); restore"):
        verify(path)


def test_a_file_that_is_cut_short_is_refused_in_one_line(data):
    path = data.folder / "train.beton"
    whole = path.stat().st_size
    os.truncate(path, whole - 1)
    said = rf"{whole} bytes by its manifest; got {whole - 1}: truncated[^\n]*$"
    for look in (data.check, lambda: data.train(seed=5, batch_size=12, micro_batch=12)):
        with pytest.raises(DataError, match=rf"^data: \S*train\.beton must have {said}"):
            look()


@pytest.mark.parametrize(
    ("at", "content"),
    [
        ("field descriptors", bytes(400)),
        ("field descriptors", b"\x80" * 400),
        ("header", b"GIF89a" * 1000),
        ("header", b"\xff\xff"),  # the version
    ],
)
def test_damaged_beginnings_are_refused(folder, at, content):
    path = folder / "train.beton"
    whole, (first, size) = bytearray(path.read_bytes()), regions(path)[at]
    end = first + min(size, len(content))
    whole[first:end] = content[: end - first]
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"train\.beton: (no \.beton|must hold the fields)"):
        read_tables(path)


@pytest.mark.parametrize(
    ("data", "number", "type_id", "got"),
    [
        ("photos", 1, 0, r"image \(RGBImageField\), label \(FloatField\)$"),
        ("moving", 0, 3, r"array \(BytesField\), label \(IntField\)$"),
    ],
    indirect=["data"],
)
def test_a_field_of_another_type_is_refused(data, number, type_id, got):
    path = data.folder / "train.beton"
    begin, size = regions(path)["field descriptors"]
    with path.open("r+b") as file:
        file.seek(begin + number * size // 2)
        file.write(bytes([type_id]))
    with pytest.raises(DataError, match=rf"train\.beton: must hold the fields .*; got {got}"):
        read_tables(path)


def test_an_empty_file_is_no_beton(tmp_path):
    (tmp_path / "x.beton").touch()
    with pytest.raises(DataError, match=r"x\.beton: no \.beton"):
        read_tables(tmp_path / "x.beton")


def test_a_short_read_is_continued(folder, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, at: pread(file, min(length, 1000), at))
    verify(folder / "train.beton")
