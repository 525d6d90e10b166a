"""Pages compared while they are read: how many, when, and what is said of them."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("ffcv")

from pipeline.data import manifest as manifests
from pipeline.data.base import DataError
from pipeline.data.beton import Beton
from pipeline.data.care import Care, careful
from pipeline.data.damage import DamagedPages, Page, runs_of
from pipeline.data.order import held_out
from pipeline.data.spot_check import SpotCheck
from pipeline.data.synthetic import Synthetic
from pipeline.data.tasks import Permuted, SplitClasses

SIZES = {"rank": 0, "world": 1, "micro_batch": 5, "threads": 1}


def data_of(folder: Path) -> Beton:
    return Beton(folder, classes=10, channels=1, size=28, crop="shift", mean=(0.5,), std=(0.5,))


@pytest.fixture
def damaged(fashion, tmp_path) -> Path:
    """A bit of the training file's only page is another."""
    folder = shutil.copytree(fashion, tmp_path / "copy")
    path = folder / "train.beton"
    with path.open("r+b") as file:
        file.seek(manifests.read(path).pages_offset + 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return folder


def read_all(data, epoch: int = 0) -> list[torch.Tensor]:
    loader = data.train(seed=5, batch_size=5, **SIZES)
    with loader.epoch(epoch) as batches:
        return [batch.index for batch in batches]


@pytest.mark.parametrize(
    "wrap", [lambda data: data, lambda data: Permuted(data, task=1), lambda data: SplitClasses(data, task=1)]
)
def test_who_compares_for_each_sample_refuses_a_damaged_page(wrap, damaged):
    data = wrap(data_of(damaged))
    read_all(data)  # nobody looks: FFCV says nothing
    with pytest.raises(
        DamagedPages, match=r"train\.beton: page 0 \(bytes \d+ to \d+, samples 0 to 99\) differs from its"
    ) as error:
        read_all(careful(data, Care(one_in=1)))
    assert error.value.may_go and [page.count for page in error.value.pages] == [100]


@pytest.mark.parametrize(
    "wrap", [lambda data: data, lambda data: Permuted(data, task=1), lambda data: SplitClasses(data, task=1)]
)
def test_samples_are_left_out_of_tasks_too(wrap, fashion):
    data = wrap(data_of(fashion))
    care = Care(left_out=((10, 20), (35, 36)))
    gone = [*range(10, 20), 35]
    for each, has in ((data, True), (careful(data, care), False)):
        with each.train(seed=5, batch_size=5, **SIZES).epoch(0) as batches:
            index = torch.cat([batch.index for batch in batches])
        assert bool(torch.isin(index, torch.tensor(gone)).any()) is has
    with careful(data, care).val(**SIZES).epoch(0) as batches:  # of another file
        assert bool(torch.isin(torch.cat([batch.index for batch in batches]), torch.tensor(gone)).any())


def test_one_sample_in_so_many_has_its_page_compared(fashion, monkeypatch):
    """By draw: in another epoch another, in another process the same."""
    path, compared = fashion / "train.beton", []
    table = np.zeros(10_000, [("sample_id", "u8"), ("ptr", "u8")])
    manifest = manifests.read(path)
    table["sample_id"] = np.arange(10_000)[::-1]
    table["ptr"] = manifest.pages_offset + manifest.page_bytes * table["sample_id"]  # a page each
    monkeypatch.setattr(manifests, "page_fault", lambda path, file, manifest, page: compared.append(page))

    def drawn(epoch: int) -> list[int]:
        compared.clear()
        with SpotCheck(path, table, one_in=100, seed=1, epoch=epoch, asked=np.arange(0)) as check:
            for first in range(0, 10_000, 10):
                check.after(np.arange(first, first + 10), np.zeros(10, np.bool_))
        return [*compared]

    one, again, other = drawn(0), drawn(0), drawn(1)
    assert one == again != other
    assert 70 < len(one) < 130 and len(set(one) & set(other)) < 10


def test_a_sampled_comparison_finds_it_in_some_epoch(damaged):
    data = careful(data_of(damaged), Care(one_in=256))
    found = []
    for epoch in range(10):
        try:
            read_all(data, epoch)
        except DamagedPages:
            found.append(epoch)
    assert 0 < len(found) < 10  # 100 samples an epoch


def test_what_is_evaluated_on_may_not_go(damaged):
    made = manifests.read(damaged / "train.beton")
    shutil.copy(damaged / "train.beton", damaged / "val.beton")
    replace(made, file="val.beton").write(damaged / "val.beton.manifest.json")
    loader = careful(data_of(damaged), Care(one_in=1)).val(**SIZES)
    said = "samples that are evaluated on are in it: restore the file"
    with pytest.raises(DamagedPages, match=said) as error, loader.epoch(0) as batches:
        list(batches)
    assert not error.value.may_go


def test_nor_may_a_page_of_the_training_file_in_which_some_are_held_out(damaged):
    """Of another task than the one that finds it."""
    [chosen_on] = held_out(100, 0.01)[1]
    whole = Beton(damaged, classes=10, channels=1, size=28, crop="shift", mean=(0.5,), std=(0.5,), held_out=0.01)
    other = 1 if chosen_on % 10 in (0, 1) else 0
    for data in (whole, SplitClasses(whole, task=other)):
        with pytest.raises(DamagedPages, match="samples that are evaluated on are in it: restore the file") as error:
            read_all(careful(data, Care(one_in=1)))
        assert not error.value.may_go


def test_data_without_pages_can_leave_nothing_out():
    data = Synthetic()
    assert careful(data, Care(one_in=1)) is data
    with pytest.raises(DataError, match="data: needs files, such as those of Beton, to leave samples out; got Synthetic"):
        careful(data, Care(left_out=((0, 1),)))


def test_a_line_names_some_and_counts_the_rest():
    pages = [Page(file="a", number=n, offset=10 * n, size=10, samples=runs_of([n, 2 * n, 2 * n + 1])) for n in range(2, 9)]
    about = {"file": "b", "number": 0, "offset": 0, "size": 1, "samples": ((0, 1),)}
    said = str(DamagedPages([*pages, Page(**about), Page(**about, unreadable="Input/output error")]))
    assert said.startswith("data: a: page 2 (bytes 20 to 29, samples 2, 4 to 5), page 3 (")
    assert said.endswith(
        " and 2 more differ from its manifest: damaged; b: page 0 (bytes 0 to 0, samples 0) differs from its manifest: damaged; "
        "b: page 0 (bytes 0 to 0, samples 0) cannot be read (Input/output error): damaged"
    )


def test_it_travels_between_processes():
    error = DamagedPages([Page(file="a", number=0, offset=0, size=1, samples=((0, 1),))], may_go=False)
    back = pickle.loads(pickle.dumps(error))
    assert (back.pages, back.may_go, str(back)) == (error.pages, False, str(error))
