"""The order of samples on each rank: a pure function of (seed, epoch) and sizes."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import require_data
from pipeline.core.random import HELD_OUT, ORDER, bits
from pipeline.core.units import counted

Part = Literal["train", "val"]  # the training or the evaluation set


@dataclass(frozen=True, kw_only=True)
class TrainOrder:
    """The training order of one rank.

    With `repeats` above 1, a global batch has n = batch_size / repeats different samples, and
    `repeats` views of each: row r is view r // n of sample r mod n. The number of steps per epoch
    does not depend on `repeats`, so an epoch uses one in `repeats` of the samples.

    Raises:
        DataError: the seed, the rank or a size is out of range, a size does not divide another, or
            the set is smaller than one global batch.
    Source:
        Hoffer et al. 2019, arXiv:1901.09335 (repeated augmentation); Touvron et al. 2021 (DeiT),
        arXiv:2012.12877 (length of an epoch).
    """

    samples: int
    seed: int
    rank: int
    world: int
    batch_size: int  # rows of a global batch, over all ranks and micro-batches
    micro_batch: int  # rows of one batch on one rank
    repeats: int = 1
    # the ids of the `samples` samples that are used; None: 0 to samples - 1
    ids: NDArray[np.int64] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world, self.micro_batch)
        require_data(
            self.repeats >= 1 and self.batch_size % self.repeats == 0,
            f"train: repeats must be 1 or more and divide batch_size={self.batch_size}; got"
            f" {self.repeats}",
        )
        require_data(0 <= self.seed < 2**63, f"train: seed must be in 0..2^63-1; got {self.seed}")
        divisor = self.world * self.micro_batch
        require_data(
            self.batch_size >= 1 and self.batch_size % divisor == 0,
            "train: batch_size must be above 0 and a multiple of world x micro_batch ="
            f" {self.world} x {self.micro_batch} = {divisor}; got {self.batch_size}",
        )
        require_data(
            self.samples >= self.batch_size,
            f"train: batch_size must be at most the {counted(self.samples, 'sample')} of the"
            f" set; got {self.batch_size}",
        )

    @property
    def steps(self) -> int:
        """Global batches in an epoch, unlike `ValOrder.steps`."""
        return self.samples // self.batch_size

    def epoch(self, epoch: int, *, start: int = 0) -> NDArray[np.int64]:
        """Sample ids of this rank in reading order: [micro-batches * micro_batch].

        `start`: the number of rows of this epoch that all ranks together have already read.

        Raises: DataError if `epoch` is negative, or `start` is not a multiple of the global batch
            size within the epoch.
        """
        require_data(epoch >= 0, f"train: epoch must be 0 or more; got {epoch}")
        end = self.steps * self.batch_size
        require_data(
            start % self.batch_size == 0 and 0 <= start <= end,
            f"train: start must be a multiple of batch_size={self.batch_size} in 0..{end};"
            f" got {start}",
        )
        order = permutation(self.samples, seed=self.seed, epoch=epoch)
        order = order if self.ids is None else self.ids[order]
        # [steps, 1, different samples of a global batch]
        ids = order[start // self.repeats : end // self.repeats].reshape(
            -1, 1, self.batch_size // self.repeats
        )
        # [steps, views, different samples], then [steps * accumulation, ranks, rows]
        rows = np.tile(ids, (1, self.repeats, 1)).reshape(-1, self.world, self.micro_batch)
        return rows[:, self.rank].reshape(-1)

    def view_numbers(self, *, start: int = 0) -> NDArray[np.int64]:
        """The view number of each id that `epoch` returns, 0 to repeats - 1.

        Augmentation depends on it.
        """
        # [accumulation, ranks, rows]
        rows = np.arange(self.batch_size).reshape(-1, self.world, self.micro_batch)
        numbers = rows[:, self.rank].reshape(-1) // (self.batch_size // self.repeats)
        return np.tile(numbers, self.steps - start // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class ValOrder:
    """The evaluation order of one rank: a contiguous part of the used samples, in file order.

    The lengths of two ranks' parts differ by at most one sample.

    Raises: DataError if the rank or `micro_batch` is out of range.
    """

    samples: int
    rank: int
    world: int
    micro_batch: int
    # the ids of the `samples` samples that are used; None: 0 to samples - 1
    ids: NDArray[np.int64] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world, self.micro_batch)

    @property
    def steps(self) -> int:
        """Batches of this rank, unlike `TrainOrder.steps`. The last may be short."""
        return -(-len(self.epoch(0)) // self.micro_batch)

    def epoch(self, epoch: int, *, start: int = 0) -> NDArray[np.int64]:
        """Sample ids of this rank, the same in each epoch.

        A stopped evaluation is repeated from its beginning.

        Raises: DataError if `start` is not 0.
        """
        require_data(start == 0, f"val: an evaluation starts at 0; got start={start}")
        positions = np.arange(
            self.samples * self.rank // self.world, self.samples * (self.rank + 1) // self.world
        )
        return positions if self.ids is None else self.ids[positions]

    def view_numbers(self, *, start: int = 0) -> NDArray[np.int64]:
        return np.zeros(len(self.epoch(0, start=start)), np.int64)


class OrderedData:
    """Base class of data sets (base.Data) that are read in a TrainOrder and a ValOrder."""

    _error_prefix = "data"
    repeats: int  # views of each sample in a training batch
    held_out: float = 0.0  # the share of the training set that replaces the evaluation set
    # only samples with these labels are read; None: all
    used_classes: tuple[int, ...] | None = None
    # called with the set that has the samples; returns the number of its samples, or their labels
    _samples: Callable[[Part], int]
    _labels: Callable[[Part], NDArray[np.int64]]
    # called with a part, an order, seed= and threads=; returns the loader of one rank
    _loader: Callable[..., Any]

    def _hold_out(self, share: float) -> None:
        require_data(
            isinstance(share, (int, float)) and 0 <= share < 1,
            f"{self._error_prefix}: held_out must be a share in 0..1, 1 excluded; got {share!r}",
        )
        self.held_out = share

    def with_classes(self, classes: tuple[int, ...]) -> Self:
        """The same sets without the samples of other classes; labels do not change."""
        data = copy.copy(self)
        data.used_classes = classes
        return data

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
        ids = self.ids("train")
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
        ids = self.ids("val")
        return self._loader(
            "val",
            ValOrder(samples=len(ids), ids=ids, rank=rank, world=world, micro_batch=micro_batch),
            seed=0,
            threads=threads,
        )

    def stored_part(self, part: Part) -> Part:
        """The set that has the samples of `part`."""
        return "train" if self.held_out else part

    def ids(self, part: Part) -> NDArray[np.int64]:
        """The ids of the used samples of `part`, in ascending order.

        Raises: DataError if no sample has one of the used classes.
        """
        stored = self.stored_part(part)
        samples = self._samples(stored)
        ids = split_held_out(samples, self.held_out)[part] if self.held_out else np.arange(samples)
        if self.used_classes is not None:
            ids = ids[np.isin(self._labels(stored)[ids], self.used_classes)]
            require_data(
                len(ids),
                f"{self._error_prefix}: {part} must have samples of the classes"
                f" {self.used_classes}; got none",
            )
        return ids


def permutation(samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The positions 0 to samples - 1, sorted by their random bits: [samples].

    Equal bits keep their order. The result is the same with every version of numpy.
    """
    return np.argsort(bits(seed, epoch, np.arange(samples), ORDER), kind="stable")


def split_held_out(samples: int, share: float) -> dict[Part, NDArray[np.int64]]:
    """Split the ids of a training set into "train" and "val", the same for every seed.

    "val" has the share `share`. Hyperparameters such as learning rates are chosen on it, never on
    the test set.
    """
    order = np.argsort(bits(0, 0, np.arange(samples), HELD_OUT), kind="stable")
    count = round(samples * share)
    return {"train": np.sort(order[count:]), "val": np.sort(order[:count])}


def _check_rank(rank: int, world: int, micro_batch: int) -> None:
    require_data(
        0 <= rank < world and micro_batch >= 1,
        "data: rank must be in 0..world-1, and micro_batch 1 or more; got"
        f" rank={rank}, world={world}, micro_batch={micro_batch}",
    )
