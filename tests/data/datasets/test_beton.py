import shutil

import pytest
import torch

from pipeline.data.base import Data, DataError
from pipeline.data.datasets.beton import Beton
from pipeline.data.write.images import write_folder

GOOD = {"classes": 2, "size": 32}


def test_constructing_opens_no_file():
    data = Beton("/nowhere/at/all", classes=1000, size=224)
    assert isinstance(data, Data) and data.shape == (3, 224, 224) and data.classes == 1000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "size must be 1 or more"),
        ({"channels": 2}, "channels 1 or 3; got classes=2, size=32, channels=2"),
        ({"channels": 1}, r"mean and std must have 1 values \(channels\)"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"crop": "random"}, "crop must be 'resized', 'shift' or 'centre'; got 'random'"),
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
        ({"colour": 11.0}, r"colour must be in 0\.\.10, erase in 0\.\.1; got colour=11\.0"),
        ({"erase": -0.1}, r"erase in 0\.\.1; got colour=0\.0, erase=-0\.1"),
        (
            {"colour": 9.0, "channels": 1, "mean": (0.5,), "std": (0.5,)},
            "colour has no effect on images of 1",
        ),
        ({"repeats": 0}, "repeats must be 1 or more; got 0"),
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
    assert (
        one
        != Beton(fashion, classes=10, size=28, channels=1, mean=(0.5,), std=(0.5,)).fingerprint()
    )
    write_folder(photo_folder, tmp_path, mode="mixed")
    assert one == Beton(tmp_path, **GOOD).fingerprint()
    write_folder(photo_folder, tmp_path, mode="raw", existing="replace")
    assert one != Beton(tmp_path, **GOOD).fingerprint()


def test_train_and_val_must_have_the_same_classes(photos, fashion, tmp_path):
    for source, name in ((photos, "train"), (fashion, "val")):
        for each in source.glob(f"{name}.beton*"):
            (tmp_path / each.name).symlink_to(each)
    with pytest.raises(DataError, match=r"classes must be those of .*val\.beton, 10; got 2"):
        Beton(tmp_path, **GOOD).check()


def test_train_and_val_must_name_the_classes_alike(photos, photo_folder, tmp_path):
    for name in ("train", "val"):
        for old, new in (("china", "palace"), ("flower", "dahlia")):
            shutil.copytree(photo_folder / name / old, tmp_path / "photos" / name / new)
    write_folder(tmp_path / "photos", tmp_path / "out")
    for each in photos.glob("val.beton*"):
        shutil.copy(each, tmp_path / "out")
    with pytest.raises(DataError, match="must have the same classes, in the same order"):
        Beton(tmp_path / "out", **GOOD).check()


def test_a_held_out_share_is_evaluated_and_never_trained_on(fashion):
    data = Beton(
        fashion,
        classes=10,
        channels=1,
        size=28,
        crop="shift",
        mean=(0.5,),
        std=(0.5,),
        held_out=0.1,
    )
    seen = {}
    for name, loader in (
        ("train", data.train(seed=0, batch_size=10, micro_batch=10)),
        ("val", data.val(micro_batch=10)),
    ):
        with loader.epoch(0) as batches:
            seen[name] = torch.cat([batch.index for batch in batches])
        loader.close()
    assert len(seen["train"]) == 90 and len(seen["val"]) == 10
    assert sorted(torch.cat([*seen.values()]).tolist()) == list(range(100))
    with pytest.raises(
        DataError, match=r"Beton: held_out must be a share in 0\.\.1, 1 excluded; got 1"
    ):
        Beton(fashion, classes=10, size=28, held_out=1.0)
