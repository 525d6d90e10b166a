"""A driver that is killed where it stands is told to MLflow; one that ends by itself leaves nothing behind that would tell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.launch.last_word import synced_if_killed
from pipeline.report.store import open_store
from pipeline.track.jsonl import read
from pipeline.track.state import state_of
from tests.track.conftest import FakeRun
from tests.track.test_mlflow import wait_for

DRIVER = """
import io, sys, time
from pathlib import Path
from rich.console import Console
from pipeline.job import Job
from pipeline.launch.drive import drive
from tests.track.conftest import FakeRun

class Launcher:
    workers = 1

    def run(self, job, attempt):
        FakeRun(Path(job.run)).start()
        print("started", flush=True)
        time.sleep(60)

run, uri = sys.argv[1:]
job = Job(run=run, study="s", data_fingerprint="d", commit="c", recipe={}, run_id="r")
drive(job, Launcher(), Console(file=io.StringIO()), uri=uri, resume_command="spiketrain resume run")
"""


def test_a_driver_that_is_killed_is_marked_killed_in_the_store_that_it_told(tmp_path: Path) -> None:
    run, uri = tmp_path / "runs" / "run", f"sqlite:///{tmp_path}/elsewhere.db"
    run.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(run), uri], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "started\n"
        wait_for((run / "mlflow.json").exists)
        assert open_store(uri).listed()[0].state == "RUNNING"
        [heir] = psutil.Process(driver.pid).children()
        driver.kill()
    assert wait_for(lambda: open_store(uri).listed()[0].state == "KILLED", 60)
    psutil.wait_procs([heir], timeout=30)
    assert not heir.is_running() and [event["event"] for event in read(run / "journal.jsonl")] == ["start"]
    assert state_of(run) == "interrupted" and not (run.parent / "mlflow.db").exists()


@pytest.mark.parametrize(
    "leave", [lambda heir: None, lambda heir: heir.kill(), lambda heir: 1 / 0], ids=["well", "alone", "badly"]
)
def test_a_driver_that_ends_by_itself_leaves_nobody_behind(tmp_path: Path, leave: Callable[[psutil.Process], None]) -> None:
    run = FakeRun(tmp_path / "run")
    run.folder.mkdir()
    run.start()
    others = set(psutil.Process().children())
    heirs: set[psutil.Process] = set()
    with suppress(ZeroDivisionError), synced_if_killed(run.folder, f"sqlite:///{tmp_path}/mlflow.db"):
        heirs |= set(psutil.Process().children()) - others
        leave(next(iter(heirs)))
    [heir] = heirs
    assert not heir.is_running() and not (tmp_path / "mlflow.db").exists()
