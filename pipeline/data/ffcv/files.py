"""The base class of Beton and Events: `train.beton` and `val.beton` of a folder as `base.Data`.

The constructor opens no file, so a recipe can be shown without its data. FFCV is imported when a
.beton is opened.
"""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import require_data
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import read_tables
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.ffcv.page_checks import check_file
from pipeline.data.order import OrderedData, Part, TrainOrder, ValOrder


class FileData(OrderedData):
    """Base class of data sets in files, one for each part; subclasses decode the samples.

    Args:
        classes: the number of classes in the files.
        shape: the shape of a decoded sample.
        held_out: the share of the training file that replaces val.beton as the evaluation set.
        repeats: views of each sample in a training batch (order.py).

    Raises:
        DataError: `held_out` is negative, or 1 or more.
    """

    # called with a part, a path and parallel=; returns a `pipeline.data.ffcv.loops.Decoder`
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
        self.repeats = repeats
        self._one_in = 0  # one in this many samples has its page compared; 0: none (page_checks.py)
        self._error_prefix = type(self).__name__
        self._hold_out(held_out)

    def fingerprint(self) -> str:
        contents = f"{self._manifest('train').content} {self._manifest('val').content}"
        return hashlib.sha256(contents.encode()).hexdigest()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Raises: DataError as `fingerprint`."""
        return tuple(self._manifest("train").classes)

    def check(self) -> None:
        """See base.Data. With `held_out` above 0, val.beton is not read, only its manifest."""
        check_file(self._path("train"))
        if not self.held_out:
            check_file(self._path("val"))
        require_data(
            self._manifest("train").classes == self._manifest("val").classes,
            f"{self._error_prefix}: train and val in {self.folder} must have the same classes, in"
            " the same order",
        )

    def groups(self, part: Part, *, by: str) -> list[str]:
        """The group of each sample, indexed by its position in the file (`Batch.index`).

        In a set of stamps, `groups("val", by="object")[i]` is the object in evaluation image i.
        With `held_out` above 0, both parts have the groups of the whole training file.

        Raises: DataError if the file is missing, or its manifest has no such groups.
        """
        file = self.stored_part(part)
        groups = self._manifest(file).groups
        require_data(
            by in groups,
            f"{self._error_prefix}: {self._path(file)} must group its samples by {by!r}; it groups"
            f" them by {', '.join(sorted(groups)) or 'nothing'}",
        )
        return groups[by]

    def with_page_checks(self, one_in: int) -> Self:
        data = copy.copy(self)
        data._one_in = one_in
        return data

    def _loader(self, part: Part, order: TrainOrder | ValOrder, *, seed: int, threads: int) -> Any:
        from pipeline.data.ffcv import codec
        from pipeline.data.ffcv.loader import BetonLoader, usable_threads

        if codec.HAS_FFCV:
            from pipeline.data.ffcv.reader import FFCVLoader as BetonLoader
        path = self._path(self.stored_part(part))
        decode = self._decoder(part, path, parallel=usable_threads(threads) > 1 and codec.HAS_FFCV)
        return BetonLoader(path, decode, order, seed=seed, threads=threads, one_in=self._one_in)

    def _path(self, file: Part) -> Path:
        return self.folder.expanduser() / f"{file}.beton"

    def _manifest(self, file: Part) -> Manifest:
        """Raises: DataError if the file is missing or its number of classes differs."""
        manifest = manifests.read(self._path(file))
        require_data(
            len(manifest.classes) == self.classes,
            f"{self._error_prefix}: classes must be those of {self._path(file)},"
            f" {len(manifest.classes)}; got {self.classes}",
        )
        return manifest

    def _samples(self, file: Part) -> int:
        return self._manifest(file).samples

    def _labels(self, file: Part) -> NDArray[np.int64]:
        return read_tables(self._path(file)).labels


def check_view_options(
    data: Any, channels: int, size: int, *, crops: tuple[str, ...], reach: int | None
) -> None:
    """Check the options of crop, flip and normalisation that Beton and Events share.

    `crops`: the values that `crop` may have.

    Raises: DataError if an option is unknown or out of range, contradicts another or has no effect.
    """
    error_prefix = type(data).__name__
    for name, value, choices in (
        ("crop", data.crop, crops),
        ("flip", data.flip, ("random", "never")),
    ):
        require_data(
            value in choices,
            f"{error_prefix}: {name} must be {' or '.join(map(repr, choices))}; got {value!r}",
        )
    require_data(
        len(data.mean) == channels and len(data.std) == channels and min(data.std) > 0,
        f"{error_prefix}: mean and std must have {channels} values (channels), std above 0; got"
        f" mean={data.mean}, std={data.std}",
    )
    require_data(
        reach is None or data.crop == "shift",
        f"{error_prefix}: reach has no effect with crop={data.crop!r}; leave it out or set"
        " crop='shift'",
    )
    require_data(
        reach is None or 0 <= reach <= size,
        f"{error_prefix}: reach must be 0..size={size} pixels; got {reach}",
    )
