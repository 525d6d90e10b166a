"""On one core a launch under Ray ends, in every way that it can, and leaves no process behind."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from tests.helpers.driver import Driver
from tests.helpers.small import steps_of

pytestmark = [pytest.mark.distributed, pytest.mark.full, pytest.mark.timeout(900)]

RECIPE = """
from pipeline.recipe.recipe import spec
from recovery_lab import triangle
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe(schedule=spec(triangle), backend="deepspeed", epochs=20)
"""
LAB = """
def triangle(optimizer, steps, epoch_steps):
    '''Up to the optimizer's learning rate at half the run, and down again.'''
    highest = optimizer.param_groups[0]["lr"]

    def schedule(step):
        optimizer.param_groups[0]["lr"] = highest * (1 - abs(2 * step / steps - 1))

    return schedule
"""
GONE_S = 10.0  # after its last line
# In the environment of each process of a launch, whoever its parent is by then.
MARK = "SPIKETRAIN_TEST_OF"
Launch = Callable[..., Driver]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-core")
    (folder / "recovery_lab.py").write_text(LAB)  # a package of the user's own, admitted by --trust
    (folder / "recovery.py").write_text(RECIPE)
    return folder


@pytest.fixture
def launch(folder: Path) -> Iterator[Launch]:
    """Starts a driver of this verb and run, on one core."""
    started: list[Driver] = []

    def start(verb: str, name: str, *words: str) -> Driver:
        recipe = ["launch", str(folder / "recovery.py"), "--workers", "1", "--name", name]
        started.append(
            Driver(
                *(recipe if verb == "launch" else [verb, name]),
                *("--trust", "recovery_lab", *words),
                run=folder / "runs" / name,
                folder=folder,
                environment={MARK: str(folder)},
            )
        )
        return started[-1]

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # whoever is started inherits it
    yield start
    os.sched_setaffinity(0, cores)
    for driver in started:
        driver.kill()


def at_step(driver: Driver, step: int) -> None:
    driver.wait_for(lambda event: event["event"] == "step" and event["step"] >= step, within=600)


def ends(driver: Driver, code: int, last: str) -> None:
    assert driver.end(within=600) == code, driver.log.read_text()[-3000:]
    said = driver.log.stat().st_mtime
    while left := of_a_launch(driver.run.parent.parent):
        assert time.time() - said < GONE_S, f"{left} are left:\n{driver.log.read_text()[-3000:]}"
        time.sleep(0.1)
    assert time.time() - said < GONE_S
    assert re.search(last, driver.log.read_text().splitlines()[-1]), driver.log.read_text()[-3000:]


def of_a_launch(folder: Path) -> list[str]:
    """The processes that were started for it and have not ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get(MARK) == str(folder)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_it_finishes_and_another_of_its_name_is_refused_once_ray_is_up(launch: Launch) -> None:
    ends(launch("launch", "finished"), 0, "^ +spiketrain export finished")
    ends(launch("launch", "finished"), 2, "launch: --name must be new in ")


def test_it_is_stopped_by_ctrl_c_and_resumed_whatever_ray_remembers(launch: Launch) -> None:
    driver = launch("launch", "resumed")
    at_step(driver, 7)
    driver.process.send_signal(signal.SIGINT)
    ends(driver, 130, "stopped; resume with: ")
    attempts = list((driver.run / "ray").iterdir())
    assert attempts
    for attempt in attempts:  # cut short: ray 2.60 would never start under this name again
        (attempt / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).write_text(
            '{"ray_version": "2.60.0", "checkpoint_res'
        )
    ends(launch("resume", "resumed"), 0, "^ +spiketrain export resumed")
    assert len(steps_of(driver.run, "start")) == 2
    assert steps_of(driver.run, "step") == list(range(1, 20 * 8 + 1))


def test_it_diverges(launch: Launch) -> None:
    ends(launch("launch", "diverged", "--set", "optimizer.lr=1e30"), 2, "^training: ")


def test_its_worker_is_killed(launch: Launch) -> None:
    driver = launch("launch", "killed", "--max-restarts", "0")
    at_step(driver, 3)
    [worker] = driver.workers()
    worker.kill()
    ends(driver, 1, "worker 0")
