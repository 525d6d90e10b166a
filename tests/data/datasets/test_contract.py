"""What every data set promises: one order of samples for any number of ranks, exact resumption,
each evaluation sample once, and batches of the types that training takes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.base import Data, Loader
from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.events import Events
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.datasets.tasks import Permuted, SplitClasses
from pipeline.data.datasets.torch_dataset import from_dataset
from pipeline.recipe.recipe import spec
from tests.data.datasets.test_torch_dataset import Noisy
from tests.helpers.loaders import by_index, read, same

SIZES: dict[str, Any] = {"seed": 5, "world": 1, "rank": 0, "threads": 1}
MAKE = {
    "images": lambda photos, moving: Beton(photos, classes=2, size=24),
    "recordings": lambda photos, moving: Events(
        moving, classes=16, steps=4, size=16, crop="shift", flip="random"
    ),
    "synthetic": lambda photos, moving: Synthetic(61, shape=(1, 8, 8), val_samples=13),
    "permuted": lambda photos, moving: Permuted(
        Synthetic(61, classes=6, shape=(2, 4, 5), val_samples=13), task=1
    ),
    "split": lambda photos, moving: SplitClasses(
        Synthetic(123, classes=4, shape=(1, 8, 8), val_samples=27), task=1
    ),
    "torch": lambda photos, moving: from_dataset(train=spec(Noisy), val=spec(Noisy, samples=13)),
}


@pytest.fixture(params=MAKE)
def data(request: pytest.FixtureRequest, photos: Path, moving: Path) -> Data:
    """61 training and 13 evaluation samples of each kind."""
    return MAKE[request.param](photos, moving)


def trained(data: Data, *, batch: int = 12, micro: int = 12, **sizes: Any) -> Loader:
    return data.train(**SIZES | {"batch_size": batch, "micro_batch": micro} | sizes)


def test_data_and_loader_fulfil_the_contract(data: Data) -> None:
    loader = trained(data)
    assert isinstance(data, Data) and isinstance(loader, Loader)
    assert (loader.samples, loader.steps_per_epoch) == (61, 5)
    data.check()
    for batch in read(loader):
        assert batch.x.shape == (12, *data.shape) and batch.x.dtype == torch.float32
        assert batch.target.shape == batch.index.shape == (12,)
        assert batch.target.dtype == batch.index.dtype == torch.int64
        assert 0 <= int(batch.target.min()) <= int(batch.target.max()) < data.classes


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batches_of_one(data: Data, world: int) -> None:
    alone = [by_index([batch]) for batch in read(trained(data), 2)]
    together: list[dict[int, torch.Tensor]] = [{} for _ in alone]
    for rank in range(world):
        for i, batch in enumerate(read(trained(data, micro=2, world=world, rank=rank), 2)):
            together[i * 2 * world // 12] |= by_index([batch])
    for mine, one in zip(together, alone, strict=True):
        assert mine.keys() == one.keys() and all(torch.equal(mine[i], one[i]) for i in one)


def test_resumed_in_mid_epoch_is_the_rest_of_it(data: Data) -> None:
    loader = trained(data)
    whole = read(loader, 1)
    assert same(read(trained(data), 1, start=24), whole[2:])
    assert read(loader, 1, start=60) == []
    assert same(read(loader, 1), whole)  # the same loader, after a short epoch
    for rank in range(2):
        halves = {"micro": 3, "world": 2, "rank": rank}
        assert same(
            read(trained(data, **halves), 1, start=24), read(trained(data, **halves), 1)[4:]
        )


def test_epochs_differ_in_order(data: Data) -> None:
    first, second = (list(by_index(read(trained(data), epoch))) for epoch in (0, 1))
    assert first != second and len(set(first) & set(second)) > 50


def test_evaluation_over_ranks_takes_each_sample_once(data: Data) -> None:
    ids, lengths = [], []
    for rank in range(3):
        loader = data.val(rank=rank, world=3, micro_batch=3, threads=1)
        batches = read(loader)
        assert len(batches) == loader.steps_per_epoch
        lengths += [len(batch.x) for batch in batches]
        ids += by_index(batches)
    alone = data.val(rank=0, world=1, micro_batch=13, threads=1)
    assert sorted(ids) == sorted(by_index(read(alone))) and len(ids) == 13
    assert set(lengths) == {1, 2, 3}
    assert same(read(alone), read(alone, 1000))  # the number of a step: train/evaluation.py
    assert read(data.val(rank=0, world=20, micro_batch=3, threads=1)) == []
