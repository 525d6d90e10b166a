"""A teacher's answers on disk, so that a second run with the same views never asks.

A view is a pure function of (data set, seed, epoch, sample), which is why its answer can be kept: a
folder for the data set and the teacher, in it one for the seed, in it files of an epoch. Every
process writes files of its own, whole records at their end, so that any number of runs and ranks
may write at one time and a process may die in the middle.
"""

# B batch, K classes

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

Storage = Literal["fp32", "fp16", "bf16"]
_TYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where a teacher's answers are kept, and how many bytes of them.

    Args:
        folder: on storage that every worker sees; several runs may share it.
        limit_gb: 10^9 bytes that the folder may hold. A run whose answers would not fit is refused
        before it begins. storage: "fp32" is exact. The others halve the bytes and round the
        answers, the first time they are used already, so
            that every run with this cache learns from the same numbers.
    """

    folder: Path
    limit_gb: float
    storage: Storage = "fp32"

    def __post_init__(self) -> None:
        if not self.limit_gb > 0:
            raise ValueError(f"Cache: limit_gb must be above 0; got {self.limit_gb}")
        if self.storage not in _TYPES:
            raise ValueError(
                f"Cache: storage must be one of {', '.join(_TYPES)}; got {self.storage!r}"
            )

    def check(self, kept: Path, *, answers: int, classes: int) -> None:
        """Whether `answers` of a run, some of which may be in `kept` already, fit.

        Raises: ValueError that names what is needed and what there is.
        """
        planned = answers * record(classes, self.storage).itemsize
        there, whole = _bytes(kept), _bytes(Path(self.folder))
        needed = whole + max(0, planned - there)
        if needed > self.limit_gb * 1e9:
            raise ValueError(
                f"Cache: {self.folder} must hold {needed / 1e9:.3g} GB, {whole / 1e9:.3g} of them"
                f" there already, for the {answers} answers of this run; got"
                f" limit_gb={self.limit_gb:g}"
            )


class CachedPredictions:
    """The answers of one seed, as one process reads and adds to them.

    Raises: ValueError for a record that is damaged.
    """

    def __init__(self, folder: Path, *, classes: int, storage: Storage, rank: int) -> None:
        self.folder, self.storage = folder, storage
        self._record = record(classes, storage)
        self._writer = f"rank{rank}-{os.getpid()}-{time.time_ns():x}"
        self._epoch: int | None = None
        self._files: list[tuple[Path, NDArray[np.void]]] = []
        self._places: dict[int, tuple[int, int]] = {}  # sample -> (file, record)

    def find(self, epoch: int, index_B: Tensor) -> Tensor | None:
        """The answers for these samples in this epoch's views, fp32 on the host; None unless all of
        them are there.
        """
        self._open(epoch)
        places = [self._places.get(index) for index in index_B.tolist()]
        if not all(places):
            return None
        rows = [self._read(*place) for place in places if place is not None]
        return torch.from_numpy(np.stack(rows)).view(_TYPES[self.storage]).float()

    def add(self, epoch: int, index_B: Tensor, logits_BK: Tensor) -> Tensor:
        """Write answers down; as they will be read again."""
        stored_BK = logits_BK.detach().cpu().to(_TYPES[self.storage]).contiguous()
        records = np.zeros(len(index_B), self._record)
        records["sample"] = index_B.numpy()
        records["answer"] = stored_BK.view(torch.uint8).numpy()
        records["check"] = [_checksum(each) for each in records]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"epoch-{epoch:06d}.{self._writer}.answers").open("ab") as file:
            file.write(records.tobytes())
        return stored_BK.float().to(logits_BK.device)

    def _open(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch, self._files, self._places = epoch, [], {}
        for path in sorted(self.folder.glob(f"epoch-{epoch:06d}.*.answers")):
            whole = (
                path.stat().st_size // self._record.itemsize
            )  # a process that died may have left a part of one
            if not whole:
                continue
            records = np.memmap(path, self._record, mode="r", shape=(whole,))
            self._places.update(
                {
                    sample: (len(self._files), row)
                    for row, sample in enumerate(records["sample"].tolist())
                }
            )
            self._files.append((path, records))

    def _read(self, file: int, row: int) -> NDArray[np.uint8]:
        path, records = self._files[file]
        found = records[row]
        if found["check"] != _checksum(found):
            raise ValueError(
                f"Cache: record {row} of {path} must have its checksum; it is damaged: delete the"
                " file"
            )
        return found["answer"]


def record(classes: int, storage: Storage) -> np.dtype[np.void]:
    """One answer on disk."""
    return np.dtype(
        [("sample", "<i8"), ("check", "<u8"), ("answer", "u1", classes * _TYPES[storage].itemsize)]
    )


def _checksum(found: np.void) -> int:
    return xxhash.xxh3_64_intdigest(found["sample"].tobytes() + found["answer"].tobytes())


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
