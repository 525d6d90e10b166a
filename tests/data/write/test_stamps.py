"""A scene is a pure function of its counters; what it shows is where, as large and as bright as it
should be.

A written set reads back as it was made, and says which object each of its images shows; bad use
ends in one line.
"""

import os
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.errors import DataError
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.ffcv.page_checks import verify
from pipeline.data.write.stamp_pictures import (
    CLASSES,
    Picture,
    Pictures,
    background_image,
    installed_pictures,
    object_image,
    split_pictures,
)
from pipeline.data.write.stamps import Scene, render, scenes, write_stamps
from tests.helpers.loaders import by_index, read
from tests.helpers.made_pictures import real
from tests.helpers.small import Command


def some(pictures: Pictures, count: int, **changes: int) -> list[Scene]:
    how = {"part": 1, "split": 0, "content_seed": 0} | changes
    return list(scenes(split_pictures(pictures, how["split"])[how["part"]], count, **how))


def test_a_scene_is_a_function_of_its_counters_alone(share: Path) -> None:
    many = some(installed_pictures(share), 40)
    assert some(installed_pictures(share), 30) == many[:30]
    in_order = [render(scene, 48) for scene in many]
    for cached in (object_image, background_image):
        cached.cache_clear()
    for number in (31, 7, 0, 39):
        assert np.array_equal(render(many[number], 48), in_order[number])
    others = ({"content_seed": 1}, {"split": 1}, {"part": 0})
    other = [render(replace(many[2], **change), 48) for change in others]
    assert len({pixels.tobytes() for pixels in (*in_order, *other)}) == 43


def test_classes_and_their_objects_take_turns(share: Path) -> None:
    train, _ = split_pictures(installed_pictures(share), 2)
    made = some(installed_pictures(share), 13 * 17, part=0, split=2)
    assert [scene.label for scene in made] == list(range(13)) * 17
    for label, name in enumerate(CLASSES):
        shown = Counter(scene.object for scene in made if scene.label == label)
        assert (
            set(shown) == set(train.objects[name])
            and max(shown.values()) - min(shown.values()) <= 1
        )
    assert {scene.background for scene in made} == set(train.backgrounds)


def scenes_of(thing: Image.Image, below: Image.Image, folder: Path) -> list[Scene]:
    """200 scenes of one object on one ground: what they show can be calculated."""
    thing.save(folder / "object.png")
    below.save(folder / "ground.png")
    made, under = (Picture(name, folder / f"{name}.png", "none") for name in ("object", "ground"))
    return list(scenes(Pictures({"only": [made]}, [under]), 200, part=0, split=0, content_seed=0))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Scene]:
    """A half-transparent rectangle, 40 x 20 pixels, on grey."""
    return scenes_of(
        Image.new("RGBA", (40, 20), (200, 100, 0, 153)),
        Image.new("RGB", (150, 110), (90, 90, 90)),
        tmp_path_factory.mktemp("plain"),
    )


def test_an_object_lies_over_its_ground_with_its_brightness(plain: list) -> None:
    """shown = (1 - a) ground + a min(b colour, 255) with a = 0.6 and b in 0.7..1.3, both ends
    nearly reached.
    """
    factors = []
    for scene in plain:
        pixels_SS3 = render(scene, 64).astype(float)
        changed_SS = (pixels_SS3 != 90).any(-1)
        y, x = (int(np.median(each)) for each in np.nonzero(changed_SS))
        red, green, blue = (pixels_SS3[y, x] - 0.4 * 90) / 0.6
        factor = green / 100
        assert abs(red - min(200 * factor, 255)) < 4 and abs(blue) < 2
        factors.append(factor)
    assert (
        0.68 < min(factors) < 0.73
        and 1.27 < max(factors) < 1.32
        and abs(np.mean(factors) - 1) < 0.05
    )


def test_an_object_takes_the_share_it_should_anywhere_in_the_scene(plain: list) -> None:
    """Longer side of its rectangle: from `smallest` to 0.9 of the scene's, to a pixel or two;
    turned by 15 degrees at most.
    """
    shares, places, flat = [], [], 0
    for scene in plain:
        rows, columns = np.nonzero((render(scene, 100, smallest=0.3) != 90).any(-1))
        height, width = (int(each.max() - each.min() + 1) for each in (rows, columns))
        shares.append(max(height, width) / 100)
        places.append((rows.min() / (101 - height), columns.min() / (101 - width)))
        flat += height / width < 0.55
        assert (
            0.49 < height / width < 0.76
        )  # 20/40 upright, and (40 sin 15 + 20 cos 15) / (40 cos 15 + 20 sin 15) = 0.68
    assert (
        0.28 <= min(shares) < 0.33 and 0.87 < max(shares) <= 0.92 and 0.57 < np.mean(shares) < 0.63
    )
    assert (
        np.min(places) < 0.05
        and np.max(places) > 0.95
        and np.abs(np.mean(places, 0) - 0.5).max() < 0.06
    )
    assert 20 < flat < 120  # some are nearly upright, most are not


def test_half_of_the_objects_are_mirrored(tmp_path: Path) -> None:
    pixels = np.full((20, 40, 4), 255, np.uint8)  # red to the left, blue to the right
    pixels[:, :20, 1:3] = pixels[:, 20:, :2] = 0
    mirrored = 0
    for scene in scenes_of(Image.fromarray(pixels), Image.new("RGB", (50, 50)), tmp_path):
        shown_SS3 = render(scene, 32).astype(float)
        red, blue = (np.average(np.arange(32), weights=shown_SS3[..., c].sum(0)) for c in (0, 2))
        mirrored += red > blue
    assert 75 < mirrored < 125


def test_every_size_holds_the_largest_object(share: Path) -> None:
    made = some(installed_pictures(share), 130)
    for size in (32, 33, 64):
        for scene in made:
            assert render(scene, size, smallest=0.9).shape == (size, size, 3)


@real
def test_scenes_of_the_real_pictures() -> None:
    """Two of each class: all differ, and none is nearly one colour."""
    seen = [render(scene, 96) for scene in some(installed_pictures(), 26)]
    assert len({pixels.tobytes() for pixels in seen}) == 26
    assert min(pixels.std() for pixels in seen) > 5


def write(share: Path, out: Path, **options) -> list[Manifest]:
    return write_stamps(
        out,
        source=share,
        **{"size": 40, "split": 1, "samples": 70, "val_samples": 40, "mode": "raw"} | options,
    )


@pytest.fixture(scope="module")
def written(share: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stamps")
    write(share, out)
    return out


def test_what_was_written_reads_back_with_the_object_of_each_image(
    share: Path, written: Path
) -> None:
    how = {"crop": "shift", "reach": 0, "flip": "never", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    data = Beton(written, classes=13, size=40, **how)
    data.check()
    train, val = verify(written)
    assert (train.samples, val.samples, train.classes) == (70, 40, list(CLASSES))
    assert (min(train.histogram), min(val.histogram)) == (5, 3)
    pictures = split_pictures(installed_pictures(share), 1)[1]
    expected = list(scenes(pictures, 40, part=1, split=1, content_seed=0))
    groups = {by: data.groups("val", by=by) for by in ("object", "ground")}
    assert groups == {
        "object": [scene.object.name for scene in expected],
        "ground": [scene.background.name for scene in expected],
    }
    for by, names in groups.items():
        assert not set(names) & set(data.groups("train", by=by))
    batches = read(data.val(micro_batch=16))
    assert torch.cat([b.target for b in batches]).tolist() == [scene.label for scene in expected]
    for (index, x), scene in zip(by_index(batches).items(), expected, strict=True):
        assert index == scene.number and np.array_equal(
            np.rint(x.numpy() * 255).astype(np.uint8).transpose(1, 2, 0), render(scene, 40)
        )
        assert scene.object in pictures.objects[val.classes[scene.label]]


def test_files_are_the_same_from_one_and_two_workers(
    share: Path, written: Path, tmp_path: Path
) -> None:
    one, two = verify(written), write(share, tmp_path, workers=2)
    assert [(each.sha256, each.groups) for each in two] == [
        (each.sha256, each.groups) for each in one
    ]


def test_seed_and_split_make_other_sets(share: Path, written: Path, tmp_path: Path) -> None:
    options = ({"content_seed": 5}, {"split": 2}, {"smallest": 0.7}, {"mode": "jpg"})
    made = [
        write(share, tmp_path / str(i), samples=13, **option) for i, option in enumerate(options)
    ]
    assert len({val.content for _, val in [*made, verify(written)]}) == 5


def test_quality_0_is_refused(share: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"quality in 1\.\.100; got .* quality=0"):
        write(share, tmp_path, mode="jpg", quality=0)


def test_files_that_are_kept_must_be_of_the_same_scenes_and_pictures(
    share: Path, written: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(written, tmp_path / "kept")
    assert write(share, out, existing="keep") == verify(written)
    other = shutil.copytree(share, tmp_path / "share")
    birds = other / "tuxpaint" / "stamps" / "animals" / "birds"
    shutil.copy(birds / "object_1.png", birds / "object_0.png")
    from_70 = r"train\.beton was written from 70 samples of .*; got "
    for source, change, said in (
        (share, {"split": 0}, r"was written with .*'split': 1.*got .*'split': 0"),
        (share, {"samples": 80}, from_70 + "80 of"),
        (other, {}, from_70 + "70 of"),
    ):
        with pytest.raises(DataError, match=said):
            write(source, out, existing="keep", **change)


def test_groups_that_are_not_there_are_refused(written: Path, photos: Path) -> None:
    for data, by, known in (
        (Beton(written, classes=13, size=40), "author", "ground, object"),
        (Beton(photos, classes=2, size=40), "object", "nothing"),
    ):
        with pytest.raises(
            DataError,
            match=rf"^Beton: .*val\.beton must group its samples by '{by}'; .* by {known}$",
        ):
            data.groups("val", by=by)


def test_groups_with_a_share_held_out_are_those_of_the_training_file(written: Path) -> None:
    data = Beton(written, classes=13, size=40, held_out=0.2)
    val, train = (data.groups(use, by="object") for use in ("val", "train"))
    assert val == train and len(val) == 70


def test_the_command_writes_a_set(share: Path, tmp_path: Path, spiketrain: Command) -> None:
    sizes = ["--size", "48", "--split", "2", "--samples", "26", "--val-samples", "13"]
    out = str(tmp_path / "out")
    code, said, _ = spiketrain("write", "stamps", "--out", out, *sizes, "--source", str(share))
    assert (code, said.splitlines()) == (
        0,
        [
            "train.beton: 26 samples, 13 classes, 0 skipped",
            "val.beton: 13 samples, 13 classes, 0 skipped",
        ],
    )
    train, _ = verify(tmp_path / "out")
    assert train.stored == {"jpg": 26} and train.options["split"] == 2


@pytest.mark.parametrize(
    ("words", "source", "said"),
    [
        (["--split", "4"], "share", r"write stamps: split must be in 0\.\.3; got 4"),
        (["--size", "31"], "share", "size must be in 32..1024 pixels, smallest .*; got size=31"),
        (["--size", "1025"], "share", "size must be in 32..1024 pixels, .* got size=1025"),
        (["--smallest", "0.95"], "share", r"in 0\.1\.\.0\.9; got .* smallest=0\.95"),
        (["--mode", "raw", "--quality", "80"], "share", "no effect in mode 'raw'; got 80"),
        ([], "none", "does not exist: apt install tuxpaint-stamps-default; or unpack"),
        ([], "spoilt", r"\): apt install --reinstall mate-backgrounds"),
    ],
)
def test_bad_use_ends_in_one_line(
    share: Path, tmp_path: Path, spiketrain: Command, words: list[str], source: str, said: str
) -> None:
    if source == "spoilt":
        shutil.copytree(share, tmp_path / "spoilt")
        os.truncate(tmp_path / "spoilt" / "backgrounds" / "mate" / "nature" / "Dune.jpg", 999)
    where = share if source == "share" else tmp_path / source
    words = ["--out", str(tmp_path / "out"), "--source", str(where), *words]
    code, _, line = spiketrain("write", "stamps", *words)
    assert code == 2 and re.search(said, line) and len(line.strip().splitlines()) == 1, line
    assert not (tmp_path / "out").exists()
