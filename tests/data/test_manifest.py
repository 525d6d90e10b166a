import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash

pytest.importorskip("ffcv")

from pipeline import disk
from pipeline.data import format as beton_format
from pipeline.data import manifest as manifests
from pipeline.data.base import DataError
from pipeline.data.beton import Beton
from pipeline.data.write import verify


@pytest.fixture
def folder(photos, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(photos, tmp_path / "copy")


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_whole_files_pass(photos):
    Beton(photos, classes=2, size=8).check()
    train, val = verify(photos)
    assert (train.samples, val.samples, train.classes, sum(train.histogram)) == (61, 13, ["china", "flower"], 61)
    assert verify(photos / "val.beton") == [val]


@pytest.mark.parametrize("name", ["header", "field descriptors", "metadata", "padding", "page 0", "allocation table"])
def test_a_flipped_bit_is_located(folder, name):
    path = folder / "train.beton"
    layout = beton_format.layout(path)
    region = next(each for each in (*layout.front, *layout.pages, layout.table) if each.name == name)
    flip(path, region.offset + region.size // 2)
    for look in (Beton(folder, classes=2, size=8).check, lambda: verify(folder)):
        with pytest.raises(DataError, match=rf"train\.beton: {name} \(bytes {region.offset} to .* differs from its manifest"):
            look()


@pytest.mark.parametrize("times", [disk.TRIES, 1 + disk.TRIES])  # of the open file once, and of fresh ones
@pytest.mark.parametrize("name", ["header", "page 0", "allocation table"])
def test_a_bad_sector_is_located_once_it_stays_one(folder, name, times, monkeypatch):
    path, pread, left = folder / "train.beton", os.pread, [OSError(errno.EIO, os.strerror(errno.EIO))] * times
    layout = beton_format.layout(path)
    region = next(each for each in (*layout.front, *layout.pages, layout.table) if each.name == name)

    def fails(file, length, offset):
        if offset == region.offset and left:
            raise left.pop()
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", fails)
    monkeypatch.setattr(disk, "TRY_S", 0.0)
    if times <= disk.TRIES:
        verify(path)
        assert not left
        return
    said = rf"train\.beton: {name} \(bytes {region.offset} to .* cannot be read \(Input/output error\): damaged"
    with pytest.raises(DataError, match=said):
        verify(path)


def test_a_manifest_that_cannot_be_read_is_named(folder, monkeypatch):
    read_text = Path.read_text

    def fails(self, *words, **more):
        if self.name == "train.beton.manifest.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_text(self, *words, **more)

    monkeypatch.setattr(Path, "read_text", fails)
    monkeypatch.setattr(disk, "TRY_S", 0.0)
    with pytest.raises(DataError, match=r"train\.beton\.manifest\.json cannot be read: Input/output error; restore it"):
        Beton(folder, classes=2, size=8).check()
    take_away(monkeypatch, folder)
    with pytest.raises(OSError, match="Input/output error"):
        Beton(folder, classes=2, size=8).check()


def take_away(patch, folder, number=errno.EIO):
    """What is open cannot be read any more, as of a server that is gone; names are there."""
    pread, files = os.pread, [path.stat() for path in folder.glob("*.beton")]

    def fails(file, length, offset):
        if any(os.path.samestat(os.fstat(file), each) for each in files):
            raise OSError(number, os.strerror(number))
        return pread(file, length, offset)

    patch.setattr(os, "pread", fails)
    patch.setattr(disk, "TRY_S", 0.0)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_storage_that_is_away_is_no_damage(folder, monkeypatch, number):
    take_away(monkeypatch, folder, number)
    with pytest.raises(OSError, match=os.strerror(number)):
        manifests.damaged_pages(folder / "train.beton")


def test_regions_cover_the_file(photos):
    layout = beton_format.layout(photos / "train.beton")
    end = 0
    for region in (*layout.front, *layout.pages, layout.table):
        assert region.offset == end
        end += region.size
    assert end == (photos / "train.beton").stat().st_size


def test_a_page_is_named_among_many(tmp_path):
    writer = beton_format.BetonWriter(tmp_path / "train.beton", capacity=64, page_bytes=1 << 12)
    content = manifests.ContentHash(["a"])
    for i in range(64):
        sample = {"mode": beton_format.RAW, "height": 16, "width": 16, "label": 0}
        writer.add(bytes([i]) * 768, **sample)
        content.add(bytes([i]) * 768, **sample)
    writer.finish()
    path = tmp_path / "train.beton"
    manifest = manifests.describe(path, name=path.name, content=content.hexdigest(), classes=["a"], labels=[0] * 64)
    manifest.write(tmp_path / "train.beton.manifest.json")
    assert len(manifest.pages) == 13 and verify(path) == [manifest]
    flip(path, manifest.pages_offset + 7 * 4096 + 4095)
    with pytest.raises(DataError, match=r"page 7 \(bytes "):
        manifests.check(path)


def test_the_content_hash_is_that_of_its_definition():
    """Old files keep their hash: it is part of every study's key."""
    content = manifests.ContentHash(["a", "b"])
    content.add(b"pixels", label=1, width=3, height=2, mode=0)
    about = np.array([1, 0, 2, 3], "<i8").tobytes()  # label, mode, height, width
    parts = b'["a", "b"]' + about + xxhash.xxh3_128_digest(b"pixels")
    assert content.hexdigest() == hashlib.sha256(parts).hexdigest()

    content = manifests.ContentHash(["a"], beton_format.Arrays("uint8", (2, 3)))
    content.add(b"counts", label=0)
    parts = b'["a"]{"dtype": "uint8", "shape": [2, 3]}' + bytes(8) + xxhash.xxh3_128_digest(b"counts")
    assert content.hexdigest() == hashlib.sha256(parts).hexdigest()


def test_a_truncated_file_is_refused(folder):
    with (folder / "train.beton").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(DataError, match=r"train\.beton must have \d+ bytes by its manifest; got 100000: truncated"):
        Beton(folder, classes=2, size=8).check()
    with pytest.raises(DataError, match="truncated or damaged"):
        beton_format.layout(folder / "train.beton")


def test_missing_parts_are_named(folder, tmp_path):
    (folder / "val.beton.manifest.json").unlink()
    with pytest.raises(DataError, match=r"val\.beton has no manifest val\.beton\.manifest\.json"):
        Beton(folder, classes=2, size=8).fingerprint()
    with pytest.raises(DataError, match=r"/nowhere/train\.beton does not exist"):
        Beton(tmp_path / "nowhere", classes=2, size=8).fingerprint()
    with pytest.raises(DataError, match=r"no \.beton in"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:300], "is damaged: not JSON"),
        (lambda text: text.replace('"samples": 61', '"samples": 60'), "is damaged: its own checksum differs"),
        (lambda text: '{"format": "something else"}', "is not a manifest of a .beton"),
        (lambda text: "[1, 2]", "is not a manifest of a .beton"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "is of version 2; this program reads 1"),
    ],
)
def test_a_bad_manifest_is_refused(folder, change, message):
    path = folder / "train.beton.manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        Beton(folder, classes=2, size=8).check()


def test_a_manifest_may_lack_what_has_a_default(folder):
    """Files that were written before their samples could be grouped are read."""
    path = folder / "train.beton.manifest.json"
    whole = json.loads(path.read_text())

    def written(change):
        body = {key: value for key, value in whole.items() if key != "checksum"}
        change(body)
        path.write_text(json.dumps({**body, "checksum": manifests._checksum(body)}))

    written(lambda body: body.pop("groups"))
    assert manifests.check(folder / "train.beton").groups == {}
    for change in (lambda body: body.pop("classes"), lambda body: body.update(more=1)):
        written(change)
        with pytest.raises(DataError, match=r"train\.beton\.manifest\.json is damaged"):
            manifests.check(folder / "train.beton")


def test_a_foreign_manifest_is_refused(folder):
    (folder / "val.beton.manifest.json").rename(folder / "train.beton.manifest.json")
    with pytest.raises(DataError, match=r"belongs to another file, val\.beton"):
        Beton(folder, classes=2, size=8).fingerprint()


def test_verify_compares_sha256_and_content(folder):
    path = folder / "val.beton.manifest.json"

    def forge(**change):
        body = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"} | change
        path.write_text(json.dumps({**body, "checksum": manifests._checksum(body)}))

    good = json.loads(path.read_text())
    forge(sha256="0" * 64)
    with pytest.raises(DataError, match=r"val\.beton: sha256 must be 0000"):
        verify(folder)
    forge(sha256=good["sha256"], content="1" * 64)
    with pytest.raises(DataError, match=r"val\.beton: content hash must be 1111"):
        verify(folder)


def test_something_else_is_not_a_beton(tmp_path):
    (tmp_path / "x.beton").write_bytes(b"GIF89a" * 1000)
    with pytest.raises(DataError, match=r"not a \.beton of version 2"):
        beton_format.layout(tmp_path / "x.beton")
    (tmp_path / "x.beton").write_bytes(b"")
    with pytest.raises(DataError, match=r"0 bytes are less than its header"):
        beton_format.layout(tmp_path / "x.beton")
