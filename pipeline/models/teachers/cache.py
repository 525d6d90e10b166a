"""A cache on disk for a teacher's predictions, which saves the teacher's forward passes.

A view of a sample is a pure function of (data set, seed, epoch, sample), so a second run sees the
same views and can read their predictions. A folder per data set and teacher contains one folder per
seed, with files per epoch. Every process appends whole records to its own files. Any number of runs
and ranks can therefore write at the same time, and a process may die at any point.
"""

# B batch, K classes

import math
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
        limit_gb: largest size of the folder in 10^9 bytes. A run that would exceed this size is
            refused before it starts. Runs that start together may exceed it.
        storage: "fp32" is exact. "fp16" and "bf16" halve the bytes and round the predictions. A
            prediction is rounded at its first use too, so all runs learn from the same numbers.

    Raises: ValueError for a limit of 0 or below, or an unknown `storage`.
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

    def check(self, seed_folder: Path, *, predictions: int, classes: int) -> None:
        """Check that a run's predictions fit into the cache.

        `seed_folder` may already contain some of them.

        Raises: ValueError if they do not fit.
        """
        run_bytes = predictions * record_format(classes, self.storage).itemsize
        stored_bytes = _bytes(Path(self.folder))
        needed_bytes = stored_bytes + max(0, run_bytes - _bytes(seed_folder))
        require(
            needed_bytes <= self.limit_gb * 1e9,
            f"Cache: limit_gb must be at least {math.ceil(needed_bytes / 1e6) / 1e3:g} for the"
            f" {predictions} predictions of this run, because {self.folder} holds"
            f" {stored_bytes / 1e9:.3g} GB already; got limit_gb={self.limit_gb:g}",
        )


class CachedPredictions:
    """The stored predictions of one seed. One process reads them and adds to them."""

    def __init__(self, folder: Path, *, classes: int, storage: Storage, rank: int) -> None:
        self.folder, self.storage = folder, storage
        self._format = record_format(classes, storage)
        self._writer = f"rank{rank}-{os.getpid()}-{time.time_ns():x}"
        self._epoch: int | None = None
        # by sample: the file, the number of the record, and the file's records
        self._locations: dict[int, tuple[Path, int, NDArray[np.void]]] = {}

    def find(self, epoch: int, index_B: Tensor) -> Tensor | None:
        """The predictions for the samples `index_B` in the views of `epoch`, in fp32 on the CPU.

        None if one of them was not stored at the first `find` of this epoch.

        Raises: ValueError for a damaged record.
        """
        if epoch != self._epoch:
            self._epoch, self._locations = epoch, {}
            for path in sorted(self.folder.glob(f"epoch-{epoch:06d}.*.answers")):
                # A process that died may have left an incomplete last record.
                count = path.stat().st_size // self._format.itemsize
                if count:  # an empty file cannot be mapped
                    records = np.memmap(path, self._format, mode="r", shape=(count,))
                    for row, sample in enumerate(records["sample"].tolist()):
                        self._locations[sample] = (path, row, records)
        samples = index_B.tolist()
        if not self._locations.keys() >= set(samples):
            return None
        predictions = []
        for path, row, records in (self._locations[sample] for sample in samples):
            require(
                records[row]["check"] == _checksum(records[row]),
                f"Cache: record {row} of {path} must match its checksum; it is damaged: delete the"
                " file",
            )
            predictions.append(records[row]["answer"])
        return torch.from_numpy(np.stack(predictions)).view(_TYPES[self.storage]).float()

    def add(self, epoch: int, index_B: Tensor, logits_BK: Tensor) -> Tensor:
        """Store predictions. Returns them with the rounding of `find`, on the same device."""
        stored_BK = logits_BK.detach().cpu().to(_TYPES[self.storage]).contiguous()
        records = np.zeros(len(index_B), self._format)
        records["sample"] = index_B.numpy()
        records["answer"] = stored_BK.view(torch.uint8).numpy()
        records["check"] = [_checksum(record) for record in records]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"epoch-{epoch:06d}.{self._writer}.answers").open("ab") as file:
            file.write(records.tobytes())
        return stored_BK.float().to(logits_BK.device)


def record_format(classes: int, storage: Storage) -> np.dtype[np.void]:
    """The format of one prediction on disk. Its logits are the field "answer"."""
    return np.dtype(
        [("sample", "<i8"), ("check", "<u8"), ("answer", "u1", classes * _TYPES[storage].itemsize)]
    )


def _checksum(record: np.void) -> int:
    return xxhash.xxh3_64_intdigest(record["sample"].tobytes() + record["answer"].tobytes())


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
