"""A cache on disk for a teacher's predictions. A second run with the same views needs no teacher.

A view is a pure function of (data set, seed, epoch, sample), so its prediction can be stored. A
folder per data set and teacher contains one folder per seed, with files per epoch. Every process
appends whole records to its own files. Any number of runs and ranks can therefore write at the same
time, and a process may die at any point.
"""

# B batch, K classes

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

from pipeline.core.checks import require

Storage = Literal["fp32", "fp16", "bf16"]
_TYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Location and size limit of stored predictions.

    Args:
        folder: a folder that every worker sees; several runs may share it.
        limit_gb: the maximum size of the folder, in 10^9 bytes. A run whose predictions would not
            fit is refused before it starts.
        storage: "fp32" is exact. The others halve the bytes and round the predictions, also at
            their first use, so that all runs with this cache learn from the same numbers.
    """

    folder: Path
    limit_gb: float
    storage: Storage = "fp32"

    def __post_init__(self) -> None:
        require(self.limit_gb > 0, f"Cache: limit_gb must be above 0; got {self.limit_gb}")
        require(
            self.storage in _TYPES,
            f"Cache: storage must be one of {', '.join(_TYPES)}; got {self.storage!r}",
        )

    def check(self, kept: Path, *, answers: int, classes: int) -> None:
        """Check that `answers` predictions of a run fit; `kept` may already contain some of them.

        Raises: ValueError that names the needed and the allowed size.
        """
        planned = answers * record(classes, self.storage).itemsize
        whole = _bytes(Path(self.folder))
        needed = whole + max(0, planned - _bytes(kept))
        require(
            needed <= self.limit_gb * 1e9,
            f"Cache: {self.folder} must hold {needed / 1e9:.3g} GB, {whole / 1e9:.3g} of them"
            f" there already, for the {answers} answers of this run; got"
            f" limit_gb={self.limit_gb:g}",
        )


class CachedPredictions:
    """The stored predictions of one seed, read and extended by one process.

    Raises: ValueError for a damaged record.
    """

    def __init__(self, folder: Path, *, classes: int, storage: Storage, rank: int) -> None:
        self.folder, self.storage = folder, storage
        self._record = record(classes, storage)
        self._writer = f"rank{rank}-{os.getpid()}-{time.time_ns():x}"
        self._epoch: int | None = None
        # by sample: the file, the number of the record, and the file's records
        self._places: dict[int, tuple[Path, int, NDArray[np.void]]] = {}

    def find(self, epoch: int, index_B: Tensor) -> Tensor | None:
        """The predictions for these samples in this epoch's views, fp32 on the CPU.

        The result is None unless all are stored.
        """
        if epoch != self._epoch:
            self._epoch, self._places = epoch, {}
            for path in sorted(self.folder.glob(f"epoch-{epoch:06d}.*.answers")):
                # A process that died may have left an incomplete last record.
                whole = path.stat().st_size // self._record.itemsize
                if whole:  # an empty file cannot be mapped
                    records = np.memmap(path, self._record, mode="r", shape=(whole,))
                    for row, sample in enumerate(records["sample"].tolist()):
                        self._places[sample] = (path, row, records)
        samples = index_B.tolist()
        if not self._places.keys() >= set(samples):
            return None
        answers = []
        for path, row, records in (self._places[sample] for sample in samples):
            require(
                records[row]["check"] == _checksum(records[row]),
                f"Cache: record {row} of {path} must have its checksum; it is damaged: delete the"
                " file",
            )
            answers.append(records[row]["answer"])
        return torch.from_numpy(np.stack(answers)).view(_TYPES[self.storage]).float()

    def add(self, epoch: int, index_B: Tensor, logits_BK: Tensor) -> Tensor:
        """Store predictions, and return them as a later read does."""
        stored_BK = logits_BK.detach().cpu().to(_TYPES[self.storage]).contiguous()
        records = np.zeros(len(index_B), self._record)
        records["sample"] = index_B.numpy()
        records["answer"] = stored_BK.view(torch.uint8).numpy()
        records["check"] = [_checksum(each) for each in records]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"epoch-{epoch:06d}.{self._writer}.answers").open("ab") as file:
            file.write(records.tobytes())
        return stored_BK.float().to(logits_BK.device)


def record(classes: int, storage: Storage) -> np.dtype[np.void]:
    """The format of one prediction on disk."""
    return np.dtype(
        [("sample", "<i8"), ("check", "<u8"), ("answer", "u1", classes * _TYPES[storage].itemsize)]
    )


def _checksum(stored: np.void) -> int:
    return xxhash.xxh3_64_intdigest(stored["sample"].tobytes() + stored["answer"].tobytes())


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
