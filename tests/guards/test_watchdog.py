"""A process that hangs ends, and leaves what its threads were at; one that beats does not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.guards.watchdog import FOLDER, Watchdog
from pipeline.track.jsonl import read

HANGS = """
import sys, threading, time
from pathlib import Path
from pipeline.guards.watchdog import Watchdog

def waits_for_ever():
    threading.Event().wait()

with Watchdog(Path(sys.argv[1]), rank=3, patience_s=0.5) as watchdog:
    for _ in range(8):
        time.sleep(0.2)
        watchdog.beat()
    print("hangs now", flush=True)
    waits_for_ever()
"""


def test_a_hang_is_written_down_and_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and ran.stdout == "hangs now\n" and time.monotonic() - began < 30
    [file] = (tmp_path / FOLDER).iterdir()
    assert file.name.startswith("rank3-") and "waits_for_ever" in file.read_text()


GOES_ON = """
import sys, time
from pathlib import Path
from pipeline.guards.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), rank=0, patience_s=3.0) as watchdog:
    for _ in range(7):
        time.sleep(0.5)
        watchdog.beat()
time.sleep(3.5)  # it is called off
"""
OFF = """
import sys, time
from pathlib import Path
from pipeline.guards.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), rank=0, patience_s=3.0) as watchdog:
    with watchdog.off():
        time.sleep(0.5)
        watchdog.beat()  # of a pause between two tries, say
        with watchdog.patient(1.0):  # which is not less than none
            watchdog.beat()
            time.sleep(3.5)
    watchdog.beat()
"""
PATIENT = """
import sys, time
from pathlib import Path
from pipeline.guards.watchdog import Watchdog

with Watchdog(Path(sys.argv[1]), rank=0, patience_s=2.0) as watchdog:
    with watchdog.patient(60.0):
        time.sleep(1.0)
        watchdog.beat()
        time.sleep(2.5)
    with watchdog.patient(0.1):  # of two the longer
        time.sleep(1.0)
"""


@pytest.mark.parametrize("code", [GOES_ON, OFF, PATIENT], ids=["what beats", "what is off", "what may take longer"])
def test_nobody_else_is_ended_and_nothing_is_left(tmp_path: Path, code: str) -> None:
    """In a process of its own, which is what a watchdog ends."""
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_what_takes_longer_than_the_longer_patience_hangs(tmp_path: Path) -> None:
    code = HANGS.replace("    waits_for_ever()", "    with watchdog.patient(2.0):\n        waits_for_ever()")
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and 2.0 < time.monotonic() - began < 30


def test_without_patience_nobody_watches(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "unwatched", rank=0, patience_s=0.0) as watchdog:
        watchdog.beat()
    assert not (tmp_path / "unwatched").exists()


WORKER = """
import sys, threading, time
from dataclasses import replace
from pathlib import Path
from pipeline import worker
from pipeline.run import compose
from pipeline.checkpoint import background
from pipeline.job import Place
from tests.small import make_run, small_recipe

write, patience_s = background._write, 4.0

def slowly(file, value):
    time.sleep(1.7)  # five files of a checkpoint
    write(file, value)

def waits_for_ever(*parts):
    threading.Event().wait()

if sys.argv[2] == "hangs":
    compose.build_backend = waits_for_ever
elif sys.argv[2] == "restores":
    newest = compose._newest
    compose._newest = lambda *given, **more: time.sleep(6.0) or newest(*given, **more)
else:
    background._write = slowly
job = make_run(Path(sys.argv[1]), small_recipe(epochs=1, checkpoint_every=0))
worker.run(replace(job, hang_minutes=patience_s / 60), Place())
"""


def worked(run: Path, how: str) -> int:
    return subprocess.run([sys.executable, "-c", WORKER, str(run), how], capture_output=True, timeout=100).returncode


def test_a_worker_that_hangs_before_it_trains_is_ended(tmp_path: Path) -> None:
    assert worked(tmp_path / "run", "hangs") == 1
    [file] = (tmp_path / "run" / FOLDER).iterdir()
    assert "waits_for_ever" in file.read_text()


def test_a_checkpoint_that_takes_longer_to_restore_ends_nobody(tmp_path: Path) -> None:
    assert worked(tmp_path / "run", "restores") == 0


def test_a_checkpoint_that_takes_longer_to_write_ends_nobody(tmp_path: Path) -> None:
    assert worked(tmp_path / "run", "writes") == 0
    assert list((tmp_path / "run" / FOLDER).iterdir()) == []
    [event] = [event for event in read(tmp_path / "run" / "journal.jsonl") if event["event"] == "checkpoint"]
    assert event["write_s"] > 4.0
