"""The two files of a folder, `train.beton` and `val.beton`: their identity, and which of their samples a run uses.

Nothing is opened before it is asked for, so a recipe can be shown where its data is not.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data import format as beton
from pipeline.data import manifest as manifests
from pipeline.data.errors import DataError
from pipeline.data.manifest import Manifest
from pipeline.data.order import TrainOrder, ValOrder, held_out
from pipeline.data.page_checks import check

Name = Literal["train", "val"]


@dataclass(frozen=True)
class Files:
    """`owner` is the name that refusals begin with. `held_out`: the share of the training set to evaluate on, see order.py.
    `only`: the labels whose samples are used; None: all. `repeats`: views of each sample in a training batch, see order.py.
    `one_in`: samples that are read for each one whose page is compared with its checksum; 0: no page is compared.

    Raises: DataError for a share outside 0..1.
    """

    owner: str
    folder: Path
    classes: int
    held_out: float
    only: tuple[int, ...] | None = None
    repeats: int = 1
    one_in: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise DataError(f"{self.owner}: held_out must be a share in 0..1, 1 excluded; got {self.held_out}")

    def path(self, name: Name) -> Path:
        return self.folder.expanduser() / f"{name}.beton"

    def manifest(self, name: Name) -> Manifest:
        """Raises: DataError if the file is missing or has another number of classes."""
        manifest = manifests.read(self.path(name))
        if len(manifest.classes) != self.classes:
            raise DataError(
                f"{self.owner}: classes must be those of {self.path(name)}, {len(manifest.classes)}; got {self.classes}"
            )
        return manifest

    def fingerprint(self) -> str:
        """See base.Data."""
        parts = [self.manifest(name).content for name in ("train", "val")]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def check(self) -> None:
        """See base.Data. Where a share of the training file is held out nobody reads the other beyond its manifest."""
        read: tuple[Name, ...] = ("train",) if self.held_out else ("train", "val")
        for name in read:
            check(self.path(name))
        if self.manifest("train").classes != self.manifest("val").classes:
            raise DataError(f"{self.owner}: train and val in {self.folder} must have the same classes, in the same order")

    def train_order(self, *, seed: int, rank: int, world: int, batch_size: int, micro_batch: int) -> tuple[Path, TrainOrder]:
        """The file to train on, and in which order."""
        ids = self._ids("train")
        sizes: dict[str, Any] = {"rank": rank, "world": world, "batch_size": batch_size, "micro_batch": micro_batch}
        return self.path("train"), TrainOrder(samples=len(ids), seed=seed, ids=ids, repeats=self.repeats, **sizes)

    def val_order(self, *, rank: int, world: int, micro_batch: int) -> tuple[Path, ValOrder]:
        """The file to evaluate on, and in which order: with a share held out, that share of the training file."""
        ids = self._ids("val")
        order = ValOrder(samples=len(ids), ids=ids, rank=rank, world=world, micro_batch=micro_batch)
        return self.path("train" if self.held_out else "val"), order

    def groups(self, use: Name, by: str) -> list[str]:
        """What each sample of the file that `use` reads belongs with, at its place in the file (`Batch.index`).

        Raises: DataError if the file's manifest does not group its samples so.
        """
        path = self.path("train" if self.held_out else use)
        groups = self.manifest("train" if self.held_out else use).groups
        if by not in groups:
            known = f"by {', '.join(sorted(groups))}" if groups else "not at all"
            raise DataError(f"{self.owner}: {path} must group its samples by {by!r}; it groups them {known}")
        return groups[by]

    def _ids(self, use: Name) -> NDArray[np.int64]:
        if self.held_out:
            train, chosen_on = held_out(self.manifest("train").samples, self.held_out)
            ids = train if use == "train" else chosen_on
        else:
            ids = np.arange(self.manifest(use).samples)
        if self.only is None:
            return ids
        path = self.path("train" if self.held_out else use)
        ids = ids[np.isin(beton.samples(path).labels[ids], self.only)]
        if not len(ids):
            raise DataError(f"{self.owner}: {path} must hold samples of the classes {self.only} to {use} on; got none")
        return ids
