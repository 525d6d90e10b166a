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
from pipeline.data.ffcv.format import Region, layout
from pipeline.data.ffcv.page_checks import verify
from tests.helpers.damage import flip

SIZES = {"seed": 5, "batch_size": 12, "micro_batch": 12}
DATA = {
    "photos": lambda folder: Beton(folder, classes=2, size=8),
    "moving": lambda folder: Events(folder, classes=16, steps=4, size=16),
}


@pytest.fixture(params=DATA)
def data(request, tmp_path) -> Beton | Events:
    """A copy of images and of recordings, which a test may damage."""
    source = request.getfixturevalue(request.param)
    return DATA[request.param](shutil.copytree(source, tmp_path / "data"))


def regions(path: Path) -> list[Region]:
    found = layout(path)
    return [*found.front, *found.pages, found.table]


def region(path: Path, name: str) -> Region:
    return next(each for each in regions(path) if each.name == name)


def test_whole_files_pass_and_regions_cover_them(photos):
    path, end = photos / "train.beton", 0
    for each in regions(path):
        assert each.offset == end
        end += each.size
    assert end == path.stat().st_size
    Beton(photos, classes=2, size=8).check()
    train, val = verify(photos)
    found = (train.samples, val.samples, train.classes, sum(train.histogram))
    assert found == (61, 13, ["china", "flower"], 61)
    assert verify(photos / "val.beton") == [val]


@pytest.mark.parametrize(
    "name", ["header", "field descriptors", "metadata", "padding", "page 0", "allocation table"]
)
def test_a_flipped_bit_is_located(data, name):
    path = data.folder / "train.beton"
    found = region(path, name)
    flip(path, found.offset + found.size // 3)
    said = rf"train\.beton: {name} \(bytes {found.offset} to .* differs from its manifest"
    for look in (data.check, lambda: verify(data.folder)):
        with pytest.raises(DataError, match=said):
            look()


# Of the open file once, and of fresh ones.
@pytest.mark.parametrize("times", [files.TRIES, 1 + files.TRIES])
@pytest.mark.parametrize("name", ["header", "page 0", "allocation table"])
def test_a_bad_sector_is_located_once_it_stays_one(folder, name, times, monkeypatch):
    path, pread = folder / "train.beton", os.pread
    left = [OSError(errno.EIO, os.strerror(errno.EIO))] * times
    found = region(path, name)

    def fails(file, length, offset):
        if offset == found.offset and left:
            raise left.pop()
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", fails)
    monkeypatch.setattr(files, "TRY_S", 0.0)
    if times <= files.TRIES:
        verify(path)
        assert not left
        return
    said = rf"train\.beton: {name} \(bytes {found.offset} to .* cannot be read \(Input/output error"
    with pytest.raises(DataError, match=rf"{said}\): damaged"):
        verify(path)


def test_a_file_that_is_cut_short_is_refused_in_one_line(data):
    path = data.folder / "train.beton"
    whole = path.stat().st_size
    os.truncate(path, whole - 1)
    said = rf"{whole} bytes by its manifest; got {whole - 1}: truncated[^\n]*$"
    for look in (data.check, lambda: data.train(**SIZES)):
        with pytest.raises(DataError, match=rf"^data: \S*train\.beton must have {said}"):
            look()
    with pytest.raises(DataError, match="truncated or damaged"):
        layout(path)


def test_field_descriptors_that_say_nothing_are_refused(copy):
    path = copy / "train.beton"
    content, at = bytearray(path.read_bytes()), region(path, "field descriptors").offset
    content[at + 17 : at + 400] = bytes(383)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.beton: damaged field descriptors"):
        layout(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"GIF89a" * 1000, r"not a \.beton of version 2"), (b"", "0 bytes are less than its header")],
)
def test_something_else_is_not_a_beton(tmp_path, content, said):
    (tmp_path / "x.beton").write_bytes(content)
    with pytest.raises(DataError, match=said):
        layout(tmp_path / "x.beton")
