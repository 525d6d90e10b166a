import shutil

import pytest

from pipeline.data.base import Data, DataError
from pipeline.data.datasets.beton import Beton
from pipeline.data.write.images import write_folder
from tests.helpers.loaders import by_index, read

GOOD = {"classes": 2, "size": 32}


def test_constructing_opens_no_file():
    data = Beton("/nowhere/at/all", classes=1000, size=224)
    assert isinstance(data, Data) and data.shape == (3, 224, 224) and data.classes == 1000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "size and repeats must be 1 or more, .* size=0"),
        ({"channels": 2}, "channels 1 or 3, .* channels=2"),
        ({"channels": 1}, r"mean and std must have 1 values \(channels\)"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"crop": "random"}, "crop must be 'resized' or 'shift' or 'centre'; got 'random'"),
        ({"flip": True}, "flip must be 'random' or 'never'; got True"),
        ({"crop": "shift", "area": (0.1, 1.0)}, "area has no effect with crop='shift'"),
        ({"crop": "centre", "ratio": (0.5, 2.0)}, "ratio has no effect with crop='centre'"),
        ({"reach": 4}, "reach has no effect with crop='resized'"),
        (
            {"area": (0.0, 1.0)},
            r"area must be \(low, high\) with 0 < low <= high <= 1; got \(0.0, 1.0\)",
        ),
        ({"area": (0.5, 1.5)}, r"high <= 1; got \(0.5, 1.5\)"),
        ({"ratio": (2.0, 1.0)}, r"ratio must be \(low, high\) with 0 < low <= high; got"),
        ({"colour": 11.0}, r"colour in 0\.\.10, .* colour=11\.0"),
        ({"cutout": 33}, r"cutout in 0\.\.size, .* cutout=33"),
        ({"resize": "nearest"}, "resize must be 'area' or 'bicubic', .* got 'nearest'"),
        ({"resize": "area", "crop": "shift"}, "has no effect with crop='shift'; got 'area'"),
        ({"erase": -0.1}, r"erase in 0\.\.1; got .* erase=-0\.1"),
        (
            {"colour": 9.0, "channels": 1, "mean": (0.5,), "std": (0.5,)},
            "colour has no effect on images of 1",
        ),
        ({"repeats": 0}, "repeats must be 1 or more, .* repeats=0"),
        ({"held_out": 1.0}, r"held_out must be a share in 0\.\.1, 1 excluded; got 1"),
        ({"crop": "shift", "reach": 33}, r"reach must be 0..size=32 pixels; got 33"),
    ],
)
def test_options_that_contradict_are_refused(wrong, message):
    with pytest.raises(DataError, match=rf"Beton: .*{message}"):
        Beton("/nowhere", **GOOD | wrong)


def test_the_number_of_classes_must_be_the_files(photos):
    with pytest.raises(DataError, match=r"classes must be those of .*train\.beton, 2; got 10"):
        Beton(photos, classes=10, size=32).fingerprint()


def test_shift_refuses_images_of_another_size(photos):
    with pytest.raises(
        DataError, match=r"crop='shift' does not resize: .* size=32; got \d+ to \d+"
    ):
        Beton(photos, crop="shift", **GOOD).train(seed=0, batch_size=4, micro_batch=4)


def test_fingerprint_names_the_content_not_the_options(photos, photo_folder, fashion, tmp_path):
    one = Beton(photos, **GOOD).fingerprint()
    assert one == Beton(photos, classes=2, size=64, flip="never").fingerprint()
    assert one != Beton(fashion, classes=10, size=28).fingerprint()
    write_folder(photo_folder, tmp_path, mode="mixed")
    assert one == Beton(tmp_path, **GOOD).fingerprint()
    write_folder(photo_folder, tmp_path, mode="raw", existing="replace")
    assert one != Beton(tmp_path, **GOOD).fingerprint()


def test_train_and_val_must_have_the_same_classes(photos, photo_folder, fashion, tmp_path):
    for name in ("train", "val"):
        for old, new in (("china", "palace"), ("flower", "dahlia")):
            shutil.copytree(photo_folder / name / old, tmp_path / "photos" / name / new)
    write_folder(tmp_path / "photos", tmp_path / "renamed")
    for other, said in (
        (fashion, r"classes must be those of .*val\.beton, 10; got 2"),
        (tmp_path / "renamed", "must have the same classes, in the same order"),
    ):
        out = shutil.copytree(photos, tmp_path / f"with {other.name}")
        for each in other.glob("val.beton*"):
            shutil.copy(each, out)
        with pytest.raises(DataError, match=said):
            Beton(out, **GOOD).check()


def test_a_held_out_share_is_evaluated_and_never_trained_on(fashion):
    how = {"channels": 1, "size": 28, "crop": "shift", "mean": (0.5,), "std": (0.5,)}
    data = Beton(fashion, classes=10, held_out=0.1, **how)
    train = by_index(read(data.train(seed=0, batch_size=10, micro_batch=10)))
    val = by_index(read(data.val(micro_batch=10)))
    assert len(val) == 10 and sorted([*train, *val]) == list(range(100))
