import hashlib
import json

import numpy as np
import pytest
import xxhash

from pipeline.data.base import DataError
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import Arrays
from pipeline.data.ffcv.page_checks import check_file, verify


def test_the_content_hash_is_that_of_its_definition():
    """Old files keep their hash: it is part of every study's key."""
    content = manifests.ContentHash(["a", "b"])
    content.add(b"pixels", label=1, width=3, height=2, mode=0)
    about = np.array([1, 0, 2, 3], "<i8").tobytes()  # label, mode, height, width
    parts = b'["a", "b"]' + about + xxhash.xxh3_128_digest(b"pixels")
    assert content.hexdigest() == hashlib.sha256(parts).hexdigest()

    content = manifests.ContentHash(["a"], Arrays("uint8", (2, 3)))
    content.add(b"counts", label=0)
    about = b'["a"]{"dtype": "uint8", "shape": [2, 3]}' + bytes(8)
    parts = about + xxhash.xxh3_128_digest(b"counts")
    assert content.hexdigest() == hashlib.sha256(parts).hexdigest()


def test_missing_parts_are_named(folder, tmp_path):
    (folder / "val.beton.manifest.json").unlink()
    for look, said in (
        (
            Beton(folder, classes=2, size=8).fingerprint,
            r"/val\.beton\.manifest\.json does not exist",
        ),
        (Beton(tmp_path / "a", classes=2, size=8).fingerprint, r"/a/train\.beton does not exist"),
        (lambda: verify(tmp_path), r"no \.beton in"),
    ):
        with pytest.raises(DataError, match=said):
            look()


def forged(text: str, **changes) -> str:
    """A manifest with changed fields (None: without it), whose own checksum is right again."""
    body = {key: value for key, value in (json.loads(text) | changes).items() if value is not None}
    del body["checksum"]
    return json.dumps({**body, "checksum": manifests._checksum(body)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:300], r"manifest 1 \(Expecting value"),
        (lambda text: text.replace('"samples": 61', '"samples": 60'), "own checksum differs"),
        (lambda text: '{"format": "something else"}', "or is not a spiketrain beton manifest"),
        (lambda text: "[1, 2]", "is damaged or is not a spiketrain beton manifest 1"),
        (lambda text: forged(text, version=2), r"manifest 1 \(it is a spiketrain beton manifest 2"),
        (lambda text: forged(text, classes=None), "missing .* 'classes'"),
        (lambda text: forged(text, more=1), "unexpected keyword argument 'more'"),
        (
            lambda text: forged(text, file="val.beton"),
            r"must belong to train\.beton; got .* val\.beton",
        ),
    ],
)
def test_a_bad_manifest_is_refused(folder, change, message):
    path = folder / "train.beton.manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        verify(folder)


def test_a_manifest_may_lack_what_has_a_default(folder):
    """Files that were written before their samples could be grouped are read."""
    path = folder / "train.beton.manifest.json"
    path.write_text(forged(path.read_text(), groups=None))
    assert check_file(folder / "train.beton").groups == {}
