"""Written beside training: what is saved is what was there, one at a time, whole or told why not,
by one rank and by two.
"""

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import distributed

from pipeline.core.errors import UserError
from pipeline.train.backend.base import cpu_copy
from pipeline.train.backend.collectives import Ranks
from pipeline.train.checkpoint import (
    Checkpoints,
    CheckpointStore,
    find_damage,
    step_folders,
)
from pipeline.train.checkpoint import (
    checkpoints as thread,
)
from tests.helpers.few import TRAINER, Counting, backend, feedback, save, step
from tests.helpers.processes import refusal, run_ranks
from tests.helpers.waiting import until


@contextmanager
def writing(act: Callable[[Path], object]) -> Iterator[None]:
    """Inside, each file is written after `act`, which may wait or fail."""
    write = thread._write

    def acts_first(file: Path, value: Any) -> None:
        act(file)
        write(file, value)

    thread._write = acts_first
    try:
        yield
    finally:
        thread._write = write


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """No file is written before it is set."""
    opened = threading.Event()
    with writing(lambda file: until(opened.is_set, within=20, pause=0.01)):
        yield opened
        opened.set()


def failing(number: int) -> AbstractContextManager[None]:
    """Weights cannot be written; as torch has it, its own error comes on top."""

    def fails(file: Path) -> None:
        if file.suffix == ".safetensors":
            try:
                raise OSError(number, os.strerror(number), str(file))
            finally:
                raise RuntimeError("unexpected pos 640 vs 598")

    return writing(fails)


def test_training_goes_on_meanwhile_and_what_was_there_is_what_is_saved(
    tmp_path: Path, gate: threading.Event
) -> None:
    made, rule, checkpoints = (
        backend(1),
        Counting(1.0),
        Checkpoints(CheckpointStore(tmp_path), attempt="a"),
    )
    then = cpu_copy(made.network.state_dict())
    momenta = cpu_copy([state["momentum_buffer"] for state in made.optimizer.state.values()])
    assert checkpoints.save(1, made, rule, TRAINER) is None
    step(made)
    rule.feedback += 1  # type: ignore[operator]
    assert checkpoints.done() is None and step_folders(tmp_path) == []
    gate.set()
    told = checkpoints.wait()
    assert told is not None and told.write_s > 0
    other = backend(2)
    assert feedback(CheckpointStore(tmp_path), made=other) == 1
    assert all(torch.equal(value, then[name]) for name, value in other.network.state_dict().items())
    assert not torch.equal(then["0.weight"], made.network.state_dict()["0.weight"])
    found = [state["momentum_buffer"] for state in other.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(found, momenta, strict=True))


def test_it_is_told_once_as_soon_as_it_is_whole(tmp_path: Path) -> None:
    checkpoints = Checkpoints(CheckpointStore(tmp_path), attempt="a")
    checkpoints.save(1, backend(), Counting(), TRAINER)
    told = until(checkpoints.done, within=20, pause=0.01)
    assert told is not None
    assert (
        told.address == str(tmp_path / "step_00000001") and find_damage(Path(told.address)) is None
    )
    assert checkpoints.done() is None and checkpoints.wait() is None


def test_the_next_one_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    checkpoints = Checkpoints(CheckpointStore(tmp_path), attempt="a")
    checkpoints.save(1, backend(), Counting(), TRAINER)
    threading.Timer(0.2, gate.set).start()
    before = checkpoints.save(2, backend(), Counting(), TRAINER)
    assert before is not None and before.step == 1
    last = checkpoints.wait()
    assert last is not None and last.step == 2


def has_failed(checkpoints: Checkpoints) -> bool:
    return until(checkpoints.failed, within=20, pause=0.01)


@pytest.mark.parametrize(
    ("number", "last", "error", "said"),
    [
        (
            errno.ENOSPC,  # a full disk
            2,
            UserError,
            "checkpoint: cannot be written after step 2: No space left on device: .*; the newest"
            " complete one is",
        ),
        # two failures in a row
        (errno.EIO, 3, OSError, "checkpoint after step 3 was not written: Input/output error"),
    ],
)
def test_what_cannot_be_written_ends_training_and_the_one_before_stays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    last: int,
    error: type[Exception],
    said: str,
) -> None:
    checkpoints = Checkpoints(CheckpointStore(tmp_path), attempt="a")
    save(checkpoints, 1, backend(), Counting(), TRAINER)
    with failing(number):
        for step in range(2, last + 1):
            checkpoints.save(step, backend(), Counting(), TRAINER)
            assert has_failed(checkpoints)
        with pytest.raises(error, match=said):
            checkpoints.save(last + 1, backend(), Counting(), TRAINER)
    # What there was of it makes room.
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert checkpoints.wait() is None


def test_storage_that_failed_once_is_told_of_and_the_next_one_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, str]] = []
    checkpoints = Checkpoints(
        CheckpointStore(tmp_path), attempt="a", on_unwritten=lambda *about: told.append(about)
    )
    for number in (2, 4):  # never two in a row
        with failing(errno.EIO):
            checkpoints.save(number, backend(), Counting(), TRAINER)
            assert has_failed(checkpoints) and checkpoints.done() is None
        assert checkpoints.save(number + 1, backend(), Counting(), TRAINER) is None
        saved = checkpoints.wait()
        assert saved is not None and saved.step == number + 1 and not checkpoints.failed()
    assert [step for step, _ in told] == [2, 4]
    assert told[0][1].startswith("checkpoint after step 2 was not written: Input/output error")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000005"]


@pytest.mark.parametrize(
    ("steps", "last"), [((1, 2, 3, 4), "step_00000004"), ((1, 1, 1, 1), "step_00000001.3")]
)
def test_an_old_one_that_cannot_be_deleted_is_told_and_costs_no_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], last: str
) -> None:
    """As where NFS keeps the name of a file that somebody has open."""
    checkpoints = Checkpoints(CheckpointStore(tmp_path), attempt="a", keep=1)
    save(checkpoints, steps[0], backend(0), Counting(0.0), TRAINER)

    fails = Mock(side_effect=OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), "x"))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.train.checkpoint.store.shutil.rmtree", fails)
        for value, number in enumerate(steps[1:]):
            told = save(checkpoints, number, backend(), Counting(value + 1.0), TRAINER)
            assert told.step == number and told.prune_error.startswith(
                "OSError: [Errno 39] Directory not empty: "
            )
    assert feedback(CheckpointStore(tmp_path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == [last]  # swept


def test_an_attempt_that_ends_by_an_error_finishes_what_it_was_writing_or_says_that_it_failed(
    tmp_path: Path, gate: threading.Event
) -> None:
    checkpoints, error = (
        Checkpoints(CheckpointStore(tmp_path), attempt="a"),
        KeyError("training fails"),
    )
    checkpoints.save(1, backend(), Counting(), TRAINER)
    threading.Timer(0.1, gate.set).start()
    told = checkpoints.close(error)
    assert told is not None and find_damage(Path(told.address)) is None
    with failing(errno.EIO):
        checkpoints.save(2, backend(), Counting(), TRAINER)
        assert checkpoints.close(error) is None
    assert error.__notes__ == [
        "checkpoint step_00000002 was not written: RuntimeError: unexpected pos 640 vs 598"
    ]


def wait_for(file: Path) -> None:
    """Until a rank has written this file, its last, and does what comes then."""
    until(file.exists, within=20, said=lambda: str(file), pause=0.01)
    time.sleep(0.2)


def of_ranks(rank: int, size: int, folder: str, **more: Any) -> Checkpoints:
    return Checkpoints(
        CheckpointStore(Path(folder)),
        attempt="a",
        rank=rank,
        ranks=size,
        each=Ranks(rank, size).all_gather_object,
        **more,
    )


def _two_ranks(rank: int, size: int, folder: str) -> dict[str, Any]:
    checkpoints, found, held = of_ranks(rank, size, folder), {}, threading.Event()
    made, staging = backend(), Path(folder)
    for writer in range(size):  # neither rank's part alone makes a checkpoint
        held.clear()
        with writing(lambda file: until(held.is_set, within=20, pause=0.01)):
            checkpoints.save(1 + writer, made, Counting(), {**TRAINER, "world_size": size})
            if rank == writer:
                held.set()
                thread: Any = checkpoints._writing
                wait_for(thread.temp / (f".{rank}.json" if rank else "trainer.json"))
            distributed.barrier()
            found[f"half {writer}"] = (staging / f"step_0000000{1 + writer}").exists()
            distributed.barrier()
            held.set()
            checkpoints.wait()
        found[f"whole {writer}"] = find_damage(staging / f"step_0000000{1 + writer}")
    for full_rank in range(size):
        with cannot_write(rank == full_rank, errno.ENOSPC, "No space left on device"):
            checkpoints.save(5, made, Counting(), TRAINER)
            found[f"full {full_rank}"] = refusal(checkpoints.wait)
    distributed.barrier()
    # A rank that is gone: the other ends at once, without a checkpoint.
    if rank == 0:
        alone = Checkpoints(checkpoints.store, attempt="b", rank=0, ranks=2)
        alone.save(6, made, Counting(), TRAINER)
        error = RuntimeError("connection reset by peer")
        alone.close(error)
        found["alone"] = error.__notes__
        found["left"] = sorted(path.name for path in staging.glob("*step*"))
    return found


def cannot_write(fails: bool, number: int, said: str) -> AbstractContextManager[None]:
    return writing(Mock(side_effect=OSError(number, said, "x") if fails else None))


def _one_cannot_write(rank: int, size: int, folder: str) -> dict[str, Any]:
    told, about = [], {**TRAINER, "world_size": size}
    checkpoints = of_ranks(rank, size, folder, on_unwritten=lambda *about: told.append(about))
    with cannot_write(rank == 1, errno.EIO, "Input/output error"):
        checkpoints.save(1, backend(), Counting(), about)
        heard = has_failed(checkpoints)
        distributed.barrier()
    checkpoints.save(1, backend(), Counting(), about)
    checkpoints.wait()
    return {"heard": heard, "told": told, "whole": find_damage(Path(folder) / "step_00000001")}


@pytest.mark.distributed
def test_that_one_rank_cannot_write_is_known_at_once_and_all_write_again(tmp_path: Path) -> None:
    for found in run_ranks(_one_cannot_write, 2, tmp_path, str(tmp_path / "checkpoints")):
        assert found == {
            "heard": True,
            "told": [(1, "checkpoint after step 1 was not written: Input/output error: x")],
            "whole": None,
        }


def _one_is_slow(rank: int, size: int, folder: str) -> int:
    beat, thread.WAIT_S = Mock(), 0.05
    checkpoints = of_ranks(rank, size, folder, beat=beat)
    with writing(lambda file: time.sleep(0.5 * rank)):
        checkpoints.save(1, backend(), Counting(), {**TRAINER, "world_size": size})
        checkpoints.wait()
    return beat.call_count


@pytest.mark.distributed
def test_ranks_show_signs_of_life_while_one_of_them_writes(tmp_path: Path) -> None:
    assert min(run_ranks(_one_is_slow, 2, tmp_path, str(tmp_path / "checkpoints"))) >= 3


def test_so_does_one_that_ends(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread, "WAIT_S", 0.02)
    checkpoints = Checkpoints(CheckpointStore(tmp_path), attempt="a", beat=(beat := Mock()))
    checkpoints.save(1, backend(), Counting(), TRAINER)
    threading.Timer(0.3, gate.set).start()
    assert checkpoints.close() is not None and beat.call_count >= 3


@pytest.mark.parametrize("end", ["wait", "close"])
def test_a_thread_that_writes_for_long_is_no_sign_of_life(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Storage that hangs raises nothing: the watchdog, which nobody calms then, is who finds it."""
    monkeypatch.setattr(thread, "WAIT_S", 0.02)
    monkeypatch.setattr(thread, "LONGEST_S", 0.5)
    beats: list[float] = []
    checkpoints = Checkpoints(
        CheckpointStore(tmp_path), attempt="a", beat=lambda: beats.append(time.monotonic())
    )
    checkpoints.save(1, backend(), Counting(), TRAINER)
    began = time.monotonic()
    threading.Timer(2.0, gate.set).start()
    getattr(checkpoints, end)()
    assert [beat for beat in beats if 1.0 < beat - began < 1.9] == []


@pytest.mark.distributed
def test_two_ranks_make_one_checkpoint_and_fail_together(tmp_path: Path) -> None:
    first, second = run_ranks(_two_ranks, 2, tmp_path, str(tmp_path / "checkpoints"))
    for writer in range(2):
        for found in (first, second):
            assert (found[f"half {writer}"], found[f"whole {writer}"]) == (False, None)
            assert (
                "after step 5: No space left on device: x; the newest complete one is"
                in found[f"full {writer}"]
            )
    assert first["alone"][0].endswith(
        "RuntimeError: checkpoint step_00000006: the part of worker 1 is missing"
    )
    assert first["left"] == [".writing-b-step_00000006", "step_00000001", "step_00000002"]
    written = {path.name for path in (tmp_path / "checkpoints" / "step_00000002").iterdir()}
    assert {"buffers_rank0.pt", "buffers_rank1.pt", "manifest.json"} < written and not any(
        name.startswith(".") for name in written
    )


def test_who_waits_in_a_folder_that_is_gone_says_so(tmp_path: Path) -> None:
    """Another driver has taken the place over and swept it, with the part of worker 1."""
    writing = thread.Background(
        CheckpointStore(tmp_path),
        1,
        {"config.json": "{}"},
        attempt="a",
        rank=0,
        world_size=2,
        keep=2,
    )
    wait_for(writing.temp / "config.json")
    shutil.rmtree(writing.temp)
    with pytest.raises(RuntimeError, match="was deleted; another driver may own"):
        writing.outcome.result(20)
