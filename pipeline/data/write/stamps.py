"""Writes scenes for a realistic recognition test: a cut-out object on a background.

Both are photographs that three Debian packages install (`stamp_pictures.py`).

    spiketrain write stamps --out data/stamps-0 --size 160 --split 0
    data=spec(Beton, folder="data/stamps-0", classes=13, size=160)

    scene = object (size, mirror, angle, place, brightness) over a crop of a background

Every random number is a pure function of (content seed, split, part, scene). Scene i has class i
mod 13. The objects of a class are shown in turn, so their numbers of scenes differ by at most one.

About a quarter of the objects of each class, and of the backgrounds, are only in the evaluation
set. The others are only in the training set. The manifest stores the "object" and the "ground"
(background) of each scene, for statistics over them (`Beton.groups`).
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import require_data
from pipeline.core.random import below, bits, uniform
from pipeline.data.ffcv.format import Images
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.write.images import Encoding, Item
from pipeline.data.write.stamp_pictures import (
    CLASSES,
    PICTURES_FOLDER,
    Picture,
    Pictures,
    background_image,
    installed_pictures,
    object_image,
    split_pictures,
)
from pipeline.data.write.writer import (
    Encoded,
    Existing,
    Progress,
    Source,
    write_sets,
)

# S side of a scene, h w of a rotated object

SIZES = (32, 1024)  # pixels a side; the shorter side of the smallest background has 1024
MAX_OBJECT_SHARE = 0.9  # the longer side of a rotated object is at most this share of the scene's
MAX_DEGREES = 15.0  # of a rotation in either direction
BRIGHTNESS = 0.3  # the factor of the object's brightness is 0.7 to 1.3
MIN_CROP_SHARE = 0.25  # of the background's shorter side

# The numbers of the draws, see random.py.
_BACKGROUND, _CROP, _CROP_Y, _CROP_X, _SHARE, _FLIP, _ANGLE, _BRIGHTNESS, _Y, _X = range(2048, 2058)


@dataclass(frozen=True)
class Scene:
    """Scene `number` of a `part` (0 train, 1 val) of a split."""

    number: int
    part: int
    split: int
    content_seed: int
    label: int
    object: Picture
    backgrounds: tuple[Picture, ...]  # all backgrounds of the part

    @property
    def background(self) -> Picture:
        return self.backgrounds[self.draw_below(_BACKGROUND, len(self.backgrounds))]

    def draw_bits(self, draw: int) -> int:
        return int(bits(self.content_seed, 2 * self.split + self.part, self.number, draw))

    def draw_below(self, draw: int, n: int) -> int:  # in 0..n-1
        return int(below(self.draw_bits(draw), n))

    def draw_uniform(self, draw: int) -> float:  # in 0..1, 1 excluded
        return float(uniform(self.draw_bits(draw)))

    def __str__(self) -> str:
        return f"scene {self.number} ({self.object.name})"


def scenes(
    pictures: Pictures, count: int, *, part: int, split: int, content_seed: int
) -> Iterator[Scene]:
    """The first `count` scenes of a part. `pictures`: the objects and backgrounds of the part."""
    classes, backgrounds = list(pictures.objects.values()), tuple(pictures.backgrounds)
    for number in range(count):
        scene_of_class, label = divmod(number, len(classes))
        picture = classes[label][scene_of_class % len(classes[label])]
        yield Scene(number, part, split, content_seed, label, picture, backgrounds)


@dataclass(frozen=True, kw_only=True)
class SceneEncoding:
    """Renders and encodes scenes.

    Args:
        size: pixels a side.
        split, content_seed: of the scenes; stored in the manifest.
        smallest: the minimum of the longer side of a rotated object, as a share of `size`.
        mode, quality: as in Encoding.

    Raises:
        DataError: `size` or `smallest` is out of range.
    """

    size: int
    split: int
    content_seed: int
    smallest: float = 0.5
    mode: Literal["jpg", "raw"] = "jpg"
    quality: int = 90

    kind: ClassVar[Images] = Images()

    def __post_init__(self) -> None:
        require_data(
            SIZES[0] <= self.size <= SIZES[1] and 0.1 <= self.smallest <= MAX_OBJECT_SHARE,
            f"write stamps: size must be in {SIZES[0]}..{SIZES[1]} pixels, smallest a share in"
            f" 0.1..{MAX_OBJECT_SHARE}; got size={self.size}, smallest={self.smallest}",
        )

    def __call__(self, scene: Scene) -> Encoded:
        item = Item(scene.number, render(scene, self.size, self.smallest), scene.label)
        encoded = Encoding(mode=self.mode, quality=self.quality)(item)
        assert isinstance(encoded, Encoded), encoded  # pixels from memory can always be stored
        # manifests call a background "ground"
        return replace(
            encoded, groups={"object": scene.object.name, "ground": scene.background.name}
        )


def render(scene: Scene, size: int, smallest: float = 0.5) -> NDArray[np.uint8]:
    """The pixels of a scene: [S,S,3]. `smallest`: see SceneEncoding."""
    pixels_SS3 = np.array(_crop_background(scene, size), np.float32)
    object_hw4 = np.asarray(_transform_object(scene, size, smallest), np.float32)
    height, width, _ = object_hw4.shape
    top, left = scene.draw_below(_Y, size - height + 1), scene.draw_below(_X, size - width + 1)
    colours_hw3, alpha_hw1 = object_hw4[..., :3], object_hw4[..., 3:]  # premultiplied by alpha
    brightness = np.float32(1 + BRIGHTNESS * (2 * scene.draw_uniform(_BRIGHTNESS) - 1))
    window_hw3 = pixels_SS3[top : top + height, left : left + width]
    window_hw3 *= 1 - alpha_hw1 / 255
    window_hw3 += np.minimum(colours_hw3 * brightness, alpha_hw1)
    return np.rint(pixels_SS3).astype(np.uint8)


def _crop_background(scene: Scene, size: int) -> Image.Image:
    whole = background_image(scene.background, round(size / MIN_CROP_SHARE))
    share = MIN_CROP_SHARE + (1 - MIN_CROP_SHARE) * scene.draw_uniform(_CROP)
    side = round(min(whole.size) * share)
    top = scene.draw_below(_CROP_Y, whole.height - side + 1)
    left = scene.draw_below(_CROP_X, whole.width - side + 1)
    return whole.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )


def _transform_object(scene: Scene, size: int, smallest: float) -> Image.Image:
    """The object after scaling, mirroring and rotation, premultiplied by alpha.

    It fits into the scene.
    """
    image = object_image(scene.object, 2 * size)
    degrees = MAX_DEGREES * (2 * scene.draw_uniform(_ANGLE) - 1)
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(abs(degrees)))
    # the longer side of the rectangle around the rotated object, before scaling
    longer = max(image.width * cos + image.height * sin, image.width * sin + image.height * cos)
    share = smallest + (MAX_OBJECT_SHARE - smallest) * scene.draw_uniform(_SHARE)
    scale = share * size / longer
    width, height = (max(1, round(side * scale)) for side in image.size)
    if scene.draw_below(_FLIP, 2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    rotated = image.resize((width, height), Image.Resampling.BICUBIC).rotate(
        degrees, Image.Resampling.BICUBIC, expand=True
    )
    assert max(rotated.size) <= size, (scene, rotated.size)
    return rotated


def write_stamps(
    out: Path,
    *,
    size: int = 160,
    split: int = 0,
    samples: int = 5200,
    val_samples: int = 1040,
    smallest: float = 0.5,
    content_seed: int = 0,
    source: Path | None = None,
    mode: Literal["jpg", "raw"] = "jpg",
    quality: int | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    existing: Existing = "refuse",
) -> list[Manifest]:
    """Write scenes of 13 classes: `samples` for training, and `val_samples` for evaluation.

    Args:
        size: pixels a side.
        split: selects the objects and backgrounds of the evaluation set. It is 0, 1, 2 or 3.
            Split 3 is for choosing settings (stamp_pictures.py).
        smallest: the minimum of the longer side of a rotated object, as a share of `size`.
        content_seed: selects the scenes of a split.
        source: the folder of the packages' pictures; None: /usr/share.
        mode, quality: store as "jpg", with quality 90 by default, or "raw".
        existing: as in `write_sets`.

    Raises:
        DataError: an option is out of range or has no effect, a package is missing, a picture
            cannot be read; also as `write_sets`. Nothing is written if a picture cannot be read.
        LoaderError: as `write_sets`.
    """
    require_data(
        mode != "raw" or quality is None,
        f"write stamps: quality has no effect in mode 'raw'; got {quality}",
    )
    require_data(
        min(samples, val_samples) >= 1 and 0 <= content_seed < 2**63,
        "write stamps: samples and val_samples must be 1 or more, content_seed in 0..2^63-1; "
        f"got samples={samples}, val_samples={val_samples}, content_seed={content_seed}",
    )
    encode = SceneEncoding(
        size=size,
        split=split,
        content_seed=content_seed,
        smallest=smallest,
        mode=mode,
        quality=90 if quality is None else quality,
    )
    folder = PICTURES_FOLDER if source is None else Path(source).expanduser()
    counts = {"train": samples, "val": val_samples}
    sets = _sets(folder, counts, size=size, split=split, content_seed=content_seed)
    return write_sets(
        sets, Path(out), encode, workers=workers, progress=progress, existing=existing
    )


def _sets(
    folder: Path, counts: Mapping[str, int], *, size: int, split: int, content_seed: int
) -> list[Source]:
    """The scenes of each part, from the pictures in `folder`."""
    pictures = installed_pictures(folder)
    parts = zip(split_pictures(pictures, split), counts.items(), strict=True)
    origin = f"{folder.absolute()}, pictures {_check_and_hash(pictures, size)}"
    return [
        Source(
            name,
            list(CLASSES),
            list(scenes(of_part, count, part=part, split=split, content_seed=content_seed)),
            origin,
        )
        for part, (of_part, (name, count)) in enumerate(parts)
    ]


def _check_and_hash(pictures: Pictures, size: int) -> str:
    """Read each picture, to find unreadable ones before the first file is written.

    Returns an id of the pictures: 16 hexadecimal digits of a sha256 over their names and bytes.

    Raises: DataError if a picture cannot be read.
    """
    objects = list(chain(*pictures.objects.values()))
    for picture in objects:
        object_image(picture, 2 * size)
    for picture in pictures.backgrounds:
        background_image(picture, round(size / MIN_CROP_SHARE))
    contents = [
        picture.name.encode() + hashlib.sha256(picture.path.read_bytes()).digest()
        for picture in (*objects, *pictures.backgrounds)
    ]
    return hashlib.sha256(b"".join(contents)).hexdigest()[:16]
