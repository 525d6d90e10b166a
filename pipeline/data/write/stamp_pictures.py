"""The pictures of stamp scenes, and their division into training and evaluation.

Three packages of Debian 13 install the pictures; this program contains none.

    tuxpaint-stamps-default 2025.03.31-1        300 objects: cut-out photographs with transparency
    mate-backgrounds 1.26.0-1                   12 grounds: photographs
    plasma-workspace-wallpapers 4:6.3.4-1       13 grounds: its photographs (the rest is computer
                                                art)

Licences: the stamps are under GPL-2 and, by upstream's own notes, the public domain, GFDL and
several Creative Commons licences; the wallpapers are under GPL-2 or later.

The evaluation sets of the splits share no object and no ground. The n objects of a class are sorted
by a hash of their names. Split s = 0, 1, 2 evaluates on numbers s q to (s + 1) q - 1, with
q = round(n / 4), and trains on all others. Grounds are divided likewise. Every class is therefore
in both parts of each split. The three evaluation sets together contain about three quarters of all
objects, each once. The division depends neither on the seed nor on the number of scenes.

Split 3 is for choosing settings. It evaluates on the remaining numbers, 3 q to n - 1, which the
other three splits train on, so settings are not chosen on test pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import xxhash
from PIL import Image

from pipeline.core.errors import DataError, require_data
from pipeline.data.write.images import DAMAGED

SHARE = Path("/usr/share")
STAMPS, MATE, PLASMA = "tuxpaint-stamps-default", "mate-backgrounds", "plasma-workspace-wallpapers"

SPLITS = 3
CHOICE = 3  # the split for choosing settings
IN_SO_MANY = 4  # one picture in this many is in the evaluation set

# The folders of each class below tuxpaint/stamps, without their subfolders. The numbers are those
# of 2025.03.31-1 without LEFT_OUT.
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
        *("animals/mammals", "animals/marsupials"),
        *(
            f"animals/mammals/{each}"
            for each in ("apes", "aquatic", "bears", "bovines", "camel", "cats", "deer", "dogs")
        ),
        *(f"animals/mammals/{each}" for each in ("equines", "lagomorphs", "rodents")),
    ),  # 65
    "planet": (
        "space/solarsystem",
        "space/solarsystem/moon",
    ),  # 13, including the sun and three phases of the moon
    "tool": ("household/tools", "household/arttools", "medical"),  # 18
    "vegetable": ("food/vegetables", "food/spices", "plants/mushrooms"),  # 22
    "vehicle": (
        *("vehicles", "military/vehicles", "space"),
        *(
            f"vehicles/{each}"
            for each in ("auto", "construction", "cycle", "emergency", "flight", "flight/planes")
        ),
        *(f"vehicles/{each}" for each in ("locomotive", "masstransit", "race", "ship")),
    ),  # 20
}
# Also left out: drawings, which have an .svg of the same name, and mirror images of other files.
LEFT_OUT = frozenset(
    {
        *(
            "animals/mammals/echidna",
            "animals/mammals/hedgehog",
            "household/arttools/highlighter",
            "household/dishes/glass",
        ),
        *("medical/tooth", "vehicles/7spoke256"),  # drawings
        *(
            "medical/bandage_adhesive",
            "space/spacewalk",
            "vehicles/wheel_tractor",
        ),  # of another class
        *(
            "food/nuts/walnut_shelled",
            "vehicles/emergency/sedan_police",
        ),  # only 25 pixels; only a car's lights
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
GROUNDS = {  # paths below /usr/share, with the package that installs them
    **{f"backgrounds/mate/nature/{name}.jpg": MATE for name in _NATURE},
    **{f"wallpapers/{name}/contents/images/2560x1600.jpg": PLASMA for name in _PHOTOS},
    "wallpapers/Mountain/contents/images/5120x2880.png": PLASMA,
    "wallpapers/Volna/contents/images/5120x2880.jpg": PLASMA,
}


@dataclass(frozen=True)
class Picture:
    # its path below the package's folder, without suffix: unique among objects, and among grounds
    name: str
    path: Path
    package: str


@dataclass(frozen=True)
class Pictures:
    objects: dict[str, list[Picture]]  # of each class
    grounds: list[Picture]


def installed(share: Path = SHARE) -> Pictures:
    """The pictures that the packages installed below `share`.

    Raises: DataError with the missing or incomplete package.
    """
    stamps = share / "tuxpaint" / "stamps"
    objects: dict[str, list[Picture]] = {class_name: [] for class_name in CLASSES}
    for class_name, folders in CLASSES.items():
        for folder in folders:
            _require_there(stamps / folder, STAMPS)
            for path in sorted((stamps / folder).glob("*.png")):
                name, is_drawing = f"{folder}/{path.stem}", path.with_suffix(".svg").exists()
                if not (name in LEFT_OUT or name.endswith("_mirror") or is_drawing):
                    objects[class_name].append(Picture(name, path, STAMPS))
    grounds = [
        Picture(str(Path(name).with_suffix("")), share / name, package)
        for name, package in GROUNDS.items()
    ]
    for ground in grounds:
        _require_there(ground.path, ground.package)
    return Pictures(objects, grounds)


def parts(pictures: Pictures, split: int) -> tuple[Pictures, Pictures]:
    """Divide the pictures into (training, evaluation).

    Raises: DataError for an unknown split, or a class with too few objects.
    """
    require_data(0 <= split <= CHOICE, f"write stamps: split must be in 0..{CHOICE}; got {split}")
    both = {name: _divided(name, objects, split) for name, objects in pictures.objects.items()}
    train_grounds, val_grounds = _divided("grounds", pictures.grounds, split)
    return (
        Pictures({name: train for name, (train, _) in both.items()}, train_grounds),
        Pictures({name: val for name, (_, val) in both.items()}, val_grounds),
    )


@cache
def cut_out(picture: Picture, longest: int) -> Image.Image:
    """An object without its empty border, premultiplied by alpha.

    Its longer side has at most `longest` pixels.
    """
    opened = _read(picture, "RGBA")
    box = opened.getchannel("A").getbbox()
    if box is None:
        raise _unreadable(picture, "it is fully transparent")
    return _shrunk(opened.crop(box).convert("RGBa"), longest, of=max)


@cache
def ground(picture: Picture, shortest: int) -> Image.Image:
    """A ground in RGB. Its shorter side has at most `shortest` pixels."""
    return _shrunk(_read(picture, "RGB", least=shortest), shortest, of=min)


def _divided(
    what: str, pictures: Sequence[Picture], split: int
) -> tuple[list[Picture], list[Picture]]:
    require_data(
        len(pictures) >= IN_SO_MANY,
        f"write stamps: {what} must have {IN_SO_MANY} pictures or more to be divided; got"
        f" {len(pictures)}",
    )
    ordered = sorted(pictures, key=lambda picture: xxhash.xxh3_64_intdigest(picture.name.encode()))
    held = round(len(ordered) / IN_SO_MANY)
    val = ordered[split * held : None if split == CHOICE else (split + 1) * held]
    require_data(
        val,
        f"write stamps: {what} must have pictures that no other split evaluates on; got"
        f" {len(pictures)}",
    )
    return [each for each in ordered if each not in val], val


def _read(picture: Picture, mode: str, *, least: int | None = None) -> Image.Image:
    """Read a picture.

    `least`: the sufficient pixels of the shorter side. A JPEG may then be decoded at an eighth, a
    quarter or half of its size.
    """
    try:
        with Image.open(picture.path) as opened:
            if least is not None:
                width, height = (-(-each * least // min(opened.size)) for each in opened.size)
                opened.draft(mode, (width, height))
            return opened.convert(mode)
    except DAMAGED as error:
        raise _unreadable(picture, f"{type(error).__name__}: {error}") from error


def _shrunk(
    picture: Image.Image, side: int, *, of: Callable[[tuple[int, int]], int]
) -> Image.Image:
    scale = side / of(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(each * scale)) for each in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX)


def _require_there(path: Path, package: str) -> None:
    require_data(
        path.exists(),
        f"write stamps: {path} does not exist: apt install {package}; or name the folder it was"
        " unpacked to by --source",
    )


def _unreadable(picture: Picture, why: str) -> DataError:
    return DataError(
        f"write stamps: {picture.path} cannot be read ({why}): apt install --reinstall"
        f" {picture.package}"
    )
