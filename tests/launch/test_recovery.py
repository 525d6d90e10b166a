"""Two DeepSpeed workers under Ray, killed in every way that a cluster knows, end with the bits of a
run that nobody touched.

On one core a launch under Ray ends, in every way that it can end, and leaves no process behind.
"""

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from pipeline.data.write.images import write_folder
from pipeline.track.journal import read
from pipeline.train.checkpoint import step_folders
from tests.helpers.driver import Driver
from tests.helpers.small import same_weights

pytestmark = [pytest.mark.distributed, pytest.mark.full, pytest.mark.timeout(900)]

SEED = 20260105  # of the steps at which something dies
STEPS_PER_EPOCH, EPOCHS = 24, 3

RECIPE = """
from timm.optim import create_optimizer_v2
from pipeline.data.datasets.beton import Beton
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.train.objective import CrossEntropy
from pipeline.train.schedule import cosine
from pipeline.recipe import Checkpointing, Recipe, spec
from pipeline.rules.sltt import SLTT
{imports}

def recipe():
    return Recipe(
        name="recovery",
        model=spec(nf_resnet18_small, classes=3, width=16, blocks=(1, 1)),
        rule=spec(SLTT, k=2, rescale=True),
        data=spec(Beton, folder={folder!r}, classes=3, size=32, crop="shift", flip="random"),
        objective=spec(CrossEntropy),
        optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4),
        schedule=spec({schedule}),
        time_steps=4,
        batch_size={batch},
        epochs={epochs},
        checkpoints=Checkpointing(every=5),
        log_every=1,
    )
"""
LAB = """
def triangle(optimizer, steps, epoch_steps):
    '''Up to the optimizer's learning rate at half the run, and down again.'''
    highest = optimizer.param_groups[0]["lr"]

    def schedule(step):
        optimizer.param_groups[0]["lr"] = highest * (1 - abs(2 * step / steps - 1))

    return schedule
"""


def write_recipe(folder: Path, train: int, **about: object) -> Path:
    """The file of a recipe, and its data: so many pictures of each class to train with."""
    draw = np.random.default_rng(0)
    for part, count in (("train", train), ("val", 5)):
        for label in range(3):
            pictures = folder / part / f"class{label}"
            pictures.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(
                    draw.integers(0, 256, (32, 32, 3), dtype=np.uint8) // 2 + np.uint8(60 * label)
                ).save(pictures / f"{index}.jpg")
    write_folder(folder, folder / "beton", workers=1)
    file = folder / "recovery.py"
    file.write_text(RECIPE.format(folder=str(folder / "beton"), **about))
    return file


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "recovery_lab.py").write_text(LAB)  # a package of the user's own, admitted by --trust
    return write_recipe(
        folder,
        STEPS_PER_EPOCH * 32 // 3 + 1,
        imports="from recovery_lab import triangle",
        schedule="triangle",
        batch=32,  # a step of some 100 ms: time enough to be killed in
        epochs=EPOCHS,
    )


Start = Callable[..., Driver]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a driver, which ends with the test."""
    started: list[Driver] = []

    def start(*words: str, **about: Any) -> Driver:
        started.append(Driver(*words, **about))
        return started[-1]

    yield start
    for driver in started:
        driver.kill()


def launched(start: Start, recipe_file: Path, run: Path, verb: str = "launch") -> Driver:
    words = ["launch", str(recipe_file), "--workers", "2", "--name", run.name]
    words = words if verb == "launch" else [verb, run.name]
    return start(*words, "--trust", "recovery_lab", run=run, folder=recipe_file.parent)


@pytest.fixture(scope="module")
def untouched(recipe_file: Path) -> Path:
    run = recipe_file.parent / "untouched" / "whole"
    driver = launched(Driver, recipe_file, run)
    assert driver.end() == 0, driver.log.read_text()
    return run


def test_killed_in_every_way_it_ends_with_the_same_bits(
    recipe_file: Path,
    untouched: Path,
    tmp_path: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(recipe_file.parent)
    draw = random.Random(SEED)
    run = tmp_path / "hunted"

    # A worker, in mid-epoch: Ray starts the group again within the same launch.
    driver = launched(start, recipe_file, run)
    driver.at_step(draw.randrange(6, 14))
    draw.choice(driver.workers()).kill()
    assert driver.wait_for(lambda event: event["event"] == "start")["attempt"] == 1

    # The writer, while it writes a checkpoint: held still first, so that it surely dies inside.
    [torn] = kill_inside_a_checkpoint(driver)
    restarted = driver.wait_for(lambda event: event["event"] == "start")
    assert restarted["attempt"] == 2 and not torn.exists()

    # Ctrl-C: saved after the step, exit code of the shell's convention.
    driver.at_step(restarted["step"] + draw.randrange(3, 9))
    driver.process.send_signal(signal.SIGINT)
    assert driver.end() == 130
    stopped = read(run / "journal.jsonl")[-1]
    assert stopped["event"] == "stopped"
    assert step_folders(run / "checkpoints")[-1].name == f"step_{stopped['step']:08d}"

    # What Ray remembers of checkpoints, cut short (ray 2.60 would never start under this name
    # again): nobody asks it.
    attempts = list((run / "ray").iterdir())
    assert attempts
    for attempt in attempts:
        (attempt / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).write_text(
            '{"ray_version": "2.60.0", "checkpoint_res'
        )

    # The driver, with kill -9: its workers are gone within seconds.
    driver = launched(start, recipe_file, run, "resume")
    assert driver.wait_for(lambda event: event["event"] == "start")["step"] == stopped["step"]
    driver.at_step(stopped["step"] + draw.randrange(3, 9))
    orphans = driver.workers()
    assert len(orphans) == 2
    driver.process.kill()
    _, alive = psutil.wait_procs(orphans, timeout=30)
    assert not alive

    # A flipped byte in the newest checkpoint: named, moved away, and the one before is used.
    older, newest = step_folders(run / "checkpoints")[-2:]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 4
    weights.write_bytes(content)
    driver = launched(start, recipe_file, run, "resume")
    quarantined = driver.wait_for(lambda event: event["event"] == "quarantine")
    assert newest.name in quarantined["path"] and "model.safetensors" in quarantined["reason"]
    began = driver.wait_for(lambda event: event["event"] == "start")
    assert f"step_{began['step']:08d}" == older.name
    assert driver.end() == 0, driver.log.read_text()

    assert same_weights(run, untouched, trust=["recovery_lab"])
    assert read(run / "journal.jsonl")[-1]["restarts"] == 4
    assert every_step_was_trained(run)


def kill_inside_a_checkpoint(driver: Driver) -> list[Path]:
    """Stop rank 0 while its temp folder is there, and kill it; the folder that it left."""
    [writer] = [
        process for process in driver.workers() if holds(process, driver.run / "writer.lock")
    ]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not list((driver.run / "checkpoints").glob(".writing-*")):
            continue
        writer.suspend()
        torn = list((driver.run / "checkpoints").glob(".writing-*"))
        if torn:
            writer.kill()
            return torn
        writer.resume()
    raise AssertionError("no checkpoint was written within 60 s")


def holds(process: psutil.Process, file: Path) -> bool:
    return any(Path(opened.path) == file for opened in process.open_files())


def every_step_was_trained(run: Path) -> bool:
    return {
        event["step"] for event in read(run / "journal.jsonl") if event["event"] == "step"
    } == set(range(1, STEPS_PER_EPOCH * EPOCHS + 1))


# ------------------------------------------------------------------------------------- on one core

GONE_S = 10.0
"""after its last line"""
MARK = "SPIKETRAIN_TEST_OF"
"""in the environment of each process of a launch, whoever its parent is by then"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-core")
    write_recipe(folder, 80, imports="", schedule="cosine", batch=16, epochs=1)
    return folder


@pytest.fixture
def launch(folder: Path, start: Start) -> Iterator[Start]:
    """Starts a driver of this verb and run, on one core."""

    def start_now(verb: str, name: str, *words: str) -> Driver:
        recipe = ["launch", str(folder / "recovery.py"), "--workers", "1", "--name", name]
        return start(
            *(recipe if verb == "launch" else [verb, name]),
            *words,
            run=folder / "runs" / name,
            folder=folder,
            environment={MARK: str(folder)},
        )

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # whoever is started inherits it
    yield start_now
    os.sched_setaffinity(0, cores)


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


def test_it_finishes_and_another_of_its_name_is_refused_once_ray_is_up(launch: Start) -> None:
    ends(launch("launch", "finished"), 0, "^ +spiketrain export finished")
    ends(launch("launch", "finished"), 2, "launch: --name must be new in ")


def test_it_is_stopped_by_ctrl_c_and_resumed(launch: Start) -> None:
    driver = launch("launch", "resumed")
    at_step(driver, 7)
    driver.process.send_signal(signal.SIGINT)
    ends(driver, 130, "stopped; resume with: ")
    ends(launch("resume", "resumed"), 0, "^ +spiketrain export resumed")
    assert [event["event"] for event in read(driver.run / "journal.jsonl")].count("start") == 2


def test_it_diverges(launch: Start) -> None:
    ends(launch("launch", "diverged", "--set", "optimizer.lr=1e30"), 2, "^training: ")


def test_its_worker_is_killed(launch: Start) -> None:
    driver = launch("launch", "killed", "--max-restarts", "0")
    at_step(driver, 3)
    [worker] = driver.workers()
    worker.kill()
    ends(driver, 1, "worker 0")
