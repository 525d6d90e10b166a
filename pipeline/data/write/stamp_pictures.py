"""The pictures of stamp scenes, and their split into training and evaluation.

Three packages of Debian 13 install the pictures; this program contains none.

    tuxpaint-stamps-default 2025.03.31-1     300 objects: cut-out photographs with transparency
    mate-backgrounds 1.26.0-1                12 backgrounds: photographs
    plasma-workspace-wallpapers 4:6.3.4-1    13 backgrounds: its photographs, without computer art

Licences: the stamps are under GPL-2. Upstream's notes also name the public domain, GFDL and several
Creative Commons licences. The wallpapers are under GPL-2 or later.

The n objects of a class are sorted by a hash of their names and numbered from 0. With
q = round(n / 4), split s = 0, 1, 2 evaluates on numbers s q to (s + 1) q - 1 and trains on all
others. Backgrounds are split in the same way. The evaluation sets of two splits therefore share no
object and no background, and every class is in both parts of each split. The three evaluation sets
together contain about three quarters of all objects. The split depends neither on the seed nor on
the number of scenes.

Split 3 is for choosing settings. It evaluates on the remaining numbers, 3 q to n - 1. The other
three splits train on them, so settings are not chosen on pictures that splits 0 to 2 evaluate on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import xxhash
from PIL import Image

from pipeline.core.errors import DataError, require_data
from pipeline.data.write.images import PILLOW_ERRORS

PICTURES_FOLDER = Path("/usr/share")
STAMPS, MATE, PLASMA = "tuxpaint-stamps-default", "mate-backgrounds", "plasma-workspace-wallpapers"

SETTINGS_SPLIT = 3  # the number of the split for choosing settings
EVALUATION_DIVISOR = 4  # one picture in this many is in the evaluation set

# The folders of each class below tuxpaint/stamps, without their subfolders. The comment beside a
# class is the number of its objects in release 2025.03.31-1, LEFT_OUT excluded.
CLASSES: dict[str, tuple[str, ...]] = {
    "bird": ("animals/birds",),  # 35
    "coin": tuple(
        f"symbols/money/{each}" for each in ("canadian/coins", "euro/coins", "japanese", "us/coins")
    ),  # 26
    "fish": ("animals/fish", "animals/shellfish"),  # 13, including shellfish
    "flower": ("plants/flowers",),  # 24
    "fruit": ("food/fruit", "food/nuts"),  # 29
    "household": ("household", "household/dishes", "household/dishes/utensils", "hobbies"),  # 16
    "insect": ("animals/insects",),  # 8, including a slug and a woodlouse
    "instrument": tuple(
        f"hobbies/music/{each}" for each in ("brass", "percussion", "string", "wind")
    ),  # 11
    "mammal": (
        "animals/mammals",
        "animals/marsupials",
        *(f"animals/mammals/{each}" for each in ("apes", "aquatic", "bears", "bovines", "camel")),
        *(f"animals/mammals/{each}" for each in ("cats", "deer", "dogs", "equines", "lagomorphs")),
        "animals/mammals/rodents",
    ),  # 65
    "planet": (
        "space/solarsystem",
        "space/solarsystem/moon",
    ),  # 13, including the sun and three phases of the moon
    "tool": ("household/tools", "household/arttools", "medical"),  # 18
    "vegetable": ("food/vegetables", "food/spices", "plants/mushrooms"),  # 22
    "vehicle": (
        "vehicles",
        "military/vehicles",
        "space",
        *(f"vehicles/{each}" for each in ("auto", "construction", "cycle", "emergency", "flight")),
        *(f"vehicles/{each}" for each in ("flight/planes", "locomotive", "masstransit", "race")),
        "vehicles/ship",
    ),  # 20
}
# Stamps that are not used. `installed_pictures` also omits mirror images, and drawings that have an
# .svg of the same name.
LEFT_OUT = frozenset(
    {
        # drawings
        "animals/mammals/echidna",
        "animals/mammals/hedgehog",
        "household/arttools/highlighter",
        "household/dishes/glass",
        "medical/tooth",
        "vehicles/7spoke256",
        # of another class
        "medical/bandage_adhesive",
        "space/spacewalk",
        "vehicles/wheel_tractor",
        "food/nuts/walnut_shelled",  # only 25 pixels
        "vehicles/emergency/sedan_police",  # only the lights of a car
    }
)

_NATURE = (
    *("Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops"),
    *("Storm", "TwoWings", "Wood", "YellowFlower"),
)
_PHOTOS = (
    *("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf"),
    *("Grey", "Kite", "OneStandsOut", "Path", "summer_1am"),
)
BACKGROUNDS = {  # paths below /usr/share, with the package that installs them
    **{f"backgrounds/mate/nature/{name}.jpg": MATE for name in _NATURE},
    **{f"wallpapers/{name}/contents/images/2560x1600.jpg": PLASMA for name in _PHOTOS},
    "wallpapers/Mountain/contents/images/5120x2880.png": PLASMA,
    "wallpapers/Volna/contents/images/5120x2880.jpg": PLASMA,
}


@dataclass(frozen=True)
class Picture:
    # the path without suffix, below tuxpaint/stamps for an object and below /usr/share for a
    # background
    name: str
    path: Path
    package: str


@dataclass(frozen=True)
class Pictures:
    objects: dict[str, list[Picture]]  # by class
    backgrounds: list[Picture]


def installed_pictures(root: Path = PICTURES_FOLDER) -> Pictures:
    """The pictures that the packages have installed below `root`.

    Raises: DataError if a folder or a background is missing. The message names its package.
    """
    stamps = root / "tuxpaint" / "stamps"
    objects: dict[str, list[Picture]] = {class_name: [] for class_name in CLASSES}
    for class_name, folders in CLASSES.items():
        for folder in folders:
            _require_installed(stamps / folder, STAMPS)
            for path in sorted((stamps / folder).glob("*.png")):
                name = f"{folder}/{path.stem}"
                if (
                    name not in LEFT_OUT
                    and not name.endswith("_mirror")
                    and not path.with_suffix(".svg").exists()
                ):
                    objects[class_name].append(Picture(name, path, STAMPS))
    backgrounds = [
        Picture(str(Path(name).with_suffix("")), root / name, package)
        for name, package in BACKGROUNDS.items()
    ]
    for background in backgrounds:
        _require_installed(background.path, background.package)
    return Pictures(objects, backgrounds)


def split_pictures(pictures: Pictures, split: int) -> tuple[Pictures, Pictures]:
    """Split the pictures into (training, evaluation).

    Raises: DataError if the split is unknown, or a class has too few objects.
    """
    require_data(
        0 <= split <= SETTINGS_SPLIT,
        f"write stamps: split must be in 0..{SETTINGS_SPLIT}; got {split}",
    )
    objects = {name: _split(name, files, split) for name, files in pictures.objects.items()}
    train_backgrounds, val_backgrounds = _split("backgrounds", pictures.backgrounds, split)
    return (
        Pictures({name: train for name, (train, _) in objects.items()}, train_backgrounds),
        Pictures({name: val for name, (_, val) in objects.items()}, val_backgrounds),
    )


@cache
def object_image(picture: Picture, max_long_side: int) -> Image.Image:
    """Read an object, without its empty border and premultiplied by alpha.

    Its longer side has at most `max_long_side` pixels.

    Raises: DataError if the picture cannot be read or is fully transparent.
    """
    image = _read(picture, "RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise _unreadable(picture, "it is fully transparent")
    cropped = image.crop(box)
    return _shrink(cropped.convert("RGBa"), max_long_side / max(cropped.size))


@cache
def background_image(picture: Picture, max_short_side: int) -> Image.Image:
    """Read a background in RGB. Its shorter side has at most `max_short_side` pixels.

    Raises: DataError if the picture cannot be read.
    """
    image = _read(picture, "RGB", min_side=max_short_side)
    return _shrink(image, max_short_side / min(image.size))


def _split(
    name: str, pictures: Sequence[Picture], split: int
) -> tuple[list[Picture], list[Picture]]:
    require_data(
        len(pictures) >= EVALUATION_DIVISOR,
        f"write stamps: {name} must have {EVALUATION_DIVISOR} pictures or more to be split; got"
        f" {len(pictures)}",
    )
    ordered = sorted(pictures, key=lambda picture: xxhash.xxh3_64_intdigest(picture.name.encode()))
    count = round(len(ordered) / EVALUATION_DIVISOR)
    end = len(ordered) if split == SETTINGS_SPLIT else (split + 1) * count
    val = ordered[split * count : end]
    require_data(
        val,
        f"write stamps: {name} must have pictures that no other split evaluates on; got none among"
        f" {len(pictures)}",
    )
    return [picture for picture in ordered if picture not in val], val


def _read(picture: Picture, mode: str, *, min_side: int | None = None) -> Image.Image:
    """Read a picture.

    `min_side`: if set, a JPEG may be decoded at an eighth, a quarter or half of its size. Its
    shorter side still has `min_side` pixels or more, if the file has them.

    Raises: DataError if the picture cannot be read.
    """
    try:
        with Image.open(picture.path) as image:
            if min_side is not None:
                width, height = (-(-side * min_side // min(image.size)) for side in image.size)
                image.draft(mode, (width, height))
            return image.convert(mode)
    except PILLOW_ERRORS as error:
        raise _unreadable(picture, f"{type(error).__name__}: {error}") from error


def _shrink(image: Image.Image, scale: float) -> Image.Image:
    """Scale an image by area averaging. It is never enlarged."""
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def _require_installed(path: Path, package: str) -> None:
    require_data(
        path.exists(),
        f"write stamps: {path} does not exist: apt install {package}; or unpack all packages into"
        " one folder, and pass its usr/share as --source",
    )


def _unreadable(picture: Picture, reason: str) -> DataError:
    return DataError(
        f"write stamps: {picture.path} cannot be read ({reason}): apt install --reinstall"
        f" {picture.package}"
    )
