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
    "with_levels",
    "with_page_checks",
]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank. It owns its memory, so later batches do not overwrite it.

    Fields:
        x: float32, normalised images `[B,C,H,W]` or recordings `[B,T,C,H,W]`; with a table the
            levels of images, uint8 `[B,C,H,W]`
        target: int64 `[B]`
        index: int64 `[B]`, the positions of the samples in the file
        table: float32 `[C,256]`, the normalised value of each level of a channel; None: `x` is
            float32
    """

    x: Tensor
    target: Tensor
    index: Tensor
    table: Tensor | None = None


@runtime_checkable
class Loader(Protocol):
    """The batches of one rank."""

    samples: int  # of the whole set, over all ranks
    # Training: the global batches of an epoch, `samples // batch_size`. Evaluation: the batches of
    # this rank; their number may be 0.
    steps_per_epoch: int

    def epoch(self, epoch: int, *, start: int = 0) -> AbstractContextManager[Iterator[Batch]]:
        """The micro-batches of this rank, in order. Leaving the context stops reading ahead.

        Args:
            epoch: selects the order, the augmentation and the pages that are compared
                (page_checks.py). In an evaluation it selects only the pages.
            start: the number of samples of this epoch that all ranks together have consumed. It is
                a multiple of the global batch size, and 0 in an evaluation.

        Raises:
            DataError: a sample cannot be decoded, a page is damaged, or `epoch` or `start` is
                invalid.
            LoaderError: reading failed or hung, or the loader was closed.
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
        """A hash of the samples of both sets. It is part of the study key.

        The hash does not depend on the layout of the files.

        Raises: DataError if a file is missing, or does not match its manifest or the options.
        """
        ...

    def check(self) -> None:
        """Read the training and evaluation samples once and compare checksums.

        Raises:
            DataError: a file is missing or damaged, or the two sets do not match. The message names
                the file.
            OSError: the storage fails.
        """

    def train(
        self, *, seed: int, rank: int, world: int, batch_size: int, micro_batch: int, threads: int
    ) -> Loader:
        """The training set. `seed` and the epoch determine the order of the whole set.

        A global batch has batch_size = accumulation x world x micro_batch samples. Each rank reads
        `accumulation` micro-batches of it. Micro-batch a of rank r holds `micro_batch` rows of the
        global batch, from row `(a*world + r)*micro_batch` on. The samples after the last whole
        global batch of an epoch are dropped.

        Args:
            world: the number of ranks.
            micro_batch: the samples of one batch on one rank.
        """
        ...

    def val(self, *, rank: int, world: int, micro_batch: int, threads: int) -> Loader:
        """The evaluation set: all ranks together yield each sample once, without padding.

        The last batch may be short, and a rank may have no batch.
        """
        ...


def with_page_checks(data: Data, one_in: int) -> Data:
    """The same data. Its loaders compare the page of one in `one_in` samples with its checksum.

    With 0 the loaders compare no page. Data without a method `with_page_checks` has no pages and is
    returned unchanged.
    """
    method = getattr(data, "with_page_checks", None)
    return data if method is None else method(one_in)


def with_levels(data: Data) -> Data:
    """The same data. Where it can, it leaves the lookup of normalised values to the consumer.

    Levels are a quarter of the bytes of floats. These batches have floats nevertheless:

        Beton with `erase` or `cutout`   noise, and the mean, are no levels
        Events                           sums of counts have no bound
        Synthetic                        draws floats
        other data                       has no method `with_levels`, and is returned unchanged
    """
    method = getattr(data, "with_levels", None)
    return data if method is None else method()
