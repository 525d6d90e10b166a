"""Which pictures are objects and backgrounds; what is missing or damaged is named with its package.

What evaluates was never trained on, in each split; three splits evaluate on different
objects.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.data.write.stamp_pictures import (
    CLASSES,
    LEFT_OUT,
    SETTINGS_SPLIT,
    Picture,
    Pictures,
    background_image,
    installed_pictures,
    object_image,
    split_pictures,
)
from tests.helpers.made_pictures import EACH, STAMPS, real


def test_drawings_mirror_images_and_deeper_folders_are_no_objects(
    share: Path, tmp_path: Path
) -> None:
    spoilt = shutil.copytree(share, tmp_path / "share")
    birds = spoilt / "tuxpaint" / "stamps" / "animals" / "birds"
    (birds / "cartoon").mkdir()
    for name in ("cartoon/tux", "swallow", "object_0_mirror"):
        shutil.copy(birds / "object_0.png", birds / f"{name}.png")
    (birds / "swallow.svg").write_text("<svg/>")
    shutil.copy(
        birds / "object_0.png",
        spoilt / "tuxpaint" / "stamps" / "animals" / "mammals" / "echidna.png",
    )
    for pictures in (installed_pictures(share), installed_pictures(spoilt)):
        found = pictures.objects
        assert {name: len(each) for name, each in found.items()} == dict.fromkeys(CLASSES, EACH)
        assert [each.path.stem for each in found["bird"]] == [f"object_{i}" for i in range(EACH)]
        names = [{each.name for each in some} for some in (*found.values(), pictures.backgrounds)]
        assert len(set().union(*names[:-1])) == EACH * len(CLASSES) and len(names[-1]) == 25


@pytest.mark.parametrize(
    ("gone", "package"),
    [
        ("tuxpaint/stamps/food/nuts", "tuxpaint-stamps-default"),
        ("backgrounds/mate/nature/Dune.jpg", "mate-backgrounds"),
        ("wallpapers/Volna/contents/images/5120x2880.jpg", "plasma-workspace-wallpapers"),
    ],
)
def test_what_is_missing_is_named_with_its_package(
    share: Path, tmp_path: Path, gone: str, package: str
) -> None:
    spoilt = shutil.copytree(share, tmp_path / "share") / gone
    (shutil.rmtree if spoilt.is_dir() else Path.unlink)(spoilt)
    with pytest.raises(
        DataError,
        match=rf"^write stamps: .*{gone} does not exist: apt install {package}; .*--source$",
    ):
        installed_pictures(tmp_path / "share")


@pytest.mark.parametrize(
    ("suffix", "read"),
    [("png", lambda p: object_image(p, 10**6)), ("jpg", lambda p: background_image(p, 10**6))],
)
def test_what_is_damaged_is_named_with_its_package(tmp_path: Path, suffix: str, read) -> None:
    picture = Picture("some", tmp_path / f"some.{suffix}", "some-package")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        picture.path
    )
    whole = picture.path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no picture", b""):
        picture.path.write_bytes(content)
        with pytest.raises(
            DataError,
            match=rf"some\.{suffix} cannot be read \(.*\): apt install --reinstall some-package$",
        ):
            read(picture)


def test_an_object_that_cannot_be_seen_is_refused(tmp_path: Path) -> None:
    picture = Picture("none", tmp_path / "none.png", "some-package")
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(picture.path)
    with pytest.raises(DataError, match=r"none\.png cannot be read \(it is fully transparent\)"):
        object_image(picture, 100)


def test_an_object_loses_its_border_and_its_colours_are_multiplied_by_alpha(tmp_path: Path) -> None:
    picture = Picture("box", tmp_path / "box.png", "some-package")
    pixels = np.zeros((20, 30, 4), np.uint8)
    pixels[..., :3] = 77  # beneath full transparency: must not come through
    pixels[4:12, 10:26] = (200, 100, 50, 51)
    Image.fromarray(pixels).save(picture.path)
    assert object_image(picture, 100).size == (16, 8) and object_image(picture, 4).size == (4, 2)
    for longest in (100, 4):
        found = np.asarray(object_image(picture, longest))
        assert (found == np.array([40, 20, 10, 51])).all()  # 51 / 255 = 0.2


def test_a_ground_is_shrunk_by_its_shorter_side(share: Path) -> None:
    for picture in installed_pictures(share).backgrounds[:2]:
        assert background_image(picture, 70).size == (100, 70) and background_image(
            picture, 999
        ).size == (
            200,
            140,
        )


@real
def test_the_packages_of_debian_hold_300_objects_in_13_classes() -> None:
    """The numbers beside the table, of Debian 13; what is left out by name is really there, so that
    no name is misspelt.
    """
    pictures = installed_pictures()
    counts = [len(found) for found in pictures.objects.values()]
    assert counts == [35, 26, 13, 24, 29, 16, 8, 11, 65, 13, 18, 22, 20] and sum(counts) == 300
    for name in LEFT_OUT:
        assert (STAMPS / f"{name}.png").is_file()
        assert str(Path(name).parent) in {
            folder for folders in CLASSES.values() for folder in folders
        }
    for each in (each for found in pictures.objects.values() for each in found):
        with Image.open(each.path) as opened:
            assert max(opened.size) >= 40, each
    for each in pictures.backgrounds:
        with Image.open(each.path) as opened:
            assert min(opened.size) >= 1024, each


def of_sizes(*sizes: int) -> Pictures:
    made = {
        name: [Picture(f"{name}/{i}", Path(f"/{name}/{i}.png"), "none") for i in range(size)]
        for name, size in [
            *((f"class {k}", size) for k, size in enumerate(sizes)),
            ("background", 25),
        ]
    }
    backgrounds = made.pop("background")
    return Pictures(made, backgrounds)


def names(pictures: Pictures) -> dict[str, set[str]]:
    """The names of the objects of each class, and of the backgrounds."""
    kinds = {**pictures.objects, "backgrounds": pictures.backgrounds}
    return {kind: {picture.name for picture in found} for kind, found in kinds.items()}


def test_training_and_evaluation_share_no_object_and_no_ground(share: Path) -> None:
    """The three splits evaluate on different ones."""
    for pictures in (installed_pictures(share), of_sizes(4, 5, 6, 7, 8, 9, 65)):
        divided = [
            tuple(map(names, split_pictures(pictures, split))) for split in range(SETTINGS_SPLIT)
        ]
        for kind, found in names(pictures).items():
            for train, val in divided:
                assert train[kind] and len(val[kind]) == round(len(found) / 4) >= 1
                assert not train[kind] & val[kind] and train[kind] | val[kind] == found
            chosen = [name for _, val in divided for name in val[kind]]
            assert len(chosen) == len(set(chosen))


def test_settings_are_chosen_on_objects_and_grounds_with_which_every_split_trains() -> None:
    pictures = of_sizes(4, 5, 7, 8, 9, 65)
    train, val = map(names, split_pictures(pictures, SETTINGS_SPLIT))
    for kind, found in names(pictures).items():
        assert val[kind] and train[kind] == found - val[kind]
        for split in range(SETTINGS_SPLIT):
            assert val[kind] <= names(split_pictures(pictures, split)[0])[kind]


def test_the_parts_depend_on_names_alone() -> None:
    pictures = of_sizes(6, 11)
    turned = Pictures(
        {name: found[::-1] for name, found in pictures.objects.items()}, pictures.backgrounds[::-1]
    )
    assert split_pictures(pictures, 1) == split_pictures(turned, 1)
    assert (
        split_pictures(of_sizes(6, 40), 1)[1].objects["class 0"]
        == split_pictures(pictures, 1)[1].objects["class 0"]
    )
    _, val = split_pictures(of_sizes(40), 0)
    assert sorted(int(each.name.split("/")[1]) for each in val.objects["class 0"]) != list(
        range(10)
    )  # in no order of ours


@pytest.mark.parametrize(
    ("sizes", "split", "said"),
    [
        ([9], -1, r"split must be in 0\.\.3; got -1"),
        ([9], 4, r"split must be in 0\.\.3; got 4"),
        ([9, 3], 0, "class 1 must have 4 pictures or more to be split; got 3"),
        (
            [6],
            SETTINGS_SPLIT,
            "class 0 must have pictures that no other split evaluates on; got none among 6",
        ),
    ],
)
def test_a_split_that_is_none_and_a_class_that_is_too_small_are_refused(
    sizes: list[int], split: int, said: str
) -> None:
    with pytest.raises(DataError, match=f"^write stamps: {said}$"):
        split_pictures(of_sizes(*sizes), split)
