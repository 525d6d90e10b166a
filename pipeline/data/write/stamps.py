"""From a number to a scene: one object, as large as chance has it, turned a little, somewhere on a
piece of a ground.

    scene = object (brightness) over ground,        each number a pure function of (content seed,
    split, part, scene)

Scene i is of class i mod 13, and the objects of a class take turns, so that each is shown as often
as any other of its class.

Scenes of stamps to train.beton and val.beton with their manifests.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.core.random import below, bits
from pipeline.data.ffcv.format import Images
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.write.encode import Encoded, Encoding, Item, encode
from pipeline.data.write.images import Existing, Progress, check_kept, write_sets
from pipeline.data.write.sources import Source
from pipeline.data.write.stamp_pictures import (
    SHARE,
    Picture,
    Pictures,
    cut_out,
    ground,
    installed,
    parts,
)

# S side of a scene, h w of a turned object


SIZES = (32, 1024)  # pixels a side; the smallest ground has 1024
LARGEST = 0.9  # of the scene's side: that of the turned object's longer side
TURN = 15.0  # degrees to either side
BRIGHTNESS = 0.3  # factor 0.7 to 1.3
SMALLEST_PIECE = 0.25  # of a ground's shorter side

_FIRST_DRAW = 2048  # draws, see random.py
_GROUND, _PIECE, _PIECE_Y, _PIECE_X, _SHARE, _FLIP, _TURN, _BRIGHTNESS, _Y, _X = range(
    _FIRST_DRAW, _FIRST_DRAW + 10
)


@dataclass(frozen=True)
class Scene:
    """What is shown, and the counters that decide how: scene `number` of a `part` (0 train, 1 val)
    of a split.
    """

    number: int
    part: int
    split: int
    content_seed: int
    label: int
    object: Picture
    grounds: tuple[Picture, ...]  # those of the part

    @property
    def ground(self) -> Picture:
        return self.grounds[self.below(_GROUND, len(self.grounds))]

    def draw(self, number: int) -> int:
        return int(bits(self.content_seed, 2 * self.split + self.part, self.number, number))

    def below(self, number: int, n: int) -> int:
        return int(below(self.draw(number), n))

    def unit(self, number: int) -> float:
        """In 0..1, 1 excluded."""
        return (self.draw(number) >> 11) * 2.0**-53

    def __str__(self) -> str:
        return f"scene {self.number} ({self.object.name})"


def scenes(
    pictures: Pictures, count: int, *, part: int, split: int, content_seed: int
) -> Iterator[Scene]:
    """The first `count` scenes of a part, which `pictures` holds."""
    classes, grounds = list(pictures.objects.values()), tuple(pictures.grounds)
    for number in range(count):
        turn, label = divmod(number, len(classes))
        yield Scene(
            number,
            part,
            split,
            content_seed,
            label,
            classes[label][turn % len(classes[label])],
            grounds,
        )


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How scenes are made and stored. `smallest`: the least share of a scene's side that its
    object's longer side takes.

    `split` and `content_seed` have chosen the scenes already; they are kept here for the manifest.
    `mode`, `quality`: as of Encoding.

    Raises: DataError for a size or a share that makes no scene.
    """

    size: int
    split: int
    content_seed: int
    smallest: float = 0.5
    mode: Literal["jpg", "raw"] = "jpg"
    quality: int = 90

    def __post_init__(self) -> None:
        low, high = SIZES
        if not low <= self.size <= high:
            raise DataError(f"write stamps: size must be in {low}..{high} pixels; got {self.size}")
        if not 0.1 <= self.smallest <= LARGEST:
            raise DataError(
                f"write stamps: smallest must be a share in 0.1..{LARGEST}; got {self.smallest}"
            )

    @property
    def kind(self) -> Images:
        return Images()

    def __call__(self, scene: Scene) -> Encoded:
        pixels_SS3 = render(scene, self.size, self.smallest)
        encoded = encode(
            Item(scene.number, pixels_SS3, scene.label),
            Encoding(mode=self.mode, quality=self.quality),
        )
        assert isinstance(encoded, Encoded), encoded  # pixels from memory can always be stored
        return replace(encoded, groups={"object": scene.object.name, "ground": scene.ground.name})


def render(scene: Scene, size: int, smallest: float = 0.5) -> NDArray[np.uint8]:
    """The pixels of a scene: [S,S,3]."""
    shown_SS3 = np.array(_piece(scene, size), np.float32)
    object_hw4 = np.asarray(_turned(scene, size, smallest), np.float32)
    height, width, _ = object_hw4.shape
    top, left = scene.below(_Y, size - height + 1), scene.below(_X, size - width + 1)
    colours_hw3, alpha_hw1 = (
        object_hw4[..., :3],
        object_hw4[..., 3:],
    )  # colours are multiplied by alpha already
    brightness = np.float32(1 + BRIGHTNESS * (2 * scene.unit(_BRIGHTNESS) - 1))
    window_hw3 = shown_SS3[top : top + height, left : left + width]
    window_hw3 *= 1 - alpha_hw1 / 255
    window_hw3 += np.minimum(colours_hw3 * brightness, alpha_hw1)
    return np.rint(shown_SS3).astype(np.uint8)


def object_of(picture: Picture, size: int) -> Image.Image:
    """An object as scenes of `size` pixels need it, alpha-multiplied."""
    return cut_out(picture, longest=2 * size)


def ground_of(picture: Picture, size: int) -> Image.Image:
    """A ground whose smallest piece has `size` pixels a side, where the picture has as many."""
    return ground(picture, shortest=round(size / SMALLEST_PIECE))


def _piece(scene: Scene, size: int) -> Image.Image:
    whole = ground_of(scene.ground, size)
    side = round(min(whole.size) * (SMALLEST_PIECE + (1 - SMALLEST_PIECE) * scene.unit(_PIECE)))
    top, left = (
        scene.below(_PIECE_Y, whole.height - side + 1),
        scene.below(_PIECE_X, whole.width - side + 1),
    )
    return whole.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )


def _turned(scene: Scene, size: int, smallest: float) -> Image.Image:
    """The object mirrored or not, scaled and turned, in a rectangle that fits the scene;
    alpha-multiplied.
    """
    plain = object_of(scene.object, size)
    degrees = TURN * (2 * scene.unit(_TURN) - 1)
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(abs(degrees)))
    # The longer side of the rectangle around the turned object, before it is scaled.
    longer = max(plain.width * cos + plain.height * sin, plain.width * sin + plain.height * cos)
    scale = (smallest + (LARGEST - smallest) * scene.unit(_SHARE)) * size / longer
    width, height = (max(1, round(side * scale)) for side in plain.size)
    if scene.below(_FLIP, 2):
        plain = plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = plain.resize((width, height), Image.Resampling.BICUBIC).rotate(
        degrees, Image.Resampling.BICUBIC, expand=True
    )
    assert max(turned.size) <= size, (scene, turned.size)
    return turned


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
    """Scenes of 13 classes, `size` pixels a side: `samples` to train on, `val_samples` of other
    objects to evaluate on.

    `split`: which objects and grounds evaluate, 0, 1 or 2, or 3 to choose settings on
    (pictures.py). `smallest`: the least share of a scene's side that an object takes.
    `content_seed`: selects the scenes, not the split.
    `source`: what holds the packages' pictures; None: /usr/share.
    `mode`, `quality`: pixels stored as JPEG (quality 90) or raw. `existing`: as for
    `write_fashion`.

    Both manifests keep each scene's "object" and "ground": see `Beton.groups`.

    Raises: DataError for options that make no set, for a package that is missing and for a picture
    that cannot be read, before anything is written; what `write_sets` raises.
    """
    if mode == "raw" and quality is not None:
        raise DataError(f"write stamps: quality has no effect in mode 'raw'; got {quality}")
    if min(samples, val_samples) < 1 or not 0 <= content_seed < 2**63:
        raise DataError(
            "write stamps: samples and val_samples must be 1 or more, content_seed 0 to 2^63-1; "
            f"got samples={samples}, val_samples={val_samples}, content_seed={content_seed}"
        )
    how = Rendering(
        size=size,
        split=split,
        content_seed=content_seed,
        smallest=smallest,
        mode=mode,
        quality=quality or 90,
    )
    share = SHARE if source is None else Path(source).expanduser()
    pictures = installed(share)
    divided = parts(pictures, split)
    where = f"{share.absolute()}, pictures {_read_all(pictures, size)}"
    sets: list[Source[Scene]] = []
    for part, (name, chosen, count) in enumerate(
        zip(("train", "val"), divided, (samples, val_samples), strict=True)
    ):
        items = list(scenes(chosen, count, part=part, split=split, content_seed=content_seed))
        sets.append(Source(name, list(chosen.objects), items, where))
    written = write_sets(
        sets, Path(out), how, workers=workers, progress=progress, existing=existing
    )
    check_kept(written, sets)
    return written


def _read_all(pictures: Pictures, size: int) -> str:
    """Reads each picture once, before a file is begun, and names them all: 16 digits of the sha256
    of their names and bytes.
    """
    digest = hashlib.sha256()
    for read, some in (
        (object_of, chain(*pictures.objects.values())),
        (ground_of, pictures.grounds),
    ):
        for each in some:
            read(each, size)
            digest.update(each.name.encode() + hashlib.sha256(each.path.read_bytes()).digest())
    return digest.hexdigest()[:16]
