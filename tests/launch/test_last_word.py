"""A driver that is killed where it stands is told to MLflow; one that ends by itself leaves nothing behind that would tell."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pipeline.launch.last_word import LOG, synced_if_killed
from pipeline.report.stores import open_store
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


@pytest.mark.full
def test_a_driver_that_is_killed_is_marked_killed_in_the_store_that_it_told(tmp_path: Path) -> None:
    run, uri = tmp_path / "runs" / "run", f"sqlite:///{tmp_path}/elsewhere.db"
    run.mkdir(parents=True)
    (run.parent / "pipeline").mkdir()  # a package of the user's, beside which it was launched
    (run.parent / "pipeline" / "__init__.py").touch()
    about = {"cwd": run.parent, "env": {**os.environ, "PYTHONPATH": str(Path.cwd())}}
    with subprocess.Popen(
        [sys.executable, "-P", "-c", DRIVER, str(run), uri], stdout=subprocess.PIPE, text=True, **about
    ) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "started\n"
        wait_for((run / "mlflow.json").exists)
        assert open_store(uri).listed()[0].status == "RUNNING"
        [heir] = psutil.Process(driver.pid).children()
        driver.kill()
    assert wait_for(lambda: open_store(uri).listed()[0].status == "KILLED", 60)
    assert wait_for(lambda: is_gone(heir)) and "points delivered" in (run / LOG).read_text()
    assert [event["event"] for event in read(run / "journal.jsonl")] == ["start"]
    assert state_of(run) == "interrupted" and not (run.parent / "mlflow.db").exists()


@pytest.mark.parametrize(
    "leave", [lambda heir: None, lambda heir: heir.kill(), lambda heir: 1 / 0], ids=["well", "alone", "badly"]
)
def test_a_driver_that_ends_by_itself_leaves_nobody_behind(tmp_path: Path, leave: Callable[[psutil.Process], None]) -> None:
    run = FakeRun(tmp_path / "run")
    run.folder.mkdir()
    run.start()
    others = set(psutil.Process().children())
    heirs, said = set[psutil.Process](), list[str]()
    with suppress(ZeroDivisionError), synced_if_killed(run.folder, f"sqlite:///{tmp_path}/mlflow.db", said.append):
        heirs |= set(psutil.Process().children()) - others
        leave(next(iter(heirs)))
    [heir] = heirs
    assert is_gone(heir) and said == [] and {each.name for each in tmp_path.iterdir()} == {"run"}
    assert {each.name for each in run.folder.iterdir()} == {"journal.jsonl"}


def test_where_no_other_process_can_be_started_the_run_trains_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", refused)
    said: list[str] = []
    with synced_if_killed(tmp_path, "sqlite:///nowhere.db", said.append):
        why = os.strerror(errno.EAGAIN)
        assert said == [f"no process that outlives this one ({why}): after a kill, `spiketrain sync` tells MLflow"]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE  # which another than we has to reap
