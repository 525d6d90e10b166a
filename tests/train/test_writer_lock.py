"""One writer for a run: the next one waits until the last one's process is gone."""

import errno
import fcntl
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import IO
from unittest.mock import Mock

import pytest

from pipeline.core.errors import Diverged, UserError
from pipeline.track.journal import NullTracker, read
from pipeline.train import writer_lock
from pipeline.train.backend.collectives import Ranks
from pipeline.train.job import note_death
from pipeline.train.writer_lock import journal, only_writer
from tests.helpers.events import event


def test_the_next_writer_waits_until_the_last_is_gone_or_gives_up_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        *("flock", "--no-fork", str(tmp_path / "writer.lock")),
        *("sh", "-c", "echo held; exec sleep 60"),  # in another process, with the lock
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with monkeypatch.context() as patch:
            patch.setattr(writer_lock, "PATIENCE_S", 0.3)
            with (
                pytest.raises(UserError, match="another worker still has the lock after 0 s"),
                only_writer(tmp_path, Ranks()),
            ):
                pass
        begun = time.monotonic()
        threading.Timer(1.0, holder.kill).start()
        with only_writer(tmp_path, Ranks()):
            assert time.monotonic() - begun > 0.8


def test_storage_that_is_away_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, failed = fcntl.flock, []

    def stale(handle: IO[str], how: int) -> None:
        if len(failed) < 2:
            failed.append(handle)
            raise OSError(errno.ESTALE, "Stale file handle")
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", stale)
    with only_writer(tmp_path, Ranks()):
        assert len(failed) == 2 and all(handle.closed for handle in failed)
        with (tmp_path / "writer.lock").open("a") as other, pytest.raises(BlockingIOError):
            flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_lock_is_free_again_afterwards_and_a_folder_that_is_gone_is_not_waited_for(
    tmp_path: Path,
) -> None:
    for _ in range(2):
        with only_writer(tmp_path, Ranks()):
            pass
    with pytest.raises(FileNotFoundError), only_writer(tmp_path / "gone", Ranks()):
        pass


def test_an_attempt_that_fails_says_so_with_its_traceback(tmp_path: Path) -> None:
    for attempt in range(2):
        with pytest.raises(ZeroDivisionError), journal(tmp_path, Ranks()):
            print(1 // 0)
        failed = read(tmp_path / "journal.jsonl")[-1]
        assert (failed["event"], failed["attempt"]) == ("failed", attempt)
        assert failed["error"].startswith("ZeroDivisionError")
        assert "print(1 // 0)" in failed["traceback"]


def test_what_a_worker_meets_after_its_drivers_death_is_no_failure_of_the_run(
    tmp_path: Path,
) -> None:
    with (tmp_path / "driver.lock").open("a") as driver:
        fcntl.flock(driver, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError), journal(tmp_path, Ranks()):
            raise RuntimeError("the driver lives")
    with pytest.raises(RuntimeError), journal(tmp_path, Ranks()):
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(UserError), journal(tmp_path, Ranks()):
        raise Diverged("the loss is nan")
    failed, diverged = read(tmp_path / "journal.jsonl")
    assert failed["error"] == "RuntimeError: the driver lives"
    assert diverged["event"] == "diverged"


def test_an_error_that_a_full_disk_keeps_from_the_journal_is_raised_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.track.journal.os.write", full)
        with pytest.raises(ZeroDivisionError) as raised, journal(tmp_path, Ranks()):
            print(1 // 0)
    [note] = raised.value.__notes__
    assert note.startswith(
        "this error could not be journaled: [Errno 28] journal: No space left on device: "
    )
    assert read(tmp_path / "journal.jsonl") == []


def test_what_ended_other_workers_is_told_once_by_the_next_attempt(tmp_path: Path) -> None:
    """And before anything that may end that one. The death of a worker that hung is its hang."""
    (tmp_path / "stacks").mkdir()
    for second, death in enumerate((2, 1, 2)):
        if second < 2:
            (tmp_path / "stacks" / f"rank1-20260105-12000{second}.txt").write_text(
                "Timeout (0:30:00)!"
            )
        note_death(tmp_path, worker=death, error=f"KeyError: {second}")
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), journal(tmp_path, Ranks()):
                print(1 // 0)
    told = [
        (event["event"], event["attempt"], event["worker"], event.get("stacks") or event["error"])
        for event in read(tmp_path / "journal.jsonl")
        if event["event"] != "failed"
    ]
    assert told == [
        ("hung", 0, 1, "stacks/rank1-20260105-120000.txt"),
        ("died", 0, 2, "KeyError: 0"),
        ("hung", 2, 1, "stacks/rank1-20260105-120001.txt"),
        ("died", 4, 2, "KeyError: 2"),
    ]


def test_notes_that_cannot_be_read_keep_nobody_from_training(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rankX-old.txt").write_text("somebody's own")
    (tmp_path / "died.json").write_bytes(b"\xff{")
    with journal(tmp_path, Ranks()) as tracker:
        tracker.write(event("start"))
    assert [event["event"] for event in read(tmp_path / "journal.jsonl")] == ["start"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with journal(tmp_path, Ranks(rank=1)) as tracker:
        assert isinstance(tracker, NullTracker)
    assert list(tmp_path.iterdir()) == []
