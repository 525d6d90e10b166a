"""Data sets of event-camera recordings in files.

    data=spec(Events, folder="data/moving", classes=16, steps=10, size=34)
    time_steps=10                           # the same T

`Batch.x` then contains counts, float32 [B, T, 2, 34, 34], and a rule gets [T, B, 2, 34, 34].

`spiketrain write events SET --out FOLDER` writes the folder. A file holds `slices` frames of counts
by polarity for each recording. `Events` sums neighbouring frames to `steps` frames; `steps` must
divide `slices`. `Synthetic(shape=(T, C, H, W))` has counts of the same shape, and needs no file.
"""

from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import DataError, require_data
from pipeline.data.ffcv.files import FileData, Part, check_view_options
from pipeline.data.ffcv.format import Arrays, read_tables

# T time, B batch, C polarities, H W pixels


class Events(FileData):
    """Recordings as frames of counts; a sample's `shape` is (steps, channels, size, size).

    Args:
        steps: T, a divisor of the slices of the file. The slices of one step are summed.
        channels: 2 (off, on) or 1 (their sum).
        crop: "shift" shifts a whole training recording by up to `reach` pixels (4), with zeros
            outside; "none" does not.
        flip: "random" mirrors a whole training recording with probability 1/2; "never" does not.
            Use "never" if a mirrored direction or digit belongs to another class.
        mean, std: of each channel, for the counts of one step; None: the counts are not normalised.
        held_out: a share of the training recordings, see Beton.

    Raises:
        DataError: an option is out of range, contradicts another or has no effect.
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
        super().__init__(
            folder, classes=classes, shape=(steps, channels, size, size), held_out=held_out
        )
        self.crop, self.flip = crop, flip
        self.mean = (0.0,) * channels if mean is None else tuple(mean)
        self.std = (1.0,) * channels if std is None else tuple(std)
        require_data(
            min(classes, steps, size) >= 1 and channels in (1, 2),
            "Events: classes, steps and size must be 1 or more, and channels 1 or 2; "
            f"got classes={classes}, steps={steps}, size={size}, channels={channels}",
        )
        check_view_options(self, channels, size, crops=("shift", "none"), reach=reach)
        self.reach = 4 if reach is None else reach

    def _decoder(self, part: Part, path: Path, *, parallel: bool) -> Any:
        """Raises: DataError if the file holds other samples than frames, or frames of another
        size, or `steps` does not divide its slices.
        """
        from pipeline.data.ffcv.event_frames import DecodeEvents

        steps, _, size, _ = self.shape
        kind = read_tables(path).kind
        if not isinstance(kind, Arrays) or len(kind.shape) != 4 or kind.shape[1] != 2:
            raise DataError(
                f"Events: {path} must hold frames [slices, 2, H, W]; got {kind}; images are read"
                " by Beton"
            )
        slices, _, *sides = kind.shape
        require_data(
            sides == [size, size],
            f"Events: size must be that of the frames in {path}, {sides[0]}x{sides[1]}; got {size}",
        )
        require_data(
            slices % steps == 0,
            f"Events: steps must divide the {slices} slices of {path}; got {steps}",
        )
        is_train = part == "train"
        return DecodeEvents(
            kind,
            shape=self.shape,
            reach=self.reach if is_train and self.crop == "shift" else 0,
            flip=is_train and self.flip == "random",
            mean=self.mean,
            std=self.std,
            parallel=parallel,
        )
