"""On one core a launch under Ray ends, in every way that it can end, and leaves no process
behind.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline.data.write.images import write_folder
from pipeline.track.journal import read
from tests.helpers.driver import Driver

pytestmark = [pytest.mark.distributed, pytest.mark.full, pytest.mark.timeout(900)]

GONE_S = 10.0
"""after its last line"""
MARK = "SPIKETRAIN_TEST_OF"
"""in the environment of each process of a launch, whoever its parent is by then"""
RECIPE = """
from timm.optim import create_optimizer_v2
from pipeline.data.datasets.beton import Beton
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.train.objective import CrossEntropy
from pipeline.recipe import Checkpointing, Recipe, spec
from pipeline.rules.sltt import SLTT
from pipeline.train.schedule import cosine

def recipe():
    return Recipe(
        name="one-core",
        model=spec(nf_resnet18_small, classes=3, width=16, blocks=(1, 1)),
        rule=spec(SLTT),
        data=spec(Beton, folder={folder!r}, classes=3, size=32, crop="shift", flip="random"),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.1, momentum=0.9),
        schedule=spec(cosine),
        time_steps=4,
        batch_size=16,
        epochs=1,
        checkpoints=Checkpointing(every=5),
        log_every=1,
    )
"""
Launch = Callable[..., Driver]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-core")
    draw = np.random.default_rng(0)
    for part, count in (("train", 80), ("val", 5)):
        for label in range(3):
            (folder / part / f"class{label}").mkdir(parents=True)
            for index in range(count):
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    folder / part / f"class{label}" / f"{index}.jpg"
                )
    write_folder(folder, folder / "beton", workers=1)
    (folder / "recipe.py").write_text(RECIPE.format(folder=str(folder / "beton")))
    return folder


@pytest.fixture
def launch(folder: Path) -> Iterator[Launch]:
    started: list[Driver] = []

    def started_now(verb: str, name: str, *words: str) -> Driver:
        started.append(
            Driver(
                *(
                    ["launch", str(folder / "recipe.py"), "--workers", "1", "--name", name]
                    if verb == "launch"
                    else [verb, name]
                ),
                *words,
                run=folder / "runs" / name,
                folder=folder,
                environment={MARK: str(folder)},
            )
        )
        return started[-1]

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # whoever is started inherits it
    try:
        yield started_now
    finally:
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


def test_it_is_stopped_by_ctrl_c_and_resumed(launch: Launch) -> None:
    driver = launch("launch", "resumed")
    at_step(driver, 7)
    driver.process.send_signal(signal.SIGINT)
    ends(driver, 130, "stopped; resume with: ")
    ends(launch("resume", "resumed"), 0, "^ +spiketrain export resumed")
    assert [event["event"] for event in read(driver.run / "journal.jsonl")].count("start") == 2


def test_it_diverges(launch: Launch) -> None:
    ends(launch("launch", "diverged", "--set", "optimizer.lr=1e30"), 2, "^training: ")


def test_its_worker_is_killed(launch: Launch) -> None:
    driver = launch("launch", "killed", "--max-restarts", "0")
    at_step(driver, 3)
    [worker] = driver.workers()
    worker.kill()
    ends(driver, 1, "worker 0")
