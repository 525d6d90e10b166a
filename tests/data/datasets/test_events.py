"""Event files, written and read: counts to the last one, exact order and resumption, recordings
that move as one, damage.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.random import FLIP, SHIFT_X, SHIFT_Y, below, bits
from pipeline.data.base import DataError
from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.events import Events
from pipeline.data.ffcv.format import Arrays, read_tables
from pipeline.data.ffcv.manifest import Manifest
from pipeline.data.ffcv.page_checks import verify
from pipeline.data.write.events import write_events
from pipeline.data.write.generated_events import MovingShape
from pipeline.data.write.recordings import Framing, frames
from pipeline.data.write.writer import Source, write_sets
from pipeline.spiking.encode import to_time_first
from tests.helpers.loaders import read, same

SIZE, SLICES, TRAIN, VAL = 16, 12, 61, 13  # recordings: no multiple of any batch size used here
GOOD: dict[str, Any] = {"classes": 16, "steps": 4, "size": SIZE}
SIZES: dict[str, Any] = {"seed": 5, "batch_size": 12, "micro_batch": 12}


def write(out: Path, **changes: Any) -> list[Manifest]:
    return write_events(
        "moving",
        out,
        **{"size": SIZE, "slices": SLICES, "samples": TRAIN, "val_samples": VAL} | changes,
    )


def expected(number: int, steps: int, part: int = 1) -> np.ndarray:
    return frames(MovingShape(number, part, SIZE).events(), steps, SIZE)


def test_fulfils_the_contract(moving: Path) -> None:
    data = Events(moving, **GOOD)
    batch = read(data.train(**SIZES))[0]
    assert to_time_first(batch.x, 4).shape == (4, 12, 2, SIZE, SIZE)
    assert torch.equal(batch.target, batch.index % 16)
    assert Events("/nowhere", **GOOD).shape == data.shape == (4, 2, SIZE, SIZE)  # opens no file


@pytest.mark.parametrize("steps", [12, 4, 1])
def test_what_is_read_is_what_was_counted(moving: Path, steps: int) -> None:
    for batch in read(Events(moving, **GOOD | {"steps": steps}).val(micro_batch=5)):
        for x, number in zip(batch.x, batch.index.tolist(), strict=True):
            np.testing.assert_array_equal(x.numpy(), expected(number, steps))


def test_one_channel_is_the_sum_of_both_polarities(moving: Path) -> None:
    np.testing.assert_array_equal(
        read(Events(moving, **GOOD, channels=1).val(micro_batch=VAL))[0].x[3, :, 0].numpy(),
        expected(3, 4).sum(1),
    )


def test_mean_and_std_are_those_of_the_counts_of_one_step(moving: Path) -> None:
    plain, normal = (
        read(Events(moving, **GOOD, **how).val(micro_batch=VAL))[0].x
        for how in ({}, {"mean": (0.5, 0.25), "std": (2.0, 4.0)})
    )
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.5, 0.25), (2.0, 4.0)))
    torch.testing.assert_close(normal, (plain - mean) / std)


def test_a_recording_is_shifted_and_mirrored_as_one(moving: Path) -> None:
    """Against numpy: one shift and one flip for all steps and both polarities, zeros come in."""
    moved = Events(moving, **GOOD, crop="shift", reach=3, flip="random")
    for epoch in (0, 1):
        for batch in read(moved.train(**SIZES), epoch):
            for x, number in zip(batch.x, batch.index.tolist(), strict=True):
                down, right = (
                    int(below(bits(5, epoch, number, draw), 7)) for draw in (SHIFT_Y, SHIFT_X)
                )
                padded = np.pad(expected(number, 4, part=0), ((0, 0), (0, 0), (3, 3), (3, 3)))
                window = padded[:, :, down : down + SIZE, right : right + SIZE]
                turned = window[..., ::-1] if below(bits(5, epoch, number, FLIP), 2) else window
                np.testing.assert_array_equal(x.numpy(), turned)
    np.testing.assert_array_equal(read(moved.val(micro_batch=VAL))[0].x[5].numpy(), expected(5, 4))


@pytest.mark.full
def test_threads_do_not_change_a_bit(moving: Path) -> None:
    data = Events(moving, **GOOD, crop="shift", flip="random")
    one = read(data.train(**SIZES), 1)
    assert same(one, read(data.train(**SIZES, threads=2), 1))
    assert not same(one, read(data.train(**SIZES), 2))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"counts": "int16"}, "int16"), ({"frames_by": "number"}, "uint8"), ({"slices": 3}, "uint8")],
)
def test_counts_of_other_types_and_cuts(
    tmp_path: Path, options: dict[str, Any], dtype: str
) -> None:
    train, _ = write(tmp_path, **options, samples=16, val_samples=16)
    assert read_tables(tmp_path / "train.beton").kind == Arrays(
        dtype, (options.get("slices", SLICES), 2, SIZE, SIZE)
    )
    assert train.stored["saturated"] == 0
    x = read(Events(tmp_path, **GOOD | {"steps": 3}).val(micro_batch=16))[0].x[9]
    by: Any = options.get("frames_by", "time")
    np.testing.assert_array_equal(
        x.numpy(), frames(MovingShape(9, 1, SIZE).events(), 3, SIZE, by=by)
    )


def test_halves_are_read_as_they_were_stored(tmp_path: Path) -> None:
    """Mean counts of two pixels by two, float16, through the same files."""
    sets = [
        Source(name, ["a"], [MovingShape(i * 16, 0, 32) for i in range(4)], "here")
        for name in ("train", "val")
    ]
    write_sets(sets, tmp_path, Framing(slices=2, size=16, resize="area"))
    x = read(Events(tmp_path, classes=1, steps=2, size=16).val(micro_batch=4))[0].x[1]
    whole = frames(MovingShape(16, 0, 32).events(), 2, 32).reshape(2, 2, 16, 2, 16, 2).mean((3, 5))
    np.testing.assert_array_equal(x.numpy(), whole.astype(np.float16).astype(np.float32))


def test_files_are_the_same_from_two_workers_and_whole(moving: Path, tmp_path: Path) -> None:
    one, two = verify(moving), write(tmp_path, workers=2)
    assert [each.sha256 for each in one] == [each.sha256 for each in two]
    assert one[0].histogram == [4] * 13 + [3] * 3 and one[0].stored["events"] > 10_000
    assert one[0].options["slices"] == SLICES


def test_ffcv_itself_reads_the_file(moving: Path) -> None:
    from ffcv.reader import Reader

    reader = Reader(str(moving / "val.beton"))
    field: Any = reader.handlers["array"]
    assert (field.dtype, field.shape) == (np.dtype("uint8"), (SLICES, 2, SIZE, SIZE))
    assert reader.metadata["f1"].tolist() == [number % 16 for number in range(VAL)]
    content = np.fromfile(moving / "val.beton", np.uint8)
    address = int(reader.metadata["f0"][6])
    stored = content[address : address + SLICES * 2 * SIZE**2].reshape(SLICES, 2, SIZE, SIZE)
    np.testing.assert_array_equal(stored, expected(6, SLICES))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 5}, r"steps must divide the 12 slices of .*train\.beton; got 5"),
        ({"size": 34}, r"size must be that of the frames in .*, 16x16; got 34"),
        ({"classes": 10}, r"classes must be those of .*, 16; got 10"),
    ],
)
def test_what_the_file_does_not_hold_is_refused(
    moving: Path, change: dict[str, int], said: str
) -> None:
    with pytest.raises(DataError, match=f"^Events: {said}"):
        Events(moving, **GOOD | change).train(**SIZES)


def test_images_are_no_events_and_events_no_images(moving: Path, fashion: Path) -> None:
    for data, said in (
        (
            Events(fashion, classes=10, steps=1, size=28),
            r"Events: .*train\.beton must hold frames .*; got Images\(\); images are read by Beton",
        ),
        (
            Beton(moving, classes=16, size=16),
            r"data: .*train\.beton must hold a field 'image'; got array, label; .* by Events",
        ),
    ):
        with pytest.raises(DataError, match=f"^{said}"):
            data.train(**SIZES)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "classes, steps and size must be 1 or more"),
        ({"channels": 3}, "channels 1 or 2; got .*channels=3"),
        ({"crop": "resized"}, "crop must be 'shift' or 'none'; got 'resized'"),
        ({"flip": True}, "flip must be 'random' or 'never'; got True"),
        ({"reach": 2}, "reach has no effect with crop='none'"),
        ({"crop": "shift", "reach": 17}, r"reach must be 0\.\.size=16 pixels; got 17"),
        ({"mean": (0.5,)}, r"mean and std must have 2 values \(channels\)"),
        ({"std": (1.0, 0.0)}, "std above 0"),
        ({"held_out": 1.0}, "held_out must be a share"),
    ],
)
def test_options_that_contradict_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"^Events: .*{said}"):
        Events("/nowhere", **GOOD | wrong)


def test_files_that_were_kept_must_be_those_that_were_asked_for(copy: Path) -> None:
    assert write(copy, existing="keep") == verify(copy)
    for change, said in (
        ({"samples": 60}, r"train\.beton was written from 61 samples .*; got 60 of"),
        ({"slices": 6}, r"train\.beton was written with .*use --existing replace"),
        ({"content_seed": 1}, "content seed 0; got 61 of moving shapes, content seed 1"),
    ):
        with pytest.raises(DataError, match=said):
            write(copy, existing="keep", **change)


def test_saccades_over_fashion(small_fashion: Path, tmp_path: Path) -> None:
    train, val = write_events("saccades", tmp_path, source=small_fashion, samples=20)
    assert (train.samples, val.samples, train.classes[9]) == (20, 30, "Ankle boot")
    batch = read(Events(tmp_path, classes=10, steps=3, size=34).val(micro_batch=10))[0]
    assert batch.x.sum((1, 2, 3, 4)).min() > 1000 and batch.target.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            {"name": "dvs"},
            (
                "the set must be one of moving, flashes, saccades, nmnist, cifar10dvs, gesture,"
                " ncaltech101; got 'dvs'"
            ),
        ),
        (
            {"name": "moving", "source": "x"},
            "source has no effect: moving is generated; got source=x",
        ),
        (
            {"name": "moving", "resize": "area"},
            "resize has no effect: moving is generated in the requested size",
        ),
        (
            {"name": "nmnist", "samples": 5, "source": "x"},
            "samples has no effect: nmnist has its own recordings",
        ),
        (
            {"name": "gesture", "source": "x"},
            (
                "gesture needs a source, the folder that tonic downloads to, and slices; got"
                " source=x, slices=None"
            ),
        ),
        ({"name": "moving", "samples": 0}, "samples and val_samples .*; got samples=0, val_"),
        ({"name": "moving", "content_seed": -1}, r"samples .*, content_seed in 0\.\.2\^63-1; got"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, call: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"^write events: {said}"):
        write_events(**call, out=tmp_path)
    assert not list(tmp_path.iterdir())
