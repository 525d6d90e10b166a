"""Which pictures are objects and grounds; what is missing or damaged is named with its package."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.errors import DataError
from pipeline.data.write.stamps.pictures import (
    CLASSES,
    LEFT_OUT,
    Picture,
    cut_out,
    ground,
    installed,
)
from tests.data.made_pictures import EACH, STAMPS, real


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
    for pictures in (installed(share), installed(spoilt)):
        assert {name: len(found) for name, found in pictures.objects.items()} == dict.fromkeys(
            CLASSES, EACH
        )
        assert [each.path.stem for each in pictures.objects["bird"]] == [
            f"object_{number}" for number in range(EACH)
        ]
        assert len(
            {each.name for found in pictures.objects.values() for each in found}
        ) == EACH * len(CLASSES)
        assert len({each.name for each in pictures.grounds}) == 25


@pytest.mark.parametrize(
    ("gone", "package"),
    [
        ("tuxpaint/stamps", "tuxpaint-stamps-default"),
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
        installed(tmp_path / "share")


@pytest.mark.parametrize(
    ("suffix", "read"), [("png", lambda p: cut_out(p, 10**6)), ("jpg", lambda p: ground(p, 10**6))]
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
    with pytest.raises(DataError, match=r"none\.png cannot be read \(nothing of it can be seen\)"):
        cut_out(picture, 100)


def test_an_object_loses_its_border_and_its_colours_are_multiplied_by_alpha(tmp_path: Path) -> None:
    picture = Picture("box", tmp_path / "box.png", "some-package")
    pixels = np.zeros((20, 30, 4), np.uint8)
    pixels[..., :3] = 77  # beneath full transparency: must not come through
    pixels[4:12, 10:26] = (200, 100, 50, 51)
    Image.fromarray(pixels).save(picture.path)
    assert cut_out(picture, 100).size == (16, 8) and cut_out(picture, 4).size == (4, 2)
    for longest in (100, 4):
        found = np.asarray(cut_out(picture, longest))
        assert (found == np.array([40, 20, 10, 51])).all()  # 51 / 255 = 0.2


def test_a_ground_is_shrunk_by_its_shorter_side(share: Path) -> None:
    for picture in installed(share).grounds[:2]:
        assert ground(picture, 70).size == (100, 70) and ground(picture, 999).size == (200, 140)


@real
def test_the_packages_of_debian_hold_300_objects_in_13_classes() -> None:
    """The numbers beside the table, of Debian 13; what is left out by name is really there, so that
    no name is misspelt.
    """
    pictures = installed()
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
    for each in pictures.grounds:
        with Image.open(each.path) as opened:
            assert min(opened.size) >= 1024, each
