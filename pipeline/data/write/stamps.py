"""Scenes for a realistic recognition test: a cut-out object on a ground.

Both are photographs that three Debian packages install (`stamp_pictures.py`).

    spiketrain write stamps --out data/stamps-0 --size 160 --split 0
    data=spec(Beton, folder="data/stamps-0", classes=13, size=160)

    scene = object (size, mirror, angle, place, brightness) over a piece of a ground

Every number is a pure function of (content seed, split, part, scene). Scene i has class i mod 13.
The objects of a class alternate, so each is shown equally often.

The evaluation set has its own objects and grounds, a quarter of them in each class. The training
set does not contain them. The manifest stores each scene's object, for statistics over objects:
`Beton.groups`.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import require_data
from pipeline.core.random import below, bits
from pipeline.data.ffcv.format import Images
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.write.images import Encoding, Item
from pipeline.data.write.stamp_pictures import (
    CLASSES,
    SHARE,
    Picture,
    Pictures,
    cut_out,
    ground,
    installed,
    parts,
)
from pipeline.data.write.writer import (
    Encoded,
    Existing,
    Progress,
    Source,
    check_kept,
    write_sets,
)

# S side of a scene, h w of a rotated object

SIZES = (32, 1024)  # pixels a side; the smallest ground has 1024
LARGEST = 0.9  # share of the scene's side that the rotated object's longer side may take
TURN = 15.0  # degrees in either direction
BRIGHTNESS = 0.3  # the factor is 0.7 to 1.3
SMALLEST_PIECE = 0.25  # share of a ground's shorter side

# draws, see random.py
_GROUND, _PIECE, _PIECE_Y, _PIECE_X, _SHARE, _FLIP, _TURN, _BRIGHTNESS, _Y, _X = range(2048, 2058)


@dataclass(frozen=True)
class Scene:
    """Scene `number` of a `part` (0 train, 1 val) of a split.

    It holds the object, the grounds, and the counters of its random numbers.
    """

    number: int
    part: int
    split: int
    content_seed: int
    label: int
    object: Picture
    grounds: tuple[Picture, ...]  # all grounds of the part

    @property
    def ground(self) -> Picture:
        return self.grounds[self.below(_GROUND, len(self.grounds))]

    def draw(self, number: int) -> int:
        return int(bits(self.content_seed, 2 * self.split + self.part, self.number, number))

    def below(self, number: int, n: int) -> int:
        return int(below(self.draw(number), n))

    def unit(self, number: int) -> float:  # in 0..1, 1 excluded
        return (self.draw(number) >> 11) * 2.0**-53

    def __str__(self) -> str:
        return f"scene {self.number} ({self.object.name})"


def scenes(
    pictures: Pictures, count: int, *, part: int, split: int, content_seed: int
) -> Iterator[Scene]:
    """The first `count` scenes of a part with these pictures."""
    classes, grounds = list(pictures.objects.values()), tuple(pictures.grounds)
    for number in range(count):
        turn, label = divmod(number, len(classes))
        shown = classes[label][turn % len(classes[label])]
        yield Scene(number, part, split, content_seed, label, shown, grounds)


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Renders and encodes scenes.

    Args:
        size: pixels a side.
        split, content_seed: of the scenes; stored in the manifest.
        smallest: the least share of a scene's side that the object's longer side takes.
        mode, quality: as in Encoding.

    Raises:
        DataError: the size or the share is out of range.
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
            SIZES[0] <= self.size <= SIZES[1] and 0.1 <= self.smallest <= LARGEST,
            f"write stamps: size must be in {SIZES[0]}..{SIZES[1]} pixels, smallest a share in"
            f" 0.1..{LARGEST}; got size={self.size}, smallest={self.smallest}",
        )

    def __call__(self, scene: Scene) -> Encoded:
        item = Item(scene.number, render(scene, self.size, self.smallest), scene.label)
        encoded = Encoding(mode=self.mode, quality=self.quality)(item)
        assert isinstance(encoded, Encoded), encoded  # pixels from memory can always be stored
        return replace(encoded, groups={"object": scene.object.name, "ground": scene.ground.name})


def render(scene: Scene, size: int, smallest: float = 0.5) -> NDArray[np.uint8]:
    """The pixels of a scene: [S,S,3]."""
    shown_SS3 = np.array(_piece(scene, size), np.float32)
    object_hw4 = np.asarray(_turned(scene, size, smallest), np.float32)
    height, width, _ = object_hw4.shape
    top, left = scene.below(_Y, size - height + 1), scene.below(_X, size - width + 1)
    colours_hw3, alpha_hw1 = object_hw4[..., :3], object_hw4[..., 3:]  # premultiplied by alpha
    brightness = np.float32(1 + BRIGHTNESS * (2 * scene.unit(_BRIGHTNESS) - 1))
    window_hw3 = shown_SS3[top : top + height, left : left + width]
    window_hw3 *= 1 - alpha_hw1 / 255
    window_hw3 += np.minimum(colours_hw3 * brightness, alpha_hw1)
    return np.rint(shown_SS3).astype(np.uint8)


def _piece(scene: Scene, size: int) -> Image.Image:
    whole = ground(scene.ground, round(size / SMALLEST_PIECE))
    side = round(min(whole.size) * (SMALLEST_PIECE + (1 - SMALLEST_PIECE) * scene.unit(_PIECE)))
    top = scene.below(_PIECE_Y, whole.height - side + 1)
    left = scene.below(_PIECE_X, whole.width - side + 1)
    return whole.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )


def _turned(scene: Scene, size: int, smallest: float) -> Image.Image:
    """The object after mirroring, scaling and rotation, premultiplied by alpha.

    It fits into the scene.
    """
    plain = cut_out(scene.object, 2 * size)
    degrees = TURN * (2 * scene.unit(_TURN) - 1)
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(abs(degrees)))
    # the longer side of the rectangle around the rotated object, before scaling
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
    """Write scenes of 13 classes: `samples` for training, and `val_samples` for evaluation.

    The two parts show different objects. Both manifests store each scene's "object" and "ground"
    for `Beton.groups`.

    Args:
        size: pixels a side.
        split: selects the objects and grounds of the evaluation set: 0, 1 or 2; 3 for choosing
            settings (stamp_pictures.py).
        smallest: the least share of a scene's side that an object takes.
        content_seed: selects the scenes of a split.
        source: the folder of the packages' pictures; None: /usr/share.
        mode, quality: store as JPEG (quality 90) or raw.
        existing: as in `write_fashion`.

    Raises:
        DataError: an option is out of range, a package is missing or a picture cannot be read
            (before anything is written); also as `write_sets`.
    """
    require_data(
        mode != "raw" or quality is None,
        f"write stamps: quality has no effect in mode 'raw'; got {quality}",
    )
    require_data(
        min(samples, val_samples) >= 1 and 0 <= content_seed < 2**63,
        "write stamps: samples and val_samples must be 1 or more, content_seed 0 to 2^63-1; "
        f"got samples={samples}, val_samples={val_samples}, content_seed={content_seed}",
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
    sets: list[Source] = []
    for part, (name, count) in enumerate((("train", samples), ("val", val_samples))):
        shown = scenes(divided[part], count, part=part, split=split, content_seed=content_seed)
        sets.append(Source(name, list(CLASSES), list(shown), where))
    written = write_sets(
        sets, Path(out), how, workers=workers, progress=progress, existing=existing
    )
    check_kept(written, sets)
    return written


def _read_all(pictures: Pictures, size: int) -> str:
    """Read each picture once before a file is begun, and return an id of them all.

    The id is 16 digits of the sha256 of their names and bytes.
    """
    digest = hashlib.sha256()
    for read, side, some in (
        (cut_out, 2 * size, chain(*pictures.objects.values())),
        (ground, round(size / SMALLEST_PIECE), pictures.grounds),
    ):
        for each in some:
            read(each, side)
            digest.update(each.name.encode() + hashlib.sha256(each.path.read_bytes()).digest())
    return digest.hexdigest()[:16]
