"""What the training loop knows of data: a batch, a loader, a data set, and how they fail."""

# B batch (samples of one micro-batch on one rank), T time, C channels, H W pixels

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from pipeline.core.errors import DataError, LoaderError

__all__ = [
    "Batch",
    "Data",
    "DataError",
    "Grouped",
    "Loader",
    "LoaderError",
    "OnPages",
    "with_page_checks",
]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank, in memory of its own (it may be kept)."""

    x: Tensor  # float32, normalised: images [B,C,H,W], or recordings [B,T,C,H,W]
    target: Tensor  # int64 [B]
    index: Tensor  # int64 [B], the samples' places in the file


@runtime_checkable
class Loader(Protocol):
    """The batches of one rank."""

    @property
    def samples(self) -> int:
        """Samples in the whole set, over all ranks."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Training: global batches in an epoch, `samples // batch_size`. Evaluation: batches of
        this rank (0 if it has none).
        """
        ...

    def epoch(self, epoch: int, *, start: int = 0) -> AbstractContextManager[Iterator[Batch]]:
        """The micro-batches of this rank, in order. Leaving the context stops whatever was reading
        ahead.

        `epoch`: selects order and augmentation (evaluation: neither depends on it), and which pages
        are compared, see page_checks.py.
        `start`: samples of this epoch that all ranks together have consumed, a multiple of the
        global batch size.

        Raises: DataError (a sample that cannot be decoded, a bad `start`), LoaderError (an error or
        a hang below)."""
        ...

    def close(self) -> None:
        """Stop everything that was started. May be called twice."""
        ...


@runtime_checkable
class Data(Protocol):
    """A training and an evaluation set: what `recipe.data` builds. Constructing one opens no
    file.
    """

    @property
    def classes(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample of `Batch.x`: (C, H, W) of an image, (T, C, H, W) of a recording, whose T is
        the recipe's `time_steps`.
        """
        ...

    def fingerprint(self) -> str:
        """A hash of the content of both sets, whatever file or page holds it: part of the study
        key.

        Raises: DataError if the data is missing.
        """
        ...

    def check(self) -> None:
        """Read once what is trained and evaluated on, and compare checksums.

        Raises: DataError with the file and the page that differ.
        """
        ...

    def train(
        self, *, seed: int, rank: int, world: int, batch_size: int, micro_batch: int, threads: int
    ) -> Loader:
        """One global permutation an epoch, from (seed, epoch). A global batch is accumulation x
        world x micro_batch samples.

        Micro-batch a of rank r takes rows `(a*world + r)*micro_batch` to `(a*world + r +
        1)*micro_batch` of each global batch; what is left of the epoch after its last whole global
        batch is dropped.
        """
        ...

    def val(self, *, rank: int, world: int, micro_batch: int, threads: int) -> Loader:
        """Each sample once over all ranks: nothing dropped, nothing padded. The last batch may be
        short, a rank may have none.
        """
        ...


@runtime_checkable
class Grouped(Protocol):
    """A data set that knows what its samples belong with."""

    def fingerprint(self) -> str: ...

    def groups(self, use: Literal["train", "val"], *, by: str) -> list[str]:
        """Of each sample, at its place in the file that `use` reads (`Batch.index`).

        Raises: DataError if the samples are not grouped so.
        """
        ...


@runtime_checkable
class OnPages(Data, Protocol):
    """A data set in files with a checksum for each page."""

    def with_page_checks(self, one_in: int) -> Data:
        """The same sets; one in so many samples that are read has its page compared, 0: none."""
        ...


def with_page_checks(data: Data, one_in: int) -> Data:
    """The same sets, with pages compared while they are read; data without pages as it is."""
    return data.with_page_checks(one_in) if isinstance(data, OnPages) else data
