"""Image data sets in files: train.beton and val.beton of a folder."""

import copy
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from pipeline.core.errors import require_data
from pipeline.data.ffcv.files import FileData, Part, check_view_options

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VAL_RATIO = 224 / 256  # of the shorter side, as if it were resized to 256 and then cropped to 224


class Beton(FileData):
    """Square images of `size` pixels a side with `channels` 3 (RGB) or 1 (luma).

        crop        training                                            evaluation
        "resized"   random resized crop (`area` 0.08-1, `ratio`         central 224/256, resized
                    3/4-4/3), as usual for ImageNet
        "shift"     window shifted by up to `reach` pixels (4),         central window
                    black outside, as usual for CIFAR
        "centre"    central 224/256, resized                            the same

    "shift" never resizes. The sides of its images may differ from `size` by at most a quarter of
    `size`. A window of 32 pixels shows an image of 28 pixels with black around it.

    Args:
        flip: "random" mirrors a training image with probability 1/2; "never" does not.
        resize: "area" averages the pixels of a crop, as FFCV does; "bicubic" is Pillow's, as usual
            in timm (ffcv/bicubic.py); None: "area".
        colour: the mean magnitude, 0 to 10, of RandAugment's colour operations on training images
            (ffcv/strong_augment.py); 0: none.
        cutout: the side in pixels of a square of each training image that becomes the mean
            (ffcv/strong_augment.py); 0: none.
        erase: the probability that a rectangle of a training image becomes noise
            (ffcv/strong_augment.py).
        mean, std: of each channel, for pixels scaled to 0..1.
        held_out: the share of the training set that replaces the evaluation set and is not trained
            on. Choose learning rates on this share, for example with `--set data.held_out=0.1`.
        repeats: views of each sample in a training batch. An epoch then uses one in `repeats` of
            the samples (order.py).

    Raises:
        DataError: an option is unknown or out of range, contradicts another or has no effect.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        classes: int,
        size: int,
        channels: int = 3,
        crop: Literal["resized", "shift", "centre"] = "resized",
        flip: Literal["random", "never"] = "random",
        area: tuple[float, float] | None = None,
        ratio: tuple[float, float] | None = None,
        reach: int | None = None,
        resize: Literal["area", "bicubic"] | None = None,
        colour: float = 0.0,
        cutout: int = 0,
        erase: float = 0.0,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        held_out: float = 0.0,
        repeats: int = 1,
    ) -> None:
        super().__init__(
            folder,
            classes=classes,
            shape=(channels, size, size),
            held_out=held_out,
            repeats=repeats,
        )
        self.crop, self.flip, self.mean, self.std = crop, flip, tuple(mean), tuple(std)
        self.colour, self.cutout, self.erase = float(colour), cutout, float(erase)
        require_data(
            min(classes, size, repeats) >= 1
            and channels in (1, 3)
            and 0 <= colour <= 10
            and 0 <= cutout <= size
            and 0 <= erase <= 1,
            "Beton: classes, size and repeats must be 1 or more, channels 1 or 3, colour in 0..10,"
            f" cutout in 0..size, erase in 0..1; got classes={classes}, size={size},"
            f" repeats={repeats}, channels={channels}, colour={colour}, cutout={cutout},"
            f" erase={erase}",
        )
        require_data(
            not colour or channels != 1,
            f"Beton: colour has no effect on images of 1 channel; got colour={colour}",
        )
        check_view_options(self, channels, size, crops=("resized", "shift", "centre"), reach=reach)
        _check_crop_options(crop, area=area, ratio=ratio, resize=resize)
        self.resize: Literal["area", "bicubic"] = resize or "area"
        self.area, self.ratio = area or (0.08, 1.0), ratio or (3 / 4, 4 / 3)
        self.reach = 4 if reach is None else reach
        self._has_levels = False

    @property
    def picture_options(self) -> dict[str, Any]:
        """How the pictures were stored: `Manifest.options`. Raises: DataError as `fingerprint`."""
        return self._manifest("train").options

    def with_levels(self) -> Self:
        data = copy.copy(self)
        data._has_levels = not (self.cutout or self.erase)
        return data

    def _loader(self, *arguments: Any, **options: Any) -> Any:
        loader = super()._loader(*arguments, **options)
        size, sides = self.shape[1], [loader.records["width"], loader.records["height"]]
        shortest, longest = int(np.min(sides)), int(np.max(sides))
        require_data(
            self.crop != "shift" or max(size - shortest, longest - size) <= size // 4,
            f"Beton: crop='shift' does not resize: the sides of the images in {loader.path} must"
            f" differ by at most a quarter from size={size}; got {shortest} to {longest}; choose"
            " crop='resized' or write the data with max_resolution",
        )
        return loader

    def _decoder(self, part: Part, path: Path, *, parallel: bool) -> Any:
        from pipeline.data.ffcv.augment import CENTRE, RESIZED, WINDOW, DecodeImages

        channels, size, _ = self.shape
        is_train = part == "train"
        kind = {
            "shift": WINDOW,
            "resized": RESIZED if is_train else CENTRE,
            "centre": CENTRE,
        }[self.crop]
        return DecodeImages(
            kind=kind,
            size=size,
            channels=channels,
            reach=self.reach if is_train else 0,
            flip=is_train and self.flip == "random",
            area=self.area if kind == RESIZED else (VAL_RATIO, VAL_RATIO),
            ratio=self.ratio,
            colour=self.colour if is_train else 0.0,
            cutout=self.cutout if is_train else 0,
            erase=self.erase if is_train else 0.0,
            resize=self.resize,
            strong=self.colour > 0 or self.erase > 0,
            mean=self.mean,
            std=self.std,
            has_levels=self._has_levels,
            parallel=parallel,
        )


def _check_crop_options(crop: str, *, area: Any, ratio: Any, resize: str | None) -> None:
    require_data(
        resize is None or (resize in ("area", "bicubic") and crop != "shift"),
        "Beton: resize must be 'area' or 'bicubic', and has no effect with crop='shift'; got"
        f" {resize!r}",
    )
    for name, value, bound in (("area", area, " <= 1"), ("ratio", ratio, "")):
        require_data(
            value is None or crop == "resized",
            f"Beton: {name} has no effect with crop={crop!r}; leave it out or set crop='resized'",
        )
        require_data(
            value is None or (0 < value[0] <= value[1] and (not bound or value[1] <= 1)),
            f"Beton: {name} must be (low, high) with 0 < low <= high{bound}; got {value}",
        )
