"""The event files of a folder as a `Data`: what a recipe names. Constructing one opens no file."""

# T time, B batch, C polarities, H W pixels

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.data.errors import DataError
from pipeline.data.files import Files

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

    def train(
        self, *, seed: int, rank: int = 0, world: int = 1, batch_size: int, micro_batch: int, threads: int = 1
    ) -> "BetonLoader":
        raise DataError("Events: reading is not written yet")

    def val(self, *, rank: int = 0, world: int = 1, micro_batch: int, threads: int = 1) -> "BetonLoader":
        raise DataError("Events: reading is not written yet")


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
