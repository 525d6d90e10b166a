"""Levels that are looked up later: the same bits as the floats of the reader."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.base import Data, with_levels
from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.events import Events
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.datasets.tasks import Permuted, SplitClasses
from pipeline.recipe.phases import Phase
from pipeline.recipe.recipe import spec
from pipeline.train.part_checks import check_first_batch
from pipeline.train.tasks import tasks_of
from pipeline.train.transfer import move_batch
from tests.helpers.loaders import read, same
from tests.helpers.small import small_recipe

CPU = torch.device("cpu")
TRAIN: dict[str, Any] = {"seed": 5, "rank": 0, "world": 1, "batch_size": 12, "micro_batch": 12}
VAL: dict[str, Any] = {"rank": 0, "world": 1, "micro_batch": 5}


def beton(folder: Path, **options: Any) -> Beton:
    return Beton(folder, classes=2, size=24, **options)


WITH_LEVELS = {
    "resized": lambda photos, grey: beton(photos),
    "centre": lambda photos, grey: beton(photos, crop="centre", flip="never", std=(0.1, 0.2, 3.0)),
    "colour": lambda photos, grey: beton(photos, colour=9.0),
    "luma": lambda photos, grey: beton(photos, channels=1, mean=(0.4,), std=(0.3,)),
    "window": lambda photos, grey: Beton(
        grey, classes=10, size=32, channels=1, crop="shift", mean=(0.2,), std=(0.3,)
    ),
    "permuted": lambda photos, grey: Permuted(beton(photos), task=1),
    "split": lambda photos, grey: SplitClasses(beton(photos), task=1, classes_per_task=1),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(each, marks=[pytest.mark.full] if each in ("colour", "resized") else [])
        for each in WITH_LEVELS
    ],
)
def test_levels_looked_up_are_the_floats_of_the_reader(
    name: str, photos: Path, fashion: Path
) -> None:
    data: Data = WITH_LEVELS[name](photos, fashion)
    for part, sizes in (("train", TRAIN), ("val", VAL)):
        loaders = (getattr(each, part)(**sizes, threads=1) for each in (data, with_levels(data)))
        floats, levels = (read(loader, epoch=1) for loader in loaders)
        assert len(floats) >= 2
        for batch in levels:
            assert batch.x.dtype == torch.uint8 and batch.x.shape[1:] == data.shape
            assert len(batch.x.unique()) > 20
        assert same([move_batch(batch, CPU) for batch in levels], floats)
        assert all(batch.table is None for batch in floats)


WITHOUT_LEVELS = {
    "erase": lambda photos, moving: beton(photos, erase=0.5),
    "cutout": lambda photos, moving: beton(photos, cutout=8),
    "recordings": lambda photos, moving: Events(moving, classes=16, steps=4, size=16),
    "synthetic": lambda photos, moving: Synthetic(61, shape=(1, 8, 8), val_samples=13),
}


@pytest.mark.parametrize("name", WITHOUT_LEVELS)
def test_what_is_no_level_stays_float(name: str, photos: Path, moving: Path) -> None:
    data: Data = WITHOUT_LEVELS[name](photos, moving)
    floats, same_floats = (
        read(each.train(**TRAIN, threads=1)) for each in (data, with_levels(data))
    )
    assert same(floats, same_floats) and all(batch.table is None for batch in same_floats)


def test_levels_are_for_gpus_and_change_no_fingerprint(photos: Path) -> None:
    recipe = small_recipe(data=spec(Beton, folder=str(photos), classes=2, size=24), batch_size=12)
    phased = small_recipe(
        data=recipe.data,
        batch_size=12,
        phases=(Phase(name="one", data=spec(Permuted, task=1), epochs=1),),
    )
    for each in (recipe, phased):
        on_cpu, on_gpu = tasks_of(each)[0].data, tasks_of(each, device=torch.device("cuda"))[0].data
        assert on_cpu.fingerprint() == on_gpu.fingerprint()
        for data, dtype in ((on_cpu, torch.float32), (on_gpu, torch.uint8)):
            batch = check_first_batch(data.train(**TRAIN, threads=1), data, "train")
            assert batch is not None and batch.x.dtype == dtype
