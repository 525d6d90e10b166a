"""A written set reads back as it was made, and says which object each of its images shows; bad use
ends in one line.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ffcv")

from pipeline.__main__ import main
from pipeline.data.datasets.beton import Beton
from pipeline.data.errors import DataError
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.ffcv.page_checks import verify
from pipeline.data.write.stamps.pictures import CLASSES, installed, parts
from pipeline.data.write.stamps.scenes import render, scenes
from pipeline.data.write.stamps.write import write_stamps


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


def pixels_of(data: Beton) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The evaluation set as the reader gives it: pixels uint8 [N,S,S,3], labels and places in the
    file [N].
    """
    with data.val(micro_batch=16).epoch(0) as batches:
        parts = [(batch.x, batch.target, batch.index) for batch in batches]
    x_NCSS, target_N, index_N = (
        np.concatenate([each.numpy() for each in column]) for column in zip(*parts, strict=True)
    )
    return np.rint(x_NCSS * 255).astype(np.uint8).transpose(0, 2, 3, 1), target_N, index_N


def test_what_was_written_reads_back_with_the_object_of_each_image(
    share: Path, written: Path
) -> None:
    data = Beton(
        written,
        classes=13,
        size=40,
        crop="shift",
        reach=0,
        flip="never",
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    data.check()
    train, val = verify(written)
    assert (train.samples, val.samples, train.classes) == (70, 40, list(CLASSES))
    pictures = parts(installed(share), 1)[1]
    expected = list(scenes(pictures, 40, part=1, split=1, content_seed=0))
    objects, grounds = (data.groups("val", by=by) for by in ("object", "ground"))
    pixels_NSS3, target_N, index_N = pixels_of(data)
    assert index_N.tolist() == list(range(40))
    for pixels, target, index in zip(pixels_NSS3, target_N, index_N, strict=True):
        scene = expected[index]
        assert np.array_equal(pixels, render(scene, 40))
        assert (objects[index], grounds[index], target) == (
            scene.object.name,
            scene.ground.name,
            scene.label,
        )
        assert objects[index] in {picture.name for picture in pictures.objects[val.classes[target]]}
    assert not set(objects) & set(data.groups("train", by="object"))
    assert not set(grounds) & set(data.groups("train", by="ground"))
    assert min(train.histogram) == 5 and min(val.histogram) == 3


def test_files_are_the_same_from_one_and_two_workers(
    share: Path, written: Path, tmp_path: Path
) -> None:
    two = write(share, tmp_path, workers=2)
    assert [(each.sha256, each.groups) for each in two] == [
        (each.sha256, each.groups) for each in verify(written)
    ]


def test_seed_and_split_make_other_sets(share: Path, written: Path, tmp_path: Path) -> None:
    contents = {verify(written)[1].content}
    for i, option in enumerate(
        ({"content_seed": 5}, {"split": 2}, {"smallest": 0.7}, {"mode": "jpg"})
    ):
        contents.add(write(share, tmp_path / str(i), samples=13, **option)[1].content)
    assert len(contents) == 5


def test_files_that_are_kept_must_be_of_the_same_scenes_and_pictures(
    share: Path, written: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(written, tmp_path / "kept")
    assert write(share, out, existing="keep") == verify(written)
    with pytest.raises(DataError, match=r"was written with .*'split': 1.*got .*'split': 0"):
        write(share, out, existing="keep", split=0)
    with pytest.raises(
        DataError, match=r"train\.beton was written from 70 samples of .*; got 80 of"
    ):
        write(share, out, existing="keep", samples=80)
    other = shutil.copytree(share, tmp_path / "share")
    birds = other / "tuxpaint" / "stamps" / "animals" / "birds"
    shutil.copy(birds / "object_1.png", birds / "object_0.png")
    with pytest.raises(
        DataError, match=r"train\.beton was written from 70 samples of .*; got 70 of"
    ):
        write(other, out, existing="keep")


def test_groups_that_are_not_there_are_refused(written: Path, photos: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"^Beton: .*val\.beton must group its samples by 'author'; .* by ground, object$",
    ):
        Beton(written, classes=13, size=40).groups("val", by="author")
    with pytest.raises(
        DataError, match=r"must group its samples by 'object'; it groups them not at all$"
    ):
        Beton(photos, classes=2, size=40).groups("val", by="object")


def test_groups_with_a_share_held_out_are_those_of_the_training_file(written: Path) -> None:
    data = Beton(written, classes=13, size=40, held_out=0.2)
    assert (
        data.groups("val", by="object") == data.groups("train", by="object")
        and len(data.groups("val", by="object")) == 70
    )


def command(*words: str, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr("sys.argv", ["spiketrain", "write", "stamps", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_the_command_writes_a_set(share: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    words = (
        "--out",
        str(tmp_path / "out"),
        "--size",
        "48",
        "--split",
        "2",
        "--samples",
        "26",
        "--val-samples",
        "13",
    )
    assert command(*words, "--source", str(share), monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "train.beton: 26 samples, 13 classes, 0 skipped",
        "val.beton: 13 samples, 13 classes, 0 skipped",
    ]
    train, _ = verify(tmp_path / "out")
    assert train.stored == {"jpg": 26} and train.options["split"] == 2


def test_bad_use_ends_in_one_line(share: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    spoilt = shutil.copytree(share, tmp_path / "share")
    dune = spoilt / "backgrounds" / "mate" / "nature" / "Dune.jpg"
    dune.write_bytes(dune.read_bytes()[:999])
    for words, said in (
        (("--split", "4", "--source", str(share)), "write stamps: split must be in 0..3; got 4"),
        (
            ("--size", "8", "--source", str(share)),
            "write stamps: size must be in 32..1024 pixels; got 8",
        ),
        (
            ("--mode", "raw", "--quality", "80", "--source", str(share)),
            "quality has no effect in mode 'raw'; got 80",
        ),
        (
            ("--source", str(tmp_path / "none")),
            "does not exist: apt install tuxpaint-stamps-default; or name",
        ),
        (("--source", str(spoilt)), "): apt install --reinstall mate-backgrounds"),
    ):
        assert command("--out", str(tmp_path / "out"), *words, monkeypatch=monkeypatch) == 2
        line = capsys.readouterr().err.strip()
        assert said in line and len(line.splitlines()) == 1, line
        assert not (tmp_path / "out").exists()
