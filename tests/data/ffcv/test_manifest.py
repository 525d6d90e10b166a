import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash

from pipeline.core import files
from pipeline.data.base import DataError
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv import format as beton_format
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.page_checks import check, verify
from tests.helpers.damage import fail_reads


@pytest.fixture
def folder(photos, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(photos, tmp_path / "copy")


def test_a_manifest_that_cannot_be_read_is_named(folder, monkeypatch):
    read_text = Path.read_text

    def fails(self, *words, **more):
        if self.name == "train.beton.manifest.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_text(self, *words, **more)

    monkeypatch.setattr(Path, "read_text", fails)
    monkeypatch.setattr(files, "TRY_S", 0.0)
    with pytest.raises(
        DataError,
        match=r"train\.beton\.manifest\.json cannot be read: Input/output error; restore it",
    ):
        Beton(folder, classes=2, size=8).check()
    fail_reads(monkeypatch, *folder.glob("*.beton"))
    with pytest.raises(OSError, match="Input/output error"):
        Beton(folder, classes=2, size=8).check()


def test_regions_cover_the_file(photos):
    layout = beton_format.layout(photos / "train.beton")
    end = 0
    for region in (*layout.front, *layout.pages, layout.table):
        assert region.offset == end
        end += region.size
    assert end == (photos / "train.beton").stat().st_size


def test_the_content_hash_is_that_of_its_definition():
    """Old files keep their hash: it is part of every study's key."""
    content = manifests.ContentHash(["a", "b"])
    content.add(b"pixels", label=1, width=3, height=2, mode=0)
    about = np.array([1, 0, 2, 3], "<i8").tobytes()  # label, mode, height, width
    parts = b'["a", "b"]' + about + xxhash.xxh3_128_digest(b"pixels")
    assert content.hexdigest() == hashlib.sha256(parts).hexdigest()

    content = manifests.ContentHash(["a"], beton_format.Arrays("uint8", (2, 3)))
    content.add(b"counts", label=0)
    parts = (
        b'["a"]{"dtype": "uint8", "shape": [2, 3]}' + bytes(8) + xxhash.xxh3_128_digest(b"counts")
    )
    assert content.hexdigest() == hashlib.sha256(parts).hexdigest()


def test_a_truncated_file_is_refused(folder):
    with (folder / "train.beton").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(
        DataError, match=r"train\.beton must have \d+ bytes by its manifest; got 100000: truncated"
    ):
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
        (
            lambda text: text.replace('"samples": 61', '"samples": 60'),
            "is damaged: its own checksum differs",
        ),
        (lambda text: '{"format": "something else"}', "is not a manifest of a .beton"),
        (lambda text: "[1, 2]", "is not a manifest of a .beton"),
        (
            lambda text: text.replace('"version": 1', '"version": 2'),
            "is of version 2; this program reads 1",
        ),
    ],
)
def test_a_bad_manifest_is_refused(folder, change, message):
    path = folder / "train.beton.manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        Beton(folder, classes=2, size=8).check()


def forge(path, change):
    """Change a manifest, whose own checksum is right again."""
    body = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    change(body)
    path.write_text(json.dumps({**body, "checksum": manifests._checksum(body)}))


def test_a_manifest_may_lack_what_has_a_default(folder):
    """Files that were written before their samples could be grouped are read."""
    path = folder / "train.beton.manifest.json"
    whole = path.read_text()
    forge(path, lambda body: body.pop("groups"))
    assert check(folder / "train.beton").groups == {}
    for change in (lambda body: body.pop("classes"), lambda body: body.update(more=1)):
        path.write_text(whole)
        forge(path, change)
        with pytest.raises(DataError, match=r"train\.beton\.manifest\.json is damaged"):
            check(folder / "train.beton")


def test_a_foreign_manifest_is_refused(folder):
    (folder / "val.beton.manifest.json").rename(folder / "train.beton.manifest.json")
    with pytest.raises(DataError, match=r"belongs to another file, val\.beton"):
        Beton(folder, classes=2, size=8).fingerprint()


def test_verify_compares_sha256_and_content(folder):
    path = folder / "val.beton.manifest.json"
    good = json.loads(path.read_text())
    forge(path, lambda body: body.update(sha256="0" * 64))
    with pytest.raises(DataError, match=r"val\.beton: sha256 must be 0000"):
        verify(folder)
    forge(path, lambda body: body.update(sha256=good["sha256"], content="1" * 64))
    with pytest.raises(DataError, match=r"val\.beton: content hash must be 1111"):
        verify(folder)


def test_something_else_is_not_a_beton(tmp_path):
    (tmp_path / "x.beton").write_bytes(b"GIF89a" * 1000)
    with pytest.raises(DataError, match=r"not a \.beton of version 2"):
        beton_format.layout(tmp_path / "x.beton")
    (tmp_path / "x.beton").write_bytes(b"")
    with pytest.raises(DataError, match=r"0 bytes are less than its header"):
        beton_format.layout(tmp_path / "x.beton")
