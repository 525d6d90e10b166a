"""Files compared with their manifests, whole or page by page while they are read."""

import shutil
from contextlib import nullcontext

import numpy as np
import pytest

from pipeline.data.base import DataError, with_page_checks
from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.datasets.tasks import Permuted, SplitClasses
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv import page_checks
from pipeline.data.ffcv.format import RAW
from pipeline.data.ffcv.page_checks import SpotCheck, check_file, verify
from tests.helpers.damage import flip
from tests.helpers.loaders import read
from tests.helpers.small_pages import write_pages

SIZES = {"seed": 5, "batch_size": 5, "rank": 0, "world": 1, "micro_batch": 5, "threads": 1}


def test_some_pages_and_samples_are_named_and_the_rest_counted(tmp_path):
    path, images = tmp_path / "train.beton", [bytes([i]) * 768 for i in range(64)]  # 5 on a page
    about = {"mode": RAW, "height": 16, "width": 16, "labels": [0] * 64, "classes": ["a"]}
    manifest = write_pages(path, images, page_bytes=1 << 12, **about)
    assert len(manifest.pages) == 13 and verify(path) == [manifest]
    begin = manifest.pages_offset + 6 * 4096
    for page in range(7):
        flip(path, begin + page * 4096 + 4095)
    first, second = (
        f"page {page} (bytes {at} to {at + 4095}, samples {5 * page} to {5 * page + 4})"
        " differs from its manifest"
        for page, at in ((6, begin), (7, begin + 4096))
    )
    with pytest.raises(DataError) as caught:
        check_file(path)
    said = str(caught.value)
    assert said.startswith(f"data: {path} is damaged: {first}, {second}, page 8 (")
    assert said.endswith(" and 2 more; restore the file or write the data again")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: data,
        lambda data: Permuted(data, task=1),
        lambda data: SplitClasses(data, task=1),
    ],
)
def test_a_damaged_page_is_refused_while_it_is_read(wrap, fashion, tmp_path):
    folder = shutil.copytree(fashion, tmp_path / "copy")
    flip(folder / "train.beton", manifests.read(folder / "train.beton").pages_offset + 100)
    how = {"channels": 1, "size": 28, "crop": "shift", "mean": (0.5,), "std": (0.5,)}
    data = wrap(Beton(folder, classes=10, **how))
    read(data.train(**SIZES))  # nobody looks: FFCV says nothing
    place = r"train\.beton is damaged: page 0 \(bytes \d+ to \d+, samples 0 to 99\)"
    with pytest.raises(DataError, match=f"{place} differs from its manifest; restore"):
        read(with_page_checks(data, 1).train(**SIZES))


@pytest.mark.parametrize(
    ("one_in", "ends"),
    [(1 << 30, nullcontext), (1, lambda: pytest.raises(DataError, match="page 0 "))],
)
def test_a_replaced_file_stops_nothing_until_a_page_is_compared(folder, one_in, ends):
    data = Beton(folder, classes=2, size=8).with_page_checks(one_in)
    with data.train(**SIZES | {"batch_size": 1, "micro_batch": 1}).epoch(0) as batches, ends():
        next(batches)
        (folder / "other").write_bytes(b"another file")
        (folder / "other").replace(folder / "train.beton")
        assert len(list(batches)) == 60


def test_data_without_pages_is_read_as_it_is():
    data = Synthetic()
    assert with_page_checks(data, 1) is data


def test_one_sample_in_so_many_has_its_page_compared(fashion, monkeypatch):
    """By draw: in another epoch another, in another process the same."""
    path, compared = fashion / "train.beton", []
    manifest = manifests.read(path)
    addresses = manifest.pages_offset + manifest.page_bytes * np.arange(10_000)  # a page each
    monkeypatch.setattr(
        page_checks, "_compare_pages", lambda path, manifest, pages, *how: compared.extend(pages)
    )

    def drawn(epoch: int) -> list[int]:
        compared.clear()
        check = SpotCheck(path, addresses, one_in=100, seed=1, epoch=epoch)
        for first in range(0, 10_000, 10):
            check.check_batch(np.arange(first, first + 10), np.zeros(10, np.bool_))
        return [*compared]

    one, again, other = drawn(0), drawn(0), drawn(1)
    assert one == again != other
    assert 70 < len(one) < 130 and len(set(one) & set(other)) < 10
