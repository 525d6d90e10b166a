"""A lock is seen by whoever tries it, as flock(1) sees it; storage that keeps locks to each machine, or knows none, is told."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from pipeline.doctor.run_lock import held, tried


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (file := tmp_path / "marker").touch()
    return file


def test_what_is_locked_here_is_locked_for_others(file: Path) -> None:
    other = ["flock", "--shared", "--nonblock", str(file), "true"]  # shared: as who asks whether a run is driven
    with held(file):
        assert subprocess.run(other).returncode == 1
        assert tried(file) == "held"
    assert subprocess.run(other).returncode == 0


def test_what_others_have_locked_is_seen(file: Path) -> None:
    words = ["flock", "--no-fork", str(file), "sh", "-c", "echo locked; exec sleep 60"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        assert tried(file) == "held"
        other.kill()


def test_trying_keeps_nothing(file: Path) -> None:
    assert tried(file) == tried(file) == "free"


def test_storage_that_keeps_locks_to_each_machine(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda handle, how: None)  # as of two machines, each of which has a table of its own
    with held(file):
        assert tried(file) == "free"


def test_storage_that_knows_no_locks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: object, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    with held(file):
        assert tried(file) == "failed: OSError: [Errno 38] Function not implemented"


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert tried(tmp_path / "marker").startswith("failed: FileNotFoundError")
    assert list(tmp_path.iterdir()) == []
