"""Writing: whole or not at all, the same from any number of workers, every refusal by name."""

import multiprocessing
import os
import resource
import shutil
import signal
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.data.base import DataError, LoaderError
from pipeline.data.ffcv import manifest
from pipeline.data.ffcv.format import read_tables
from pipeline.data.ffcv.page_checks import verify
from pipeline.data.write import images, writer
from pipeline.data.write.images import Encoding, FileEncoding, Item, write_fashion, write_folder
from pipeline.data.write.writer import Encoded, TooManyUnreadable, write_sets


@pytest.fixture
def folder(photo_folder, tmp_path) -> Path:
    """A copy of the photographs that a test may spoil."""
    return shutil.copytree(photo_folder, tmp_path / "photos")


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_files_are_the_same_from_one_and_two_workers(photo_folder, photos, tmp_path):
    two = write_folder(photo_folder, tmp_path / "two", mode="mixed", workers=2)
    assert [(each.content, each.sha256) for each in verify(photos)] == [
        (each.content, each.sha256) for each in two
    ]


def content_of(path: Path, classes: list[str]) -> str:
    """The content hash from the samples of a file."""
    tables, file = read_tables(path), np.memmap(path, np.uint8, "r")
    content = manifest.ContentHash(classes, tables.kind)
    for record, address, label, size in zip(
        tables.records, tables.addresses, tables.labels, tables.sizes, strict=True
    ):
        attributes = {name: record[name] for name in ("mode", "width", "height")}
        content.add(file[address : address + size].data, label=label, **attributes)
    return content.hexdigest()


def test_content_does_not_depend_on_pages_or_on_who_wrote(photo_folder, tmp_path):
    """FFCV's own writer makes the same content of the same pixels, and FFCV's own reader finds them
    in our file.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter

    [_, ours] = write_folder(photo_folder, tmp_path, mode="raw")
    pictures = [
        (np.asarray(Image.open(str(item.image)).convert("RGB")), item.label)
        for item in images.folder_sets(photo_folder)[1].items
    ]
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    stock = tmp_path / "stock.beton"
    DatasetWriter(str(stock), fields, page_size=1 << 21, num_workers=1).from_indexed_dataset(
        pictures
    )
    assert content_of(stock, ours.classes) == ours.content
    described = manifest.describe(
        stock, name="stock.beton", content=ours.content, classes=ours.classes, labels=[0]
    )
    assert described.page_bytes != ours.page_bytes and described.sha256 != ours.sha256
    assert Reader(str(tmp_path / "val.beton")).metadata["f1"].tolist() == [
        label for _, label in pictures
    ]


def test_fashion(small_fashion, fashion, tmp_path):
    train, val = verify(fashion)
    found = (train.samples, val.samples, train.stored, train.classes[9], train.histogram)
    assert found == (100, 30, {"raw": 100}, "Ankle boot", [10] * 10)
    write_fashion(tmp_path, source=small_fashion, workers=2)
    assert verify(tmp_path)[0].sha256 == train.sha256


def test_fashion_of_debian():
    if not images.FASHION_PACKAGE.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    train, val = images.fashion_sets()
    assert (len(train.items), len(val.items), train.items[0].label) == (60_000, 10_000, 9)


def test_fashion_that_is_nowhere_says_what_to_install(tmp_path, monkeypatch):
    offline = Mock(side_effect=RuntimeError("Error downloading train-images-idx3-ubyte.gz"))
    monkeypatch.setattr(images, "FASHION_PACKAGE", tmp_path / "none")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    with pytest.raises(
        DataError, match=r"Error downloading.*apt install dataset-fashion-mnist.*folder.*--source"
    ):
        write_fashion(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b[:3], lambda b: b"\0\0\x09" + b[3:], lambda b: b"", None],
)
def test_a_damaged_or_missing_fashion_file_is_named(small_fashion, tmp_path, damage):
    path = shutil.copytree(small_fashion, tmp_path / "idx") / "t10k-labels-idx1-ubyte"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    said = r", or t10k-labels-idx1-ubyte beside it, must be a complete file in MNIST's format; got"
    with pytest.raises(DataError, match=said):
        write_fashion(tmp_path / "out", source=path.parent)


def test_a_jpeg_that_fits_is_stored_as_it_is(photo_folder, tmp_path):
    _, val = write_folder(photo_folder, tmp_path, mode="jpg", max_resolution=150)
    found = read_tables(tmp_path / "val.beton")
    content = (tmp_path / "val.beton").read_bytes()
    kept = []
    for item, record, size in zip(
        images.folder_sets(photo_folder)[1].items, found.records, found.sizes, strict=True
    ):
        address, path = int(record["data_ptr"]), Path(str(item.image))
        with Image.open(path) as picture:
            scale = min(1, 150 / max(picture.size))
            sides = tuple(round(side * scale) for side in picture.size)
        assert (record["width"], record["height"]) == sides
        kept.append(content[address : address + int(size)] == path.read_bytes())
        assert kept[-1] == (scale == 1)
    assert val.stored == {"as it is": sum(kept), "jpg": len(kept) - sum(kept)}
    assert 0 < sum(kept) < len(kept)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_images_are_skipped_up_to_a_share(folder, tmp_path, workers):
    """Every unreadable image of both sets has its reason."""
    train, text = folder / "train" / "flower", folder / "val" / "flower" / "notes.jpg"
    for name in ("bad_1.jpg", "bad_2.jpg", "bad_3.jpg"):
        (train / name).write_bytes(b"")
    text.write_text("no picture")
    said = (
        "at most 0.0714 of each set .*; got 3 of 64 in train.beton and 1 of 14 in val.beton"
        " unreadable; .* a larger share with --max-unreadable"
    )
    with pytest.raises(TooManyUnreadable, match=said) as caught:
        write_folder(folder, tmp_path / "out", max_unreadable=0.0714, workers=workers)
    assert [Path(each["image"]).name for each in caught.value.unreadable] == [
        *("bad_1.jpg", "bad_2.jpg", "bad_3.jpg", "notes.jpg")
    ]
    assert names_in(tmp_path / "out") == []
    written = write_folder(folder, tmp_path / "out", max_unreadable=0.0715, workers=workers)
    assert [(each.samples, len(each.skipped)) for each in written] == [(61, 3), (13, 1)]
    assert written[0].skipped + written[1].skipped == caught.value.unreadable
    assert verify(tmp_path / "out") == written


def test_a_set_without_a_readable_image_is_refused(photo_folder, tmp_path):
    for name in ("train", "val"):
        (tmp_path / name / "china").mkdir(parents=True)
        (tmp_path / name / "china" / "a.jpg").write_bytes(b"")
    shutil.copy(photo_folder / "train" / "china" / "000.jpg", tmp_path / "train" / "china")
    with pytest.raises(
        TooManyUnreadable,
        match=r"one sample must be readable; got 1 of 2 in train.* and 1 of 1 in val\.beton",
    ):
        write_folder(tmp_path, tmp_path / "out", max_unreadable=1.0)


class Odd(Encoding):
    """Stores the images of odd numbers, each in a group of its own."""

    def __call__(self, item: Item) -> Encoded | str:
        encoded = super().__call__(item)
        if item.number % 2 == 0:
            return "even"
        assert isinstance(encoded, Encoded)
        return replace(encoded, groups={"number": str(item.number)})


def test_groups_are_those_of_the_samples_that_were_stored(small_fashion, tmp_path):
    train, _ = write_sets(
        images.fashion_sets(small_fashion), tmp_path, Odd(mode="raw"), max_unreadable=0.5
    )
    assert train.groups == {"number": [str(number) for number in range(1, 100, 2)]}


def test_a_worker_that_dies_is_noticed(photo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK", 1)
    monkeypatch.setattr(writer, "AHEAD", 2)  # the rest is not begun yet

    def kill(done: int, _: int) -> None:
        if done == 3:
            for worker in multiprocessing.active_children():
                worker.kill()

    with pytest.raises(LoaderError, match=r"a worker process died"):
        write_folder(photo_folder, tmp_path / "out", workers=2, progress=kill)
    assert names_in(tmp_path / "out") == []


def test_workers_that_hang_are_noticed(photo_folder, monkeypatch):
    stock, limit_s = Future.result, [60.0]  # long enough for the workers to start
    monkeypatch.setattr(Future, "result", lambda self, timeout: stock(self, limit_s[0]))
    monkeypatch.setattr(writer, "CHUNK", 1)
    monkeypatch.setattr(writer, "AHEAD", 2)  # the rest is not begun yet
    encoded = writer.encode_all(
        images.folder_sets(photo_folder)[0].items, FileEncoding(mode="jpg", exif="apply"), workers=2
    )
    next(encoded)
    limit_s[0] = 0.5
    workers = [psutil.Process(worker.pid) for worker in multiprocessing.active_children()]
    for worker in workers:
        worker.suspend()
    with pytest.raises(LoaderError, match=r"samples .*jpg to .*jpg were not encoded within 300 s"):
        list(encoded)
    assert workers and not any(worker.is_running() for worker in workers)


def test_folders_must_hold_images_of_the_same_classes(folder, tmp_path):
    def refused(said: str) -> None:
        with pytest.raises(DataError, match=said):
            write_folder(folder, tmp_path / "out")

    shutil.copytree(folder / "val" / "china", folder / "val" / "tulip")
    shutil.copytree(folder / "train" / "china", folder / "train" / "porcelain")
    refused("same classes; train alone has porcelain, val alone tulip")
    (folder / "train" / "tulip").mkdir()
    refused(r"class folder .*tulip must hold images")
    shutil.rmtree(folder / "train")
    refused(r"photos/train must be a folder of class folders; it does not exist")
    (folder / "train").mkdir()
    refused(r"photos/train must hold a folder for each class")


def test_a_full_disk_leaves_nothing(photo_folder, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(DataError, match=r"train\.beton does not fit the disk"):
            write_folder(photo_folder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_leaves_nothing(photo_folder, tmp_path, workers):
    def interrupt(done: int, _: int) -> None:
        if done == 40:
            os.kill(os.getpid(), signal.SIGINT)

    # A test run in the background is started deaf to it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_folder(photo_folder, tmp_path, workers=workers, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert names_in(tmp_path) == []


def test_existing_files_are_kept_if_whole(small_fashion, tmp_path):
    times = lambda: [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.beton"))]
    count, keep = Mock(), {"source": small_fashion, "existing": "keep"}
    written = write_fashion(tmp_path, **keep, progress=count)
    assert count.mock_calls == [call(i, 130) for i in range(1, 131)]  # of both sets
    before = times()
    assert write_fashion(tmp_path, **keep) == written and times() == before
    os.truncate(tmp_path / "val.beton", written[1].bytes - 1)
    with pytest.raises(DataError, match=r"val\.beton"):
        write_fashion(tmp_path, **keep)


def test_existing_files_are_refused_or_replaced(small_fashion, tmp_path):
    before = write_fashion(tmp_path, source=small_fashion)
    with pytest.raises(DataError, match=r"train\.beton and .*val\.beton must not exist yet"):
        write_fashion(tmp_path, source=small_fashion)
    assert write_fashion(tmp_path, source=small_fashion, existing="replace") == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "jpeg"}, "mode must be 'jpg', 'raw' or 'mixed'.*got mode='jpeg'"),
        ({"quality": 0}, r"quality in 1\.\.100; .* quality=0"),
        ({"max_resolution": 0}, "max_resolution 1 or more pixels, .* max_resolution=0"),
        ({"workers": 0}, "workers must be 1 or more.*got workers=0"),
        ({"max_unreadable": -0.1}, "max_unreadable=-0.1"),
        ({"exif": "rotate"}, "exif must be 'apply' or 'ignore', .* got exif='rotate'"),
        ({"existing": "burn"}, "existing='burn'"),
    ],
)
def test_wrong_options_are_refused(photo_folder, tmp_path, wrong, message):
    with pytest.raises(DataError, match=message):
        write_folder(photo_folder, tmp_path, **wrong)
