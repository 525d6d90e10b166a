"""Nodes die, come and are taken away under a run: each sample once an epoch, and the weights of an
untouched run.
"""

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.launch.ray_cluster import NODES
from pipeline.train.weights import load_run
from tests.helpers.lab import BATCH, EPOCHS, STEPS_PER_EPOCH, Driven, Lab
from tests.helpers.nodes import Nodes, nodes
from tests.helpers.small import events, steps_of

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

SEED = 20261127  # of the steps at which something happens
Launch = Callable[[str, str], Driven]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("elastic")
    store = shutil.copy(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
        yield folder


@pytest.fixture(scope="module")
def unhurt(place: Path) -> Driven:
    """A run of one worker that nothing happens to."""
    run = Driven(Lab(place / "unhurt"), "--inline")
    run.finish()
    return run


@pytest.fixture
def driven(place: Path, request: pytest.FixtureRequest) -> Iterator[Launch]:
    """Launches a run on a cluster at a pace that it can be met at."""
    started: list[Driven] = []

    def launch(address: str, sizes: str) -> Driven:
        lab = Lab(place / request.node.name)
        lab.pace(0.3)
        started.append(Driven(lab, "--address", address, "--workers", sizes))
        return started[-1]

    yield launch
    for each in started:
        each.kill()


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    with nodes(NODES["fast"]) as there:
        yield there


def assert_as(unhurt: Driven, run: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample once in each epoch of what came to stay, and the weights of the run that nothing
    happened to.
    """
    monkeypatch.syspath_prepend(unhurt.lab.folder)
    samples = run.lab.samples()
    for epoch in range(EPOCHS):
        seen = [
            each for step in samples[epoch * STEPS_PER_EPOCH :][:STEPS_PER_EPOCH] for each in step
        ]
        assert len(set(seen)) == STEPS_PER_EPOCH * BATCH
    assert samples == unhurt.lab.samples()
    ours, theirs = (
        load_run(each, trust=["told_lab"]).state_dict() for each in (run.run, unhurt.run)
    )
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name, value in ours.items():
        assert torch.linalg.norm(value - theirs[name]) <= 1e-5 * torch.linalg.norm(theirs[name]), (
            name
        )


def assert_from_a_checkpoint(start: dict[str, Any], run: Driven) -> None:
    """From the newest that was told of, or from one that was whole just before its writer died."""
    checkpoint, step = (
        max(each["step"] for each in events(run.run, kind) if each["time"] < start["time"])
        for kind in ("checkpoint", "step")
    )
    assert checkpoint <= start["step"] <= step


def test_a_node_dies(
    cluster: Nodes, driven: Launch, unhurt: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 -> 1"""
    first = cluster.add()
    run = driven(cluster.address, "1:2")
    run.start_of(2)
    run.at_step(random.Random(SEED).randrange(4, 9))
    cluster.kill(first)
    assert_from_a_checkpoint(run.start_of(1), run)
    run.finish()
    assert_as(unhurt, run, monkeypatch)


def test_a_node_dies_and_another_comes(
    cluster: Nodes, driven: Launch, unhurt: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 -> 1 -> 2"""
    first = cluster.add()
    run = driven(cluster.address, "1:2")
    run.start_of(2)
    run.at_step(random.Random(SEED + 1).randrange(4, 9))
    cluster.kill(first)
    alone = run.start_of(1)
    run.lab.pace(2)  # until the other one is there
    cluster.add()
    again = run.start_of(2)
    assert (
        again["step"] == max(steps_of(run.run, "checkpoint")) > alone["step"]
    )  # it saved before it grew
    run.finish()
    assert_as(unhurt, run, monkeypatch)


def test_one_of_three_nodes_dies(
    cluster: Nodes, driven: Launch, unhurt: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 -> 2, of sizes that a user may write: 12 samples do not divide by 5."""
    added = [cluster.add(), cluster.add()]
    draw = random.Random(SEED + 2)
    run = driven(cluster.address, "2,3,4,6")
    run.start_of(3)
    run.at_step(draw.randrange(4, 9))
    cluster.kill(draw.choice(added))
    assert_from_a_checkpoint(run.start_of(2), run)
    run.finish()
    assert_as(unhurt, run, monkeypatch)


def test_a_node_is_taken_away_after_a_notice(
    cluster: Nodes, driven: Launch, unhurt: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 -> 1, saved as soon as the notice is there."""
    first = cluster.add()
    run = driven(cluster.address, "1:2")
    run.start_of(2)
    run.at_step(random.Random(SEED + 3).randrange(4, 9))
    run.lab.pace(1)
    began = time.time()
    cluster.drain(first, seconds=25)
    notice = run.wait_for(lambda event: event["event"] == "preempted")
    assert len(notice["machines"]) == 1 and 0 < notice["seconds_left"] < 25
    saved: dict[str, Any] = run.wait_for(lambda event: event["event"] == "checkpoint")
    assert saved["step"] == notice["step"] and saved["time"] - began < 25
    assert run.start_of(1)["step"] >= notice["step"]
    run.finish()
    assert_as(unhurt, run, monkeypatch)


@pytest.mark.parametrize("sizes", ["2", "2,3"])
def test_whoever_stops_a_run_that_waits_for_a_node_is_told_so(
    cluster: Nodes, driven: Launch, monkeypatch: pytest.MonkeyPatch, sizes: str
) -> None:
    """2 -> nobody, as two it has to be."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    added = cluster.add()
    run = driven(cluster.address, sizes)
    run.start_of(2)
    run.at_step(random.Random(SEED + 4).randrange(4, 9))
    cluster.kill(added)
    waiting = run.wait_for(lambda event: event["event"] == "waiting")  # the other one is ended too
    assert (waiting["what"], waiting["most_s"]) == ("a place for 2 workers", 3600.0)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    stopped = events(run.run)[-1]
    assert stopped["event"] == "stopped" and stopped["step"] == max(
        steps_of(run.run, "checkpoint"), default=0
    )
    assert stopped["reason"] == "asked to stop by SIGINT while its workers had no place"
    assert f"--address {cluster.address}" in stopped["resume_command"]
