"""Predictions for each sample of a run's last evaluation: `RUN/answers.npz`.

Two runs that were evaluated on one set can be compared sample by sample.

B batch, N samples
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.checks import require

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """int64 `[N]` each, one entry a sample."""

    index: Ints  # the sample's place in the evaluation file, as `Batch.index` counts
    target: Ints
    answer: Ints  # the class with the highest mean logit
    # the task to whose evaluation set sample and index belong; None: the run has no phases
    task: Ints | None = None

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.answer == self.target


def answers_of(batches_3B: Iterable[Tensor]) -> Answers:
    """From the index, target and answer of each batch, in their order."""
    parts = [np.zeros((3, 0), np.int64), *(batch_3B.numpy() for batch_3B in batches_3B)]
    index, target, answer = np.concatenate(parts, axis=1)
    return Answers(index=index, target=target, answer=answer)


def write_answers(file: Path, shares: Sequence[Sequence[Answers]], *, tasks: bool) -> None:
    """Write the answers of every rank for each task (`shares[rank][task]`), sorted by task and
    index. The file is whole or absent.

    `tasks`: whether the file has a column with the task of each sample.
    """
    sorted_3N = [_sorted(of_task) for of_task in zip(*shares, strict=True)]
    columns: dict[str, Ints] = dict(
        zip(("index", "target", "answer"), np.concatenate(sorted_3N, axis=1), strict=True)
    )
    if tasks:
        columns["task"] = np.repeat(
            np.arange(len(sorted_3N)), [each.shape[1] for each in sorted_3N]
        )
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("wb") as stream:  # a stream, as savez would add its own suffix to a name
        # numpy's own keyword, allow_pickle, is none of them
        np.savez(stream, **columns)  # type: ignore[arg-type]
    temporary.rename(file)


def read_answers(file: Path) -> Answers:
    """Raises: ValueError if the file is missing or is no such file."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = Answers(**arrays)
    except FileNotFoundError:
        raise ValueError(f"answers: {file} must be there; a run writes it at its end") from None
    except (TypeError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"answers: {file} must hold index, target and answer; it could not be read: {error}"
        ) from error
    columns = [
        column
        for column in (found.index, found.target, found.answer, found.task)
        if column is not None
    ]
    if any(column.ndim != 1 or not np.issubdtype(column.dtype, np.integer) for column in columns):
        raise ValueError(
            f"answers: {file} must hold columns of whole numbers; got"
            f" {', '.join(map(_describe, columns))}"
        )
    require(
        len({len(column) for column in columns}) <= 1,
        f"answers: {file} must hold an entry a sample in each column; got"
        f" {', '.join(map(_describe, columns))}",
    )
    return found


def _describe(column: NDArray[np.generic]) -> str:
    return f"{column.dtype} {list(column.shape)}"


def _sorted(shares: Sequence[Answers]) -> Ints:
    """`[3,N]`: the shares of all ranks in the order of their samples."""
    all_3N = np.concatenate(
        [np.stack([each.index, each.target, each.answer]) for each in shares], axis=1
    )
    return all_3N[:, np.argsort(all_3N[0])]
