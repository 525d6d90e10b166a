"""What a forecast takes of a recipe's data: one batch, or one made up; how long one takes to read;
how many samples there are.

Of recipes of several tasks, the data of the first.
"""

# B batch

from __future__ import annotations

import statistics
from contextlib import closing

import torch

from pipeline.data.base import Batch, Data, Loader
from pipeline.measure.stopwatch import seconds_of
from pipeline.recipe.recipe import Recipe
from pipeline.train.part_checks import check_batch, checked_loader
from pipeline.train.tasks import tasks_of

TIMED = 5


def first_batch(recipe: Recipe, size: int) -> Batch:
    """The first `size` samples that a run of the recipe would train on."""
    with closing(_loader(recipe, size)) as loader, loader.epoch(0) as batches:
        batch = next(iter(batches))
        check_batch(batch, _data(recipe), "train")
        return batch


def noise(recipe: Recipe, size: int) -> Batch:
    """A batch that nobody read, in the shape of the recipe's data."""
    data = _data(recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    x_B = torch.randn(size, *data.shape, generator=generator)
    return Batch(x_B, torch.randint(data.classes, (size,), generator=generator), torch.arange(size))


def loading_s(recipe: Recipe, size: int) -> float:
    """Seconds of reading `size` samples and making them ready, on one thread with nothing else to
    do; the median of several.
    """
    with closing(_loader(recipe, size)) as loader, loader.epoch(0) as batches:
        some = iter(batches)
        next(some)
        turns = min(TIMED, loader.steps_per_epoch - 1)
        return (
            statistics.median(
                seconds_of(lambda: next(some), torch.device("cpu")) for _ in range(turns)
            )
            if turns
            else 0.0
        )


def samples_of(recipe: Recipe) -> int:
    """That an epoch of the recipe has, and no batch of it more."""
    with closing(_loader(recipe, 1)) as loader:
        return loader.samples


def _data(recipe: Recipe) -> Data:
    return tasks_of(recipe)[0].data


def _loader(recipe: Recipe, size: int) -> Loader:
    data = _data(recipe)
    loader = data.train(
        seed=recipe.seed, rank=0, world=1, batch_size=size, micro_batch=size, threads=1
    )
    return checked_loader(loader, data, "train")
