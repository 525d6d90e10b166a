"""Turns files of pictures into the input of a network, as its evaluation saw pictures.

    network = pipeline.load("runs/birds-sltt")
    x_BCHW = network.pretrained.transform(["robin.jpg", "wren.png"])

The files are written to a temporary .beton with the options of the run's data set, and read by the
loader of its evaluation. So a picture becomes the same tensor, to the bit, as in the run. FFCV is
imported when a file is read.
"""

# B batch, C channels, H W pixels

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.core.checks import require
from pipeline.core.units import counted
from pipeline.data.base import DataError, Loader
from pipeline.recipe.json import decode, encode
from pipeline.recipe.spec import Spec

BATCH = 32


@dataclass(frozen=True)
class Transform:
    """Pictures as the input of a network.

    Args:
        data: the recipe's data, a `Beton`. Its folder is not read.
        options: how its pictures were stored: `Manifest.options`.
    """

    data: Spec
    options: Mapping[str, Any]

    def __call__(self, files: Sequence[str | PathLike[str]]) -> Tensor:
        """Float32 `[B, C, H, W]` of these files, normalised.

        Raises: ValueError if a file cannot be read.
        """
        with self.loader(files, micro_batch=BATCH) as (loader, unreadable):
            require(
                not unreadable,
                f"transform: {counted(len(unreadable), 'picture')} cannot be read, such as"
                f" {next(iter(unreadable.items()), None)}",
            )
            with loader.epoch(0) as batches:
                return torch.cat([batch.x for batch in batches])

    @contextmanager
    def loader(
        self, files: Sequence[str | PathLike[str]], *, micro_batch: int
    ) -> Iterator[tuple[Loader, dict[str, str]]]:
        """The readable files as an evaluation set, in their order, and the reasons of the others.

        Raises: ValueError if no file can be read.
        """
        from pipeline.data.write.images import FileEncoding, Item
        from pipeline.data.write.writer import Source, TooManyUnreadable, write_sets

        # A manifest of stamps also has options of scenes, which no file of a picture needs. Only
        # sets that were written from files have the option `exif`.
        known = {each.name for each in fields(FileEncoding) if each.init} & self.options.keys()
        options: dict[str, Any] = {"exif": "apply"} | {key: self.options[key] for key in known}
        encoding = FileEncoding(**options)
        if encoding.mode == "mixed":  # half of the pictures, by their numbers in the set
            encoding = replace(encoding, mode="jpg")
        classes = [str(number) for number in range(self.data.kwargs["classes"])]
        items = [Item(number, Path(file), 0) for number, file in enumerate(files)]
        with tempfile.TemporaryDirectory(prefix="spiketrain-") as folder:
            source = Source("val", classes, items, "pictures")
            try:
                [manifest] = write_sets([source], Path(folder), encoding, max_unreadable=1.0)
            except TooManyUnreadable as error:
                first = error.unreadable[0]
                raise DataError(
                    f"pictures: none of {counted(len(items), 'file')} can be read, such as"
                    f" {first['image']}: {first['reason']}"
                ) from error
            data = self.data.with_(folder=folder, held_out=0.0).build()
            with closing(data.val(rank=0, world=1, micro_batch=micro_batch, threads=1)) as loader:
                yield loader, {each["image"]: each["reason"] for each in manifest.skipped}


@dataclass(frozen=True)
class Pretrained:
    """What a trained network expects, and what its outputs are."""

    time_steps: int
    class_names: tuple[str, ...]  # (): the data set has no names
    transform: Transform | None  # None: the data set is not one of pictures in files

    def to_json(self) -> dict[str, Any]:
        """Without the number of time steps, and without the folder of the data."""
        to = self.transform
        return {
            "class_names": self.class_names,
            "data": to and encode(to.data.with_(folder=""), paths=True),
            "picture_options": to and to.options,
        }

    @classmethod
    def from_json(
        cls, value: Mapping[str, Any], *, time_steps: int, trusted: Collection[str]
    ) -> "Pretrained":
        data = decode(value["data"], trusted)
        return cls(
            time_steps,
            tuple(value["class_names"]),
            None if data is None else Transform(data, value["picture_options"]),
        )
