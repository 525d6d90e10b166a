"""The order of samples on each rank: pure functions of (seed, epoch) and sizes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import require_data
from pipeline.core.random import HELD_OUT, ORDER, bits
from pipeline.core.units import counted


@dataclass(frozen=True, kw_only=True)
class TrainOrder:
    """The training order of one rank.

    With `repeats` above 1, a global batch contains `repeats` views of each of its
    batch_size / repeats samples: row r is view r // (batch_size / repeats). The number of steps per
    epoch is unchanged, so an epoch uses one in `repeats` of the samples.

    Raises:
        DataError: the sizes do not divide, or the set is smaller than one global batch.
    Source:
        Hoffer et al. 2019, arXiv:1901.09335 (repeated augmentation); Touvron et al. 2021 (DeiT),
        arXiv:2012.12877 (length of an epoch).
    """

    samples: int
    seed: int
    rank: int
    world: int
    batch_size: int  # samples of a global batch, over all ranks and micro-batches
    micro_batch: int  # samples of one batch on one rank
    repeats: int = 1
    # ids of the file's samples in use, `samples` of them; None: all
    ids: NDArray[np.int64] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world, self.micro_batch)
        require_data(
            self.repeats >= 1 and self.batch_size % self.repeats == 0,
            f"train: repeats must be 1 or more and divide batch_size={self.batch_size}; got"
            f" {self.repeats}",
        )
        require_data(0 <= self.seed < 2**63, f"train: seed must be in 0..2^63-1; got {self.seed}")
        share = self.world * self.micro_batch
        require_data(
            self.batch_size >= 1 and self.batch_size % share == 0,
            "train: batch_size must be above 0 and a multiple of world x micro_batch ="
            f" {self.world} x {self.micro_batch} = {share}; got {self.batch_size}",
        )
        require_data(
            self.samples >= self.batch_size,
            f"train: batch_size must be at most the {counted(self.samples, 'sample')} of the"
            f" set; got {self.batch_size}",
        )

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return self.samples // self.batch_size

    def epoch(self, epoch: int, *, start: int = 0) -> NDArray[np.int64]:
        """Sample ids of this rank in the order of use: [micro-batches * micro_batch].

        Raises: DataError if `start` is not a multiple of the global batch size within the epoch.
        """
        require_data(epoch >= 0, f"train: epoch must be 0 or more; got {epoch}")
        whole = self.steps * self.batch_size
        require_data(
            start % self.batch_size == 0 and 0 <= start <= whole,
            f"train: start must be a multiple of batch_size={self.batch_size} in 0..{whole};"
            f" got {start}",
        )
        order = permutation(self.samples, seed=self.seed, epoch=epoch)
        order = order if self.ids is None else self.ids[order]
        distinct = self.batch_size // self.repeats  # of a global batch
        steps = order[start // self.repeats : whole // self.repeats].reshape(-1, 1, distinct)
        rows = np.tile(steps, (1, self.repeats, 1)).reshape(-1, self.world, self.micro_batch)
        return rows[:, self.rank].reshape(-1)

    def copies(self, *, start: int = 0) -> NDArray[np.int64]:
        """The view number of each id in `epoch`, 0 to repeats - 1. Augmentation depends on it."""
        rows = np.arange(self.batch_size).reshape(-1, self.world, self.micro_batch)
        copies = rows[:, self.rank].reshape(-1) // (self.batch_size // self.repeats)
        return np.tile(copies, self.steps - start // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class ValOrder:
    """The evaluation order of one rank: a contiguous part of the file.

    The parts of two ranks differ by at most one sample.
    """

    samples: int
    rank: int
    world: int
    micro_batch: int
    # ids of the file's samples in use, `samples` of them; None: all
    ids: NDArray[np.int64] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world, self.micro_batch)

    @property
    def steps(self) -> int:
        """Batches of this rank; the last may be short."""
        return -(-len(self.epoch(0)) // self.micro_batch)

    def epoch(self, epoch: int, *, start: int = 0) -> NDArray[np.int64]:
        """Sample ids of this rank, the same in each epoch.

        Raises: DataError if `start` is not 0: an evaluation is repeated from its beginning.
        """
        require_data(start == 0, f"val: an evaluation starts at 0; got start={start}")
        places = np.arange(
            self.samples * self.rank // self.world, self.samples * (self.rank + 1) // self.world
        )
        return places if self.ids is None else self.ids[places]

    def copies(self, *, start: int = 0) -> NDArray[np.int64]:
        return np.zeros(len(self.epoch(0, start=start)), np.int64)


class Ordered:
    """Base class of data sets that are read in these orders."""

    repeats: int  # views of each sample in a training batch
    only: tuple[int, ...] | None = None  # the labels whose samples are used; None: all
    _ids: Callable[..., NDArray[np.int64]]  # ascending ids of the samples of "train" or "val"
    _loader: Callable[..., Any]  # one rank's loader, given "train" or "val", an order and a seed

    def of_classes(self, classes: tuple[int, ...]) -> Self:
        """The same sets without the samples of other classes; labels do not change."""
        same = copy.copy(self)
        same.only = classes
        return same

    def train(
        self,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        batch_size: int,
        micro_batch: int,
        threads: int = 1,
    ) -> Any:
        """See base.Data."""
        ids = self._ids("train")
        return self._loader(
            "train",
            TrainOrder(
                samples=len(ids),
                ids=ids,
                seed=seed,
                rank=rank,
                world=world,
                batch_size=batch_size,
                micro_batch=micro_batch,
                repeats=self.repeats,
            ),
            seed=seed,
            threads=threads,
        )

    def val(
        self,
        *,
        rank: int = 0,
        world: int = 1,
        micro_batch: int,
        threads: int = 1,
    ) -> Any:
        """See base.Data."""
        ids = self._ids("val")
        return self._loader(
            "val",
            ValOrder(samples=len(ids), ids=ids, rank=rank, world=world, micro_batch=micro_batch),
            seed=0,
            threads=threads,
        )


def permutation(samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """All sample ids sorted by their random bits (ties by id): [samples].

    It does not depend on the version of a generator. 1.28 M samples take about 0.2 s.
    """
    return np.argsort(bits(seed, epoch, np.arange(samples), ORDER), kind="stable")


def held_out(samples: int, share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split a training set's ids into (training, selection), the same for every seed.

    Hyperparameters such as learning rates are chosen on the second part, never on the test set.
    """
    order = np.argsort(bits(0, 0, np.arange(samples), HELD_OUT), kind="stable")
    count = round(samples * share)
    return np.sort(order[count:]), np.sort(order[:count])


def _check_rank(rank: int, world: int, micro_batch: int) -> None:
    require_data(
        0 <= rank < world and micro_batch >= 1,
        "data: rank must be in 0..world-1, micro_batch 1 or more; got"
        f" rank={rank}, world={world}, micro_batch={micro_batch}",
    )
