"""The event files of a folder as a `Data`: what a recipe names. Constructing one opens no file."""

# T time, B batch, C polarities, H W pixels

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.data.errors import DataError
from pipeline.data.files import Files, Name
from pipeline.data.format import Arrays, layout
from pipeline.data.order import TrainOrder, ValOrder

if TYPE_CHECKING:
    from pipeline.data.reader import BetonLoader


class Events:
    """Recordings as `steps` frames of `channels` x `size` x `size` counts: a sample's `shape` is (steps, channels, size, size).

    `steps`: T; it divides the slices of the file, and as many slices as make one step are summed.
    `channels`: 2 (off, on) or 1 (their sum).
    `crop` of training recordings: "shift" moves the window by up to `reach` pixels (4), the same for all of a recording, and
    nothing comes in; "none" leaves it. `flip`: "random" mirrors every second training recording, all of it; "never" none (a flip
    makes another class of a direction or a digit).
    `mean`, `std`: a value a channel, of the counts of one step; without them counts stay counts.
    `held_out`: as of Beton.

    Raises: DataError for options that contradict each other or have no effect.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        classes: int,
        steps: int,
        size: int,
        channels: int = 2,
        crop: Literal["shift", "none"] = "none",
        flip: Literal["random", "never"] = "never",
        reach: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        held_out: float = 0.0,
    ) -> None:
        self.folder, self.classes, self.shape = Path(folder), classes, (steps, channels, size, size)
        self.crop, self.flip, self.held_out = crop, flip, held_out
        self.mean = (0.0,) * channels if mean is None else tuple(mean)
        self.std = (1.0,) * channels if std is None else tuple(std)
        self._files = Files("Events", self.folder, classes, held_out)
        _check_options(self, reach)
        self.reach = 4 if reach is None else reach

    def fingerprint(self) -> str:
        return self._files.fingerprint()

    def check(self) -> None:
        self._files.check()

    def with_page_checks(self, one_in: int) -> "Events":
        """See base.OnPages."""
        same = copy.copy(self)
        same._files = replace(self._files, one_in=one_in)
        return same

    def train(
        self,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        batch_size: int,
        micro_batch: int,
        threads: int = 1,
        hang_s: float | None = None,
    ) -> "BetonLoader":
        """See base.Data. `hang_s`: the longest wait for one batch in seconds; None: see reader.py."""
        path, order = self._files.train_order(seed=seed, rank=rank, world=world, batch_size=batch_size, micro_batch=micro_batch)
        return self._loader("train", path, order, seed=seed, threads=threads, hang_s=hang_s)

    def val(
        self, *, rank: int = 0, world: int = 1, micro_batch: int, threads: int = 1, hang_s: float | None = None
    ) -> "BetonLoader":
        path, order = self._files.val_order(rank=rank, world=world, micro_batch=micro_batch)
        return self._loader("val", path, order, seed=0, threads=threads, hang_s=hang_s)

    def _loader(
        self, use: Name, path: Path, order: TrainOrder | ValOrder, *, seed: int, threads: int, hang_s: float | None
    ) -> "BetonLoader":
        from pipeline.data.events.read import DecodeEvents
        from pipeline.data.reader import BetonLoader, usable_threads

        threads, train = usable_threads(threads), use == "train"
        decode = DecodeEvents(
            _stored(path, self.shape),
            shape=self.shape,
            reach=self.reach if train and self.crop == "shift" else 0,
            flip=train and self.flip == "random",
            mean=self.mean,
            std=self.std,
            parallel=threads > 1,
        )
        how = {"seed": seed, "threads": threads, "hang_s": hang_s, "one_in": self._files.one_in}
        return BetonLoader(path, decode, order, **how)


def _stored(path: Path, shape: tuple[int, ...]) -> Arrays:
    """What the file holds of a recording, if `shape` can be made of it.

    Raises: DataError for images, for frames of another size, and for a number of steps that does not divide their slices.
    """
    stored = layout(path).kind
    steps, _, size, _ = shape
    if not isinstance(stored, Arrays) or len(stored.shape) != 4 or stored.shape[1] != 2:
        raise DataError(f"Events: {path} must hold frames [slices, 2, H, W]; got {stored}; images are read by Beton")
    slices, _, *sides = stored.shape
    if sides != [size, size]:
        raise DataError(f"Events: size must be the file's, {sides[0]}x{sides[1]} in {path}; got {size}")
    if slices % steps:
        near = [str(each) for each in range(1, slices + 1) if slices % each == 0]
        raise DataError(f"Events: steps must divide the {slices} slices of {path}: {', '.join(near)}; got {steps}")
    return stored


def _check_options(data: Events, reach: int | None) -> None:
    steps, channels, size, _ = data.shape
    if min(data.classes, steps, size) < 1 or channels not in (1, 2):
        raise DataError(
            "Events: classes, steps and size must be 1 or more, channels 1 or 2; "
            f"got classes={data.classes}, steps={steps}, size={size}, channels={channels}"
        )
    if data.crop not in ("shift", "none"):
        raise DataError(f"Events: crop must be 'shift' or 'none'; got {data.crop!r}")
    if data.flip not in ("random", "never"):
        raise DataError(f"Events: flip must be 'random' or 'never'; got {data.flip!r}")
    if len(data.mean) != channels or len(data.std) != channels or min(data.std) <= 0:
        raise DataError(
            f"Events: mean and std must have {channels} values (channels), std above 0; got mean={data.mean}, std={data.std}"
        )
    if reach is not None and data.crop != "shift":
        raise DataError(f"Events: reach has no effect with crop={data.crop!r}; leave it out or set crop='shift'")
    if reach is not None and not 0 <= reach <= size:
        raise DataError(f"Events: reach must be 0..size={size} pixels; got {reach}")
