import fcntl
import subprocess
import sys
from collections.abc import Callable

import pytest

from pipeline.track.state import is_driven, state_of


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "interrupted"),
        (["stopped"], "stopped"),
        (["failed"], "failed"),
        (["failed", "start"], "interrupted"),
        (["stopped", "start", "finish"], "finished"),
        (["finish", "start"], "interrupted"),  # prolonged, then killed
    ],
)
def test_state_without_a_driver(fake_run: Callable, events: list[str], state: str):
    run = fake_run()
    assert state_of(run.folder) == "new"
    with run.start() as journal:
        for kind in events:
            journal.event(kind)
            journal.event("step", step=1)  # a straggler says nothing of the state
    assert state_of(run.folder) == state


def test_a_summary_without_a_journal_is_a_finished_run(fake_run: Callable):
    run = fake_run()
    (run.folder / "summary.json").write_text("{}")
    assert state_of(run.folder) == "finished"


def test_a_driver_that_lives_and_one_that_was_killed(fake_run: Callable):
    run = fake_run()
    run.start().close()
    lock = run.folder / "driver.lock"
    assert not is_driven(run.folder)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        " print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        driver.stdout.readline()
        assert is_driven(run.folder) and state_of(run.folder) == "running"
        driver.kill()
    assert lock.exists()
    assert not is_driven(run.folder) and state_of(run.folder) == "interrupted"
    with lock.open() as file:  # asking leaves the lock free
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_finished_run_is_finished_while_its_driver_still_delivers(fake_run: Callable):
    run = fake_run()
    with run.start() as journal:
        journal.event("finish")
    with (run.folder / "driver.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert state_of(run.folder) == "finished"
