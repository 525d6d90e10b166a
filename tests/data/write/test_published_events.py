"""Published sets, read by tonic from small files in the layout of each; nothing is downloaded."""

import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.__main__ import extras_with
from pipeline.core.errors import DataError
from pipeline.data.write.published_events import GESTURES, PublishedRecording, published_sets
from pipeline.data.write.recordings import Framing
from tests.helpers.recordings import TYXP, some_events, write_aedat4, write_bin, write_npy

pytest.importorskip("tonic")


def nmnist(folder: Path) -> Path:
    for part, each in (("Train", 3), ("Test", 2)):
        for digit in range(10):
            for number in range(each):
                write_bin(
                    folder / "NMNIST" / part / str(digit) / f"{number:05d}.bin",
                    some_events(digit * 10 + number, 34, 34),
                )
    return folder


def same(recording: PublishedRecording, events: TYXP) -> bool:
    stream = recording.events()
    pairs = zip((stream.t_N, stream.y_N, stream.x_N, stream.p_N), events, strict=True)
    return all(np.array_equal(found, expected) for found, expected in pairs)


def test_nmnist(tmp_path: Path) -> None:
    train, val = published_sets("nmnist", nmnist(tmp_path))
    digits = list(range(10))
    assert (train.name, val.name, train.classes) == ("train", "val", list(map(str, digits)))
    assert [item.label for item in train.items] == sorted(digits * 3)
    assert len(val.items) == 20 and same(train.items[7], some_events(21, 34, 34))
    stream = train.items[7].events()
    assert stream.sensor == (34, 34) and stream.span == (stream.t_N[0], stream.t_N[-1] + 1)


def test_dvs_gesture_has_milliseconds_and_labels_for_names(tmp_path: Path) -> None:
    root, events = tmp_path / "DVSGesture", some_events(3, 128, 128)
    write_npy(root / "ibmGestureTrain" / "user01_fluorescent" / "10.npy", events)
    write_npy(root / "ibmGestureTest" / "user24_led" / "2.npy", events)
    train, val = published_sets("gesture", tmp_path)
    assert (train.classes, [i.label for i in train.items], [i.label for i in val.items]) == (
        list(GESTURES),
        [10],
        [2],
    )
    assert same(train.items[0], (events[0] // 1000 * 1000, *events[1:]))
    write_npy(root / "ibmGestureTest" / "user24_led" / "11.npy", events)
    with pytest.raises(DataError, match=r"11\.npy must name its class, one of 0, 1, .*; got '11'"):
        published_sets("gesture", tmp_path)


def test_cifar10dvs_trains_on_the_first_nine_of_ten_by_number(tmp_path: Path) -> None:
    pytest.importorskip("aedat")
    for name in ("airplane", "truck"):
        for number in range(20):
            path = tmp_path / "CIFAR10DVS" / name / f"cifar10_{name}_{number}.aedat4"
            write_aedat4(path, some_events(number, 128, 128), width=128, height=128)
    train, val = published_sets("cifar10dvs", tmp_path)
    assert train.classes == ["airplane", "truck"] and (len(train.items), len(val.items)) == (36, 4)
    assert [path.stem for path in (item.path for item in val.items)] == [
        f"cifar10_{name}_{number}" for name in ("airplane", "truck") for number in (18, 19)
    ]
    assert [item.label for item in val.items] == [0, 0, 1, 1]
    assert same(train.items[9], some_events(9, 128, 128))  # number 9 before number 10


def test_ncaltech101_begins_where_its_window_did(tmp_path: Path) -> None:
    t_N, y_N, x_N, p_N = some_events(1, 90, 100)
    for name in ("BACKGROUND_Google", "accordion"):
        for number in range(10):
            write_bin(
                tmp_path / "NCALTECH101" / "Caltech101" / name / f"image_{number:04d}.bin",
                (t_N, y_N + 30, x_N + 70, p_N),
            )
    train, val = published_sets("ncaltech101", tmp_path)
    assert (len(train.items), len(val.items)) == (18, 2) and train.items[0].events().sensor == (
        180,
        240,
    )
    assert same(train.items[0], (t_N, y_N - y_N.min(), x_N - x_N.min(), p_N))


def test_a_class_without_an_evaluation_part_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "NCALTECH101" / "Caltech101"
    for name, count in (("accordion", 5), ("airplanes", 4)):
        for number in range(count):
            write_bin(root / name / f"image_{number:04d}.bin", some_events(1, 90, 100))
    said = r"must have 5 or more recordings to be split; got 4 like .*airplanes/image_0000\.bin$"
    with pytest.raises(DataError, match=said):
        published_sets("ncaltech101", tmp_path)


@pytest.mark.parametrize("cut", [1, 16, 30])
@pytest.mark.parametrize("suffix", [".bin", ".aedat4", ".npy"])
def test_an_event_file_that_is_cut_short_is_named(tmp_path: Path, suffix: str, cut: int) -> None:
    path, events = tmp_path / f"recording{suffix}", some_events(0, 34, 34)
    if suffix == ".bin":
        write_bin(path, events)
        cut += 0 if cut % 5 else 1  # whole events are missing: nothing in the file tells
    elif suffix == ".npy":
        write_npy(path, events)
    else:
        pytest.importorskip("aedat")
        write_aedat4(path, events, width=34, height=34)
    path.write_bytes(path.read_bytes()[:-cut])
    result = Framing(slices=2, size=34)(PublishedRecording(path, 0, (34, 34)))
    assert str(result).startswith("it is cut short"), result


def test_recordings_that_are_not_there_are_named_with_where_to_get_them(
    tmp_path: Path, monkeypatch: Any
) -> None:
    import tonic.datasets

    def offline(self: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(tonic.datasets.NMNIST, "download", offline)
    said = (
        r"^write events: nmnist is not in .*NMNIST, and tonic cannot download it \(URLError: .*no"
        r" route to host.*\); "
        r"download https://.* and unpack it there, or pass another --source$"
    )
    with pytest.raises(DataError, match=said):
        published_sets("nmnist", tmp_path)


def test_without_tonic_the_extra_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    [recording, *_] = published_sets("nmnist", nmnist(tmp_path))[0].items
    monkeypatch.setitem(sys.modules, "tonic.io", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        recording.events()
    assert extras_with(str(missing.value.name)) == ["events"]
