"""Files compared with their manifests, whole or page by page while they are read."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core import files
from pipeline.data.base import DataError, with_page_checks
from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.datasets.tasks import Permuted, SplitClasses
from pipeline.data.ffcv import format as beton_format
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv import page_checks
from pipeline.data.ffcv.page_checks import SpotCheck, check, verify
from tests.helpers.damage import fail_reads, flip

SIZES = {"rank": 0, "world": 1, "micro_batch": 5, "threads": 1}


@pytest.fixture
def folder(photos, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(photos, tmp_path / "copy")


@pytest.fixture
def damaged(fashion, tmp_path) -> Path:
    """One bit of the training file's only page is another."""
    folder = shutil.copytree(fashion, tmp_path / "copy")
    flip(folder / "train.beton", manifests.read(folder / "train.beton").pages_offset + 100)
    return folder


def data_of(folder: Path) -> Beton:
    return Beton(folder, classes=10, channels=1, size=28, crop="shift", mean=(0.5,), std=(0.5,))


def read_all(data, epoch: int = 0) -> list[torch.Tensor]:
    loader = data.train(seed=5, batch_size=5, **SIZES)
    with loader.epoch(epoch) as batches:
        return [batch.index for batch in batches]


def test_whole_files_pass(photos):
    Beton(photos, classes=2, size=8).check()
    train, val = verify(photos)
    assert (train.samples, val.samples, train.classes, sum(train.histogram)) == (
        61,
        13,
        ["china", "flower"],
        61,
    )
    assert verify(photos / "val.beton") == [val]


@pytest.mark.parametrize(
    "name", ["header", "field descriptors", "metadata", "padding", "page 0", "allocation table"]
)
def test_a_flipped_bit_is_located(folder, name):
    path = folder / "train.beton"
    layout = beton_format.layout(path)
    region = next(
        each for each in (*layout.front, *layout.pages, layout.table) if each.name == name
    )
    flip(path, region.offset + region.size // 2)
    for look in (Beton(folder, classes=2, size=8).check, lambda: verify(folder)):
        with pytest.raises(
            DataError,
            match=rf"train\.beton: {name} \(bytes {region.offset} to .* differs from its manifest",
        ):
            look()


@pytest.mark.parametrize(
    "times", [files.TRIES, 1 + files.TRIES]
)  # of the open file once, and of fresh ones
@pytest.mark.parametrize("name", ["header", "page 0", "allocation table"])
def test_a_bad_sector_is_located_once_it_stays_one(folder, name, times, monkeypatch):
    path, pread, left = (
        folder / "train.beton",
        os.pread,
        [OSError(errno.EIO, os.strerror(errno.EIO))] * times,
    )
    layout = beton_format.layout(path)
    region = next(
        each for each in (*layout.front, *layout.pages, layout.table) if each.name == name
    )

    def fails(file, length, offset):
        if offset == region.offset and left:
            raise left.pop()
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", fails)
    monkeypatch.setattr(files, "TRY_S", 0.0)
    if times <= files.TRIES:
        verify(path)
        assert not left
        return
    said = (
        rf"train\.beton: {name} \(bytes {region.offset} to .* cannot be read \(Input/output"
        r" error\): damaged"
    )
    with pytest.raises(DataError, match=said):
        verify(path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_storage_that_is_away_is_no_damage(folder, monkeypatch, number):
    fail_reads(monkeypatch, *folder.glob("*.beton"), number=number)
    with pytest.raises(OSError, match=os.strerror(number)):
        check(folder / "train.beton")


def test_a_page_is_named_among_many(tmp_path):
    writer = beton_format.BetonWriter(tmp_path / "train.beton", capacity=64, page_bytes=1 << 12)
    content = manifests.ContentHash(["a"])
    for i in range(64):
        sample = {"mode": beton_format.RAW, "height": 16, "width": 16, "label": 0}
        writer.add(bytes([i]) * 768, **sample)
        content.add(bytes([i]) * 768, **sample)
    writer.finish()
    path = tmp_path / "train.beton"
    manifest = manifests.describe(
        path, name=path.name, content=content.hexdigest(), classes=["a"], labels=[0] * 64
    )
    manifest.write(tmp_path / "train.beton.manifest.json")
    assert len(manifest.pages) == 13 and verify(path) == [manifest]
    flip(path, manifest.pages_offset + 7 * 4096 + 4095)
    with pytest.raises(DataError, match=r"page 7 \(bytes "):
        check(path)


def test_some_pages_and_samples_are_named_and_the_rest_counted(photos):
    path = photos / "train.beton"
    manifest = replace(manifests.read(path), page_bytes=10, pages_offset=0)
    page_of = np.repeat(np.arange(9), [1, 1, 3, 1, 1, 1, 1, 1, 1])
    page_of[[0, 8]] = 2  # samples 0, 2 to 4 and 8 lie on page 2
    said = str(
        page_checks.damaged_pages(path, manifest, dict.fromkeys(range(2, 9), "differs"), page_of)
    )
    first, last = (
        "page 2 (bytes 20 to 29, samples 0, 2 to 4, 8) differs",
        "page 6 (bytes 60 to 69, samples ",
    )
    assert said.startswith(f"data: {path}: {first}, page 3 (") and last in said
    assert said.endswith(" and 2 more: damaged; restore the file or write the data again")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: data,
        lambda data: Permuted(data, task=1),
        lambda data: SplitClasses(data, task=1),
    ],
)
def test_a_damaged_page_is_refused_while_it_is_read(wrap, damaged):
    data = wrap(data_of(damaged))
    read_all(data)  # nobody looks: FFCV says nothing
    said = (
        r"train\.beton: page 0 \(bytes \d+ to \d+, samples 0 to 99\) differs from its manifest:"
        r" damaged; restore"
    )
    with pytest.raises(DataError, match=said):
        read_all(with_page_checks(data, 1))


def test_data_without_pages_is_read_as_it_is():
    data = Synthetic()
    assert with_page_checks(data, 1) is data


def test_one_sample_in_so_many_has_its_page_compared(fashion, monkeypatch):
    """By draw: in another epoch another, in another process the same."""
    path, compared = fashion / "train.beton", []
    table = np.zeros(10_000, [("sample_id", "u8"), ("ptr", "u8")])
    manifest = manifests.read(path)
    table["sample_id"] = np.arange(10_000)[::-1]
    table["ptr"] = manifest.pages_offset + manifest.page_bytes * table["sample_id"]  # a page each
    monkeypatch.setattr(
        page_checks, "page_fault", lambda path, file, manifest, page: compared.append(page) or ""
    )

    def drawn(epoch: int) -> list[int]:
        compared.clear()
        with SpotCheck(path, table, one_in=100, seed=1, epoch=epoch) as check:
            for first in range(0, 10_000, 10):
                check.after(np.arange(first, first + 10), np.zeros(10, np.bool_))
        return [*compared]

    one, again, other = drawn(0), drawn(0), drawn(1)
    assert one == again != other
    assert 70 < len(one) < 130 and len(set(one) & set(other)) < 10


def test_a_sampled_comparison_finds_it_in_some_epoch(damaged):
    data = with_page_checks(data_of(damaged), 256)
    found = []
    for epoch in range(10):
        try:
            read_all(data, epoch)
        except DataError:
            found.append(epoch)
    assert 0 < len(found) < 10  # 100 samples an epoch
