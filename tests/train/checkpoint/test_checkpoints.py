"""Checkpoints: whole or not there, verified before use, damaged ones named and passed over, the
best one kept.
"""

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from pipeline.core import files as disk
from pipeline.track.events import Event
from pipeline.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    CheckpointStore,
    expected_step,
    find_damage,
    pin,
    prune,
    step_folders,
    verified_checkpoint,
)
from pipeline.train.checkpoint.manifest import facts_of, seal
from tests.helpers.events import event
from tests.helpers.few import FILES, TRAINER, Counting, backend, content, feedback, restore, save


def damaged(data: bytes) -> bytes:
    """With another byte in its middle."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def flip_a_byte(file: Path) -> None:
    file.write_bytes(damaged(file.read_bytes()))


def unreadable(
    monkeypatch: pytest.MonkeyPatch, file: Path, number: int, times: int = 1000
) -> list[OSError]:
    """The file cannot be opened as long as one of these errors is left."""
    left, opened = [OSError(number, os.strerror(number))] * times, Path.open

    def fails(self: Path, *words: Any, **more: Any) -> Any:
        if self == file and left:
            raise left.pop()
        return opened(self, *words, **more)

    monkeypatch.setattr(Path, "open", fails)
    monkeypatch.setattr(disk, "TRY_S", 0.0)
    return left


def steps_in(folder: Path) -> str:
    return "".join(path.name[-1] for path in step_folders(folder))


def saved(folder: Path, steps: list[int], **checkpoints: Any) -> Checkpoints:
    made = Checkpoints(CheckpointStore(folder), attempt="a", **checkpoints)
    for step in steps:
        save(made, step, backend(step), Counting(step), {**TRAINER, "score": None})
    return made


def test_what_is_saved_comes_back_bit_for_bit(place: CheckpointStore) -> None:
    original, other, checkpoints = backend(1), backend(2), Checkpoints(place, attempt="a")
    for each in (original, other):
        each.network.register_buffer("running_mean", torch.tensor([3.0]))
    own = {"running_mean": torch.tensor([1.0])}  # of this rank
    told = save(checkpoints, 7, original, Counting(2.5), TRAINER, buffers=own)
    made = "step_00000007" if place.folder else "step_00000007-a"
    assert told.address == f"{place.url}/{made}" and told.bytes > 0
    assert content(place) == {f"{made}/{name}" for name in FILES}
    assert json.loads(place.read("step_00000007/manifest.json"))["files"].keys() == FILES - {
        "manifest.json"
    }
    assert place.folder or not [*place.staging.iterdir()]  # the run's own disk keeps nothing
    rule = Counting()
    assert restore(checkpoints, other, rule)["step"] == 7
    assert other.network.get_buffer("running_mean") == 1.0
    for a, b in zip(original.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(a, b)
    momenta = (
        [state["momentum_buffer"] for state in made.optimizer.state.values()]
        for made in (original, other)
    )
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    assert torch.equal(rule.feedback, torch.full((3,), 2.5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "name", "how"),
    [
        *(("folder", name, "flipped") for name in sorted(FILES)),
        *(
            (place, name, how)
            for place in ("folder", "memory", "s3")
            for name in ("manifest.json", "rule.pt")
            for how in ("cut", "gone")
        ),
    ],
    indirect=["place"],
)
def test_a_damaged_checkpoint_is_quarantined_by_name_and_the_one_before_is_used(
    place: CheckpointStore, name: str, how: str
) -> None:
    told: list[tuple[str, str]] = []
    checkpoints = Checkpoints(place, attempt="a", on_quarantine=lambda *about: told.append(about))
    for step in (1, 2):
        save(checkpoints, step, backend(step), Counting(step), TRAINER)
    files = LocalFileSystem() if place.folder is not None else place.fs
    root = place.folder if place.folder is not None else place.root
    path = f"{root}/{Path(place.address('step_00000002')).name}/{name}"
    if how == "gone":
        files.rm_file(path)
    else:
        files.pipe_file(path, damaged(files.cat_file(path)[: -7 if how == "cut" else None]))
    assert restore(checkpoints, backend(9), Counting())["step"] == 1
    assert place.names() == ["step_00000001"]
    if place.folder is None and (name, how) == ("manifest.json", "gone"):
        assert told == [] and not any(
            "step_00000002" in file for file in content(place)
        )  # it never was one
        return
    [(moved, reason)] = told
    assert moved.startswith(f"{place.address('quarantine/step_00000002')}") and name in reason
    assert any(file.startswith("quarantine/step_00000002") for file in content(place))


def test_the_newest_the_best_and_the_pinned_are_kept(place: CheckpointStore) -> None:
    checkpoints = Checkpoints(place, attempt="a", keep=2)
    for step, score in [(1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, 0.4)]:
        save(checkpoints, step, backend(), Counting(), {**TRAINER, "score": score})
        if step == 1 and place.folder is not None:
            pin(place.folder / "step_00000001")
        elif step == 1:
            place.write("step_00000001.pinned", b"")
    assert [name[-1] for name in place.names()] == ["1", "2", "4", "5"]
    assert not any("step_00000003" in file for file in content(place))
    assert verified_checkpoint(place, "best").name == "step_00000002"
    assert verified_checkpoint(place).name == "step_00000005"
    assert find_damage(place.fetch("step_00000001")) is None


def test_a_damaged_one_is_told_before_it_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who dies in between leaves it where the next one finds it, and no journal says that it must
    be there.
    """
    told: list[str] = []
    saved(tmp_path, [1])
    flip_a_byte(tmp_path / "step_00000001" / "rule.pt")
    dying, next_one = (
        Checkpoints(
            CheckpointStore(tmp_path),
            attempt=name,
            on_quarantine=lambda address, reason: told.append(address),
        )
        for name in "bc"
    )
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "set_aside", lambda self, name, aside: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            dying.newest()
    assert len(told) == 1 and not Path(told[0]).exists()
    assert next_one.newest() is None
    assert len(told) == 2 and find_damage(Path(told[1])) is not None and not step_folders(tmp_path)


def test_a_write_that_was_cut_short_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1])
    torn = tmp_path / ".writing-dead-step_00000002"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert restore(checkpoints, backend(), Counting())["step"] == 1
    assert not torn.exists()


def test_a_score_that_cannot_be_read_now_costs_nobody_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = unreadable(monkeypatch, tmp_path / "step_00000002" / "trainer.json", errno.ESTALE)
    checkpoints = Checkpoints(CheckpointStore(tmp_path), attempt="a", keep=1)
    for step, score, there in [(1, 0.3, "1"), (2, 0.9, "12"), (3, 0.2, "123"), (4, 0.1, "1234")]:
        told = save(checkpoints, step, backend(), Counting(), {**TRAINER, "score": score})
        assert steps_in(tmp_path) == there
        assert ("Stale file handle" in told.prune_error) == (step > 1)
    with pytest.raises(OSError, match="Stale file handle"):
        verified_checkpoint(CheckpointStore(tmp_path), "best")
    left.clear()
    assert verified_checkpoint(CheckpointStore(tmp_path), "best").name == "step_00000002"
    told = save(checkpoints, 5, backend(), Counting(), {**TRAINER, "score": 0.4})
    assert (steps_in(tmp_path), told.prune_error) == ("25", "")


def test_one_on_a_bad_sector_is_nobodys_best_and_does_not_stay_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    unreadable(monkeypatch, tmp_path / "step_00000001" / "trainer.json", errno.EIO)
    assert save(checkpoints, 3, backend(), Counting(), {**TRAINER, "score": 0.1}).prune_error == ""
    assert steps_in(tmp_path) == "23"
    assert verified_checkpoint(CheckpointStore(tmp_path), "best").name == "step_00000003"


def test_a_step_that_is_saved_again_is_found_where_its_event_says(place: CheckpointStore) -> None:
    checkpoints, attempt = Checkpoints(place, attempt="a", keep=2), "" if place.folder else "-a"
    told = [save(checkpoints, 1, backend(), Counting(value), TRAINER) for value in range(12)]
    names = ["step_00000001", *(f"step_00000001.{number}" for number in range(1, 12))]
    assert [each.address for each in told] == [f"{place.url}/{name}{attempt}" for name in names]
    assert place.names() == names[:1] and place.address(names[0]) == told[-1].address
    assert content(place) == {f"{names[-1]}{attempt}/{name}" for name in FILES}
    assert feedback(place) == 11
    checkpoints.discard(1, "for a test")
    assert {file.split("-")[0] for file in content(place)} == {f"quarantine/{names[-1]}"}


class Killed(BaseException):
    """Stands for a process that dies: nothing in the product catches it."""


@pytest.mark.parametrize("call", range(4))
def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    saved(tmp_path, [1, 3])
    made = tmp_path / ".writing-a-step_00000003"
    shutil.copytree(tmp_path / "step_00000003", made)
    flip_a_byte(made / "model.safetensors")
    seal(made, facts_of(made, [name for name in FILES if name != "manifest.json"]))
    old, new = (
        (folder / "model.safetensors").read_bytes() for folder in (tmp_path / "step_00000003", made)
    )
    outlived, remove = iter([False] * call), shutil.rmtree

    def removed(path: Path, **how: Any) -> None:
        if path.exists() and next(outlived, True):
            (path / "model.safetensors").unlink()  # in the middle of it
            raise Killed
        remove(path, **how)

    def renamed(self: Path, target: Path, rename: Any = Path.rename) -> Path:
        if next(outlived, True):
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", renamed)
        patch.setattr("pipeline.train.checkpoint.store.shutil.rmtree", removed)
        try:
            CheckpointStore(tmp_path).finish(made, "step_00000003")
            prune(CheckpointStore(tmp_path), "step_00000003", keep=2)
            assert call == 3  # after a rename, one to the name of what goes, and its end
        except Killed:
            assert call < 3
    checkpoints = Checkpoints(CheckpointStore(tmp_path), attempt="b")
    path = tmp_path / ("step_00000003" if call == 0 else "step_00000003.1")
    assert checkpoints.newest() == path
    assert (path / "model.safetensors").read_bytes() == (new if call else old)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step_00000001", path.name]


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("number", "times"), [(errno.EIO, 9), (errno.ESTALE, 1), (errno.EIO, 1), (errno.EACCES, 9)]
)
def test_one_whose_medium_fails_is_quarantined_and_the_one_before_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int
) -> None:
    """After some tries; one that may not be read, or whose storage is away, is nobody's damage."""
    saved(tmp_path, [1, 2])
    told: list[str] = []
    unreadable(monkeypatch, tmp_path / "step_00000002" / name, number, times)
    checkpoints = Checkpoints(
        CheckpointStore(tmp_path), attempt="b", on_quarantine=lambda *about: told.append(about[1])
    )
    if number in (errno.EACCES, errno.ESTALE):
        with pytest.raises(OSError, match=os.strerror(number)):
            checkpoints.newest()
        assert told == []
    else:
        is_back = times < disk.TRIES
        assert checkpoints.newest() == tmp_path / ("step_00000002" if is_back else "step_00000001")
        assert told == ([] if is_back else [f"{name} cannot be read: {os.strerror(number)}"])


def test_what_cannot_be_loaded_is_refused_and_nothing_is_no_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(CheckpointStore(tmp_path), attempt="a")
    assert checkpoints.newest() is None
    with pytest.raises(CheckpointError, match="got none"):
        verified_checkpoint(CheckpointStore(tmp_path))
    save(checkpoints, 1, backend(), Counting(), {"world_size": 2, "zero": 1, "score": None})
    with pytest.raises(
        CheckpointError, match="ZeRO-1 state must be loaded by 2 workers, which wrote it; got 1"
    ):
        restore(checkpoints, backend(), Counting())


def test_a_kill_while_an_old_checkpoint_is_deleted_is_survived(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    half = tmp_path / ".deleting-dead-step_00000000"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"rest")
    (tmp_path / "step_00000001" / "trainer.json").write_text(
        "{"
    )  # damaged, and old: nobody's best, and in nobody's way
    save(checkpoints, 3, backend(), Counting(), {**TRAINER, "score": 0.5})
    save(checkpoints, 4, backend(), Counting(), TRAINER)
    assert steps_in(tmp_path) == "34"
    assert checkpoints.newest() == tmp_path / "step_00000004"
    assert not half.exists()


def test_one_that_is_newer_than_what_is_saved_takes_nobodys_room(tmp_path: Path) -> None:
    """Its manifest came late, of a driver whose place was taken over."""
    save(
        Checkpoints(CheckpointStore(tmp_path), attempt="a", keep=1),
        5,
        backend(),
        Counting(),
        TRAINER,
    )
    later = Checkpoints(CheckpointStore(tmp_path), attempt="b", keep=1)
    for step in (1, 2):
        save(later, step, backend(), Counting(), TRAINER)
    assert CheckpointStore(tmp_path).names() == ["step_00000002", "step_00000005"]


# ------------------------------------------------------ what the journal knows, where none is found


def start(step: int) -> Event:
    return event("start", step=step)


def told_saved(step: int) -> Event:
    return event("checkpoint", step=step, path=f"/runs/run/checkpoints/step_{step:08d}")


def quarantined(step: int, more: str = "") -> Event:
    path = f"s3://bucket/run/quarantine/step_{step:08d}{more}-20261127-031500-7-a"
    return event("quarantine", path=path)


FIRST, SECOND = (start(0), told_saved(3)), (start(0), told_saved(3), told_saved(6))


@pytest.mark.parametrize(
    ("events", "step"),
    [
        ((), None),
        ((start(0), event("step", step=2)), None),
        (FIRST, 3),
        ((*SECOND, start(6)), 6),
        ((start(8),), 8),  # adopted from a run whose folder was lost
        ((*FIRST, quarantined(3)), None),
        ((*SECOND, quarantined(6, ".1")), 3),
        ((*SECOND, quarantined(6), quarantined(6)), 3),  # told once more by the start after a kill
        ((*SECOND, told_saved(9), quarantined(9), quarantined(6)), None),  # 3 was pruned
        # 9 died with its writer, 3 was pruned for it
        ((*SECOND, quarantined(9), quarantined(6)), None),
        ((*FIRST, quarantined(3), *FIRST), 3),
        ((*FIRST, quarantined(3), start(0)), None),
        ((*SECOND, start(3)), 3),  # 6 had been moved away by hand, and the run went on
    ],
)
def test_one_must_be_there_unless_it_was_quarantined(
    events: tuple[Event, ...], step: int | None
) -> None:
    assert expected_step(events, keep=2) == step
