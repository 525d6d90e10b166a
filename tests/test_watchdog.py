"""A process that hangs ends, and leaves what its threads were at; one that beats does not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from pipeline.watchdog import FOLDER, Watchdog

HANGS = """
import sys, threading, time
from pathlib import Path
from pipeline.watchdog import Watchdog

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


def test_what_goes_on_leaves_nothing(tmp_path: Path) -> None:
    with Watchdog(tmp_path, rank=0, patience_s=0.3) as watchdog:
        for _ in range(5):
            time.sleep(0.1)
            watchdog.beat()
    time.sleep(0.4)  # it is called off
    assert list((tmp_path / FOLDER).iterdir()) == []
    with Watchdog(tmp_path / "unwatched", rank=0, patience_s=0.0) as watchdog:
        watchdog.beat()
    assert not (tmp_path / "unwatched").exists()
