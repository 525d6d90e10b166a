"""The interface of data to the training loop: a batch, a loader, a data set."""

# B batch (samples of one micro-batch on one rank), T time, C channels, H W pixels

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from pipeline.core.errors import DataError, LoaderError

__all__ = [
    "Batch",
    "Data",
    "DataError",
    "Loader",
    "LoaderError",
    "with_page_checks",
]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank. It owns its memory, so it may be kept."""

    x: Tensor  # float32, normalised: images [B,C,H,W], or recordings [B,T,C,H,W]
    target: Tensor  # int64 [B]
    index: Tensor  # int64 [B], positions of the samples in the file


@runtime_checkable
class Loader(Protocol):
    """The batches of one rank."""

    samples: int  # in the whole set, over all ranks
    # Training: global batches in an epoch, `samples // batch_size`. Evaluation: batches of this
    # rank, which may be 0.
    steps_per_epoch: int

    def epoch(self, epoch: int, *, start: int = 0) -> AbstractContextManager[Iterator[Batch]]:
        """The micro-batches of this rank, in order. Leaving the context stops reading ahead.

        Args:
            epoch: selects order, augmentation and the pages that are compared (page_checks.py);
                order and augmentation of an evaluation do not depend on it.
            start: samples of this epoch that all ranks together have consumed, a multiple of the
                global batch size.

        Raises:
            DataError: a sample cannot be decoded, or `start` is invalid.
            LoaderError: reading failed or hung.
        """
        ...

    def close(self) -> None:
        """Stop all threads and release the file. May be called twice."""


@runtime_checkable
class Data(Protocol):
    """A training and an evaluation set: the value of `recipe.data`.

    The constructor opens no file.
    """

    @property
    def classes(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample of `Batch.x`: (C, H, W) for an image, (T, C, H, W) for a recording.

        T is the recipe's `time_steps`.
        """
        ...

    def fingerprint(self) -> str:
        """A hash of the content of both sets. It is part of the study key.

        It does not depend on files and pages.

        Raises: DataError if the data is missing.
        """
        ...

    def check(self) -> None:
        """Read the training and evaluation samples once and compare checksums.

        Raises: DataError with the file and the page that differ.
        """

    def train(
        self, *, seed: int, rank: int, world: int, batch_size: int, micro_batch: int, threads: int
    ) -> Loader:
        """The training set, in one global permutation per epoch from (seed, epoch).

        A global batch has accumulation x world x micro_batch samples.

        Micro-batch a of rank r takes rows `(a*world + r)*micro_batch` to `(a*world + r +
        1)*micro_batch` of each global batch. The samples after the last whole global batch of an
        epoch are dropped.
        """
        ...

    def val(self, *, rank: int, world: int, micro_batch: int, threads: int) -> Loader:
        """The evaluation set: all ranks together yield each sample once, without padding.

        The last batch may be short, and a rank may have no batch.
        """
        ...


def with_page_checks(data: Data, one_in: int) -> Data:
    """The same sets with page checks: one in `one_in` samples has its page compared; 0: none.

    Data without a method of this name has no pages and is returned unchanged.
    """
    checked = getattr(data, "with_page_checks", None)
    return data if checked is None else checked(one_in)
