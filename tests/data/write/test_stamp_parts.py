"""What evaluates was never trained on, in each split; three splits evaluate on different
objects.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.errors import DataError
from pipeline.data.write.stamps.pictures import (
    CHOICE,
    CLASSES,
    SPLITS,
    Picture,
    Pictures,
    installed,
    parts,
)


def of_sizes(*sizes: int) -> Pictures:
    make = lambda name, size: [
        Picture(f"{name}/{i}", Path(f"/{name}/{i}.png"), "none") for i in range(size)
    ]
    return Pictures(
        {f"class {k}": make(f"class {k}", size) for k, size in enumerate(sizes)}, make("ground", 25)
    )


def names(pictures: list[Picture]) -> set[str]:
    return {picture.name for picture in pictures}


def test_training_and_evaluation_share_no_object_and_no_ground(share: Path) -> None:
    for pictures in (installed(share), of_sizes(4, 5, 6, 7, 8, 9, 65)):
        for split in range(SPLITS):
            train, val = parts(pictures, split)
            assert list(train.objects) == list(val.objects) == list(pictures.objects)
            for name, found in pictures.objects.items():
                assert not names(train.objects[name]) & names(val.objects[name])
                assert names(train.objects[name]) | names(val.objects[name]) == names(found)
                assert len(val.objects[name]) == round(len(found) / 4) >= 1 and train.objects[name]
            assert not names(train.grounds) & names(val.grounds)
            assert names(train.grounds) | names(val.grounds) == names(pictures.grounds)
            assert len(val.grounds) == 6


def test_three_splits_evaluate_on_different_objects_and_grounds() -> None:
    pictures = of_sizes(4, 5, 6, 7, 8, 9, 65)
    vals = [parts(pictures, split)[1] for split in range(SPLITS)]
    for name in pictures.objects:
        chosen = [each.name for val in vals for each in val.objects[name]]
        assert len(chosen) == len(set(chosen))
    grounds = [each.name for val in vals for each in val.grounds]
    assert len(grounds) == len(set(grounds)) == 18


def test_settings_are_chosen_on_objects_and_grounds_with_which_every_split_trains() -> None:
    pictures = of_sizes(4, 5, 7, 8, 9, 65)
    train, val = parts(pictures, CHOICE)
    for name, found in pictures.objects.items():
        assert val.objects[name] and names(train.objects[name]) == names(found) - names(
            val.objects[name]
        )
        for split in range(SPLITS):
            assert names(val.objects[name]) <= names(parts(pictures, split)[0].objects[name])
            assert names(val.grounds) <= names(parts(pictures, split)[0].grounds)
    with pytest.raises(
        DataError,
        match=r"^write stamps: class 0 must have pictures that no other split evaluates on; got 6$",
    ):
        parts(of_sizes(6), CHOICE)


def test_the_parts_depend_on_names_alone() -> None:
    pictures = of_sizes(6, 11)
    turned = Pictures(
        {name: found[::-1] for name, found in pictures.objects.items()}, pictures.grounds[::-1]
    )
    assert parts(pictures, 1) == parts(turned, 1)
    assert (
        parts(of_sizes(6, 40), 1)[1].objects["class 0"] == parts(pictures, 1)[1].objects["class 0"]
    )
    _, val = parts(of_sizes(40), 0)
    assert sorted(int(each.name.split("/")[1]) for each in val.objects["class 0"]) != list(
        range(10)
    )  # in no order of ours


def test_a_split_that_is_none_and_a_class_that_is_too_small_are_refused(share: Path) -> None:
    for split in (-1, 4):
        with pytest.raises(
            DataError, match=rf"^write stamps: split must be in 0\.\.3; got {split}$"
        ):
            parts(installed(share), split)
    with pytest.raises(
        DataError,
        match=r"^write stamps: class 1 must have 4 pictures or more to be divided; got 3$",
    ):
        parts(of_sizes(9, 3), 0)
    assert len(CLASSES) == 13
