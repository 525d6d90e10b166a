"""The files `train.beton` and `val.beton` of a folder as `Data`: the base of Beton and Events.

Files are opened only when they are needed, so a recipe can be shown without its data. FFCV is
imported when a loader is made.
"""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import require_data
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import read_tables
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.ffcv.page_checks import check
from pipeline.data.order import Ordered, TrainOrder, ValOrder, held_out

Name = Literal["train", "val"]


class FileData(Ordered):
    """Base class of data sets in files; subclasses decode the samples.

    Args:
        classes: the number of classes in the files.
        shape: the shape of a decoded sample.
        held_out: the share of the training file to evaluate on (order.py).
        repeats: views of each sample in a training batch.

    Raises:
        DataError: `held_out` is outside 0..1.
    """

    # makes the `pipeline.data.ffcv.loops.Decoder` of a use and a file; keyword: parallel
    _decoder: Callable[..., Any]

    def __init__(
        self,
        folder: str | Path,
        *,
        classes: int,
        shape: tuple[int, ...],
        held_out: float,
        repeats: int = 1,
    ) -> None:
        self.folder, self.classes, self.shape = Path(folder), classes, shape
        self.held_out, self.repeats = held_out, repeats
        self._one_in = 0  # see page_checks.py
        self._who = type(self).__name__  # the beginning of error messages
        require_data(
            0 <= held_out < 1,
            f"{self._who}: held_out must be a share in 0..1, 1 excluded; got {held_out}",
        )

    def fingerprint(self) -> str:
        """See base.Data."""
        contents = f"{self._manifest('train').content} {self._manifest('val').content}"
        return hashlib.sha256(contents.encode()).hexdigest()

    def check(self) -> None:
        """See base.Data. If a share of the training file is held out, val.beton is not read."""
        check(self._path("train"))
        if not self.held_out:
            check(self._path("val"))
        require_data(
            self._manifest("train").classes == self._manifest("val").classes,
            f"{self._who}: train and val in {self.folder} must have the same classes, in the"
            " same order",
        )

    def groups(self, use: Name, *, by: str) -> list[str]:
        """The group of each sample, indexed by its position in the file (`Batch.index`).

        In a set of stamps, `groups("val", by="object")[i]` is the object in evaluation image i.

        Raises: DataError if the file's manifest has no such groups.
        """
        name = self._file_of(use)
        groups = self._manifest(name).groups
        require_data(
            by in groups,
            f"{self._who}: {self._path(name)} must group its samples by {by!r}; it groups them by"
            f" {', '.join(sorted(groups)) or 'nothing'}",
        )
        return groups[by]

    def with_page_checks(self, one_in: int) -> Self:
        """See base.with_page_checks."""
        same = copy.copy(self)
        same._one_in = one_in
        return same

    def _loader(self, use: Name, order: TrainOrder | ValOrder, *, threads: int, **how: Any) -> Any:
        from pipeline.data.ffcv.reader import BetonLoader, usable_threads

        threads, path = usable_threads(threads), self._path(self._file_of(use))
        decode = self._decoder(use, path, parallel=threads > 1)
        return BetonLoader(path, decode, order, threads=threads, one_in=self._one_in, **how)

    def _file_of(self, use: Name) -> Name:
        return "train" if self.held_out else use

    def _path(self, name: Name) -> Path:
        return self.folder.expanduser() / f"{name}.beton"

    def _manifest(self, name: Name) -> Manifest:
        """Raises: DataError if the file is missing or its number of classes differs."""
        manifest = manifests.read(self._path(name))
        require_data(
            len(manifest.classes) == self.classes,
            f"{self._who}: classes must be those of {self._path(name)},"
            f" {len(manifest.classes)}; got {self.classes}",
        )
        return manifest

    def _ids(self, use: Name) -> NDArray[np.int64]:
        name = self._file_of(use)
        samples = self._manifest(name).samples
        ids = (
            held_out(samples, self.held_out)[use == "val"] if self.held_out else np.arange(samples)
        )
        if self.only is not None:
            ids = ids[np.isin(read_tables(self._path(name)).labels[ids], self.only)]
            require_data(
                len(ids),
                f"{self._who}: {self._path(name)} must hold samples of the classes {self.only} to"
                f" {use} on; got none",
            )
        return ids


def check_views(
    data: Any, channels: int, size: int, *, crops: tuple[str, ...], reach: int | None
) -> None:
    """Check the options that Beton and Events share.

    Raises: DataError for an option that is unknown, contradicts another or has no effect.
    """
    who = type(data).__name__
    for name, value, choices in (
        ("crop", data.crop, crops),
        ("flip", data.flip, ("random", "never")),
    ):
        require_data(
            value in choices,
            f"{who}: {name} must be {' or '.join(map(repr, choices))}; got {value!r}",
        )
    require_data(
        len(data.mean) == channels and len(data.std) == channels and min(data.std) > 0,
        f"{who}: mean and std must have {channels} values (channels), std above 0; got"
        f" mean={data.mean}, std={data.std}",
    )
    require_data(
        reach is None or data.crop == "shift",
        f"{who}: reach has no effect with crop={data.crop!r}; leave it out or set crop='shift'",
    )
    require_data(
        reach is None or 0 <= reach <= size,
        f"{who}: reach must be 0..size={size} pixels; got {reach}",
    )
