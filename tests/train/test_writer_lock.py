"""One writer for a run: the next one waits until the last one's process is gone."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO
from unittest.mock import Mock

import pytest

from pipeline.core.errors import UserError
from pipeline.track.journal import NullTracker, read
from pipeline.train import writer_lock
from pipeline.train.backend.collectives import Ranks
from pipeline.train.job import note_death
from pipeline.train.writer_lock import journal, only_writer
from tests.helpers.events import event

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that writes the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "writer.lock")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_next_writer_waits_until_the_last_is_gone(
    tmp_path: Path, holder: subprocess.Popen
) -> None:
    begun = time.monotonic()
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    with only_writer(tmp_path, Ranks()):
        assert time.monotonic() - begun > 0.8


def test_it_gives_up_in_one_line(
    tmp_path: Path, holder: subprocess.Popen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_lock, "PATIENCE_S", 0.3)
    with (
        pytest.raises(UserError, match="another worker still writes this run"),
        only_writer(tmp_path, Ranks()),
    ):
        pass


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
        "it could not be journaled: [Errno 28] journal: No space left on device: "
    )
    assert read(tmp_path / "journal.jsonl") == []


def test_what_ended_other_workers_is_told_once_by_the_next_attempt(tmp_path: Path) -> None:
    """And before anything that may end that one."""
    (tmp_path / "stacks").mkdir()
    for second in range(2):
        (tmp_path / "stacks" / f"rank1-20260105-12000{second}.txt").write_text("Timeout (0:30:00)!")
        note_death(tmp_path, worker=2, error=f"KeyError: {second}")
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), journal(tmp_path, Ranks()):
                print(1 // 0)
    told = [
        {**event, "time": 0}
        for event in read(tmp_path / "journal.jsonl")
        if event["event"] != "failed"
    ]
    assert told == [
        {"event": kind, "time": 0, "attempt": 2 * second, **about}
        for second in range(2)
        for kind, about in (
            ("hung", {"worker": 1, "stacks": f"stacks/rank1-20260105-12000{second}.txt"}),
            ("died", {"worker": 2, "error": f"KeyError: {second}"}),
        )
    ]


def test_of_a_worker_that_hung_its_end_is_not_told_twice(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank1-20260105-120000.txt").write_text("Timeout (0:30:00)!")
    for death in (1, 2):
        note_death(tmp_path, worker=death, error="its process has died")
        with journal(tmp_path, Ranks()):
            pass
    told = [(event["event"], event["worker"]) for event in read(tmp_path / "journal.jsonl")]
    assert told == [("hung", 1), ("died", 2)]


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
