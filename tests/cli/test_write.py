"""`spiketrain write folder`: what it could not read, and what it left out, is told."""

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from tests.helpers.small import Command


def test_what_is_not_written_is_told(tmp_path: Path, spiketrain: Command) -> None:
    for name in ("train", "val"):
        (tmp_path / name / "a").mkdir(parents=True)
        picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
        exif = picture.getexif()
        exif[ExifTags.Base.Orientation] = 6
        picture.save(tmp_path / name / "a" / "0.jpg", exif=exif)
    train, val = tmp_path / "train" / "a", tmp_path / "val" / "a"
    (train / "1.txt").write_bytes(b"")
    unreadable = [train / f"{number}.png" for number in range(25)] + [val / "text.png"]
    for file in unreadable:
        file.write_text("no picture")
    words = ("write", "folder", "--source", str(tmp_path), "--out", str(tmp_path / "out"))
    reasons = [f"{file}: it is no picture that Pillow can read" for file in sorted(unreadable)]

    code, _, error = spiketrain(*words)
    *listed, refused = error.splitlines()
    assert code == 2 and listed == [f"  unreadable {reason}" for reason in reasons]
    assert refused == (
        "write: a share of at most 0 of each set may be unreadable, and one sample must be"
        " readable; got 25 of 26 in train.beton and 1 of 2 in val.beton unreadable; repair or"
        " remove the unreadable samples, or allow a larger share with --max-unreadable"
    )

    code, out, error = spiketrain(*words, "--max-unreadable", "0.97", "--exif", "ignore")
    assert (code, out.splitlines()) == (
        0,
        [
            "train.beton: 1 sample, 1 class, 25 skipped",
            "val.beton: 1 sample, 1 class, 1 skipped",
        ],
    )
    assert [line for line in error.splitlines() if "skipped" in line] == [
        f"  skipped {reason}" for reason in reasons
    ]
    assert f"  left out {train / '1.txt'}: it is no picture that Pillow can read" in error
    for name in ("train", "val"):
        assert f"  not rotated 1 picture of {name}.beton: EXIF orientation is not applied" in error

    code, _, error = spiketrain(*words, "--val", "0.5")
    assert code == 2 and "it has no effect on the folders train and val" in error
