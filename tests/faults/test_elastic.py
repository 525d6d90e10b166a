"""Nodes die, come and are taken away under a run: each sample once an epoch, and the weights of an untouched run."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.launch.node_loss import NODES
from pipeline.track.jsonl import Follower, read
from pipeline.weights import load_run
from tests.nodes import TOKEN, Nodes, nodes

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

SEED = 20261127  # of the steps at which something happens
BATCH, STEPS_PER_EPOCH, EPOCHS = 12, 10, 4
LAB = '''
import hashlib, os, time
from pathlib import Path
from pipeline.rules.sltt import SLTT

class Told(SLTT):
    """SLTT that writes down, beside its file, which sample each row of a batch held; slowly, where somebody is to meet it."""

    def objectives(self, model, x_TB, loss_of, *, step, rows):
        pace = Path(__file__).parent / "pace"
        time.sleep(float(pace.read_text()) if pace.exists() else 0.0)
        with (Path(__file__).parent / "rows" / f"{os.getpid()}.txt").open("a") as file:
            for row, x_T in zip(rows, x_TB.unbind(1)):
                sample = hashlib.sha256(x_T.numpy().tobytes()).hexdigest()[:16]
                print(step, row, sample, time.time_ns(), file=file)
        return super().objectives(model, x_TB, loss_of, step=step, rows=rows)
'''
RECIPE = """
from dataclasses import replace
from pipeline.data.synthetic import Synthetic
from pipeline.recipe import spec
from tests.small import small_recipe
from told_lab import Told

def recipe():
    data = spec(Synthetic, samples={samples}, val_samples=20, shape=(1, 8, 8))
    return replace(small_recipe(backend="deepspeed", batch_size={batch}, epochs={epochs}, data=data), rule=spec(Told, k=2))
"""


class Lab:
    """A recipe of its own folder, and what its rule wrote down there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "rows").mkdir(parents=True)
        (folder / "told_lab.py").write_text(LAB)
        text = RECIPE.format(samples=BATCH * STEPS_PER_EPOCH + 5, batch=BATCH, epochs=EPOCHS)
        (folder / "told.py").write_text(text)

    def pace(self, seconds: float) -> None:
        (self.folder / "pace.new").write_text(str(seconds))
        (self.folder / "pace.new").rename(self.folder / "pace")

    def samples(self) -> list[list[str]]:
        """Of each step, by row, as it was done last."""
        newest: dict[tuple[int, int], tuple[int, str]] = {}
        for file in (self.folder / "rows").iterdir():
            for line in file.read_text().splitlines():
                step, row, sample, when = line.split()
                place = (int(step), int(row))
                newest[place] = max(newest.get(place, (0, "")), (int(when), sample))
        return [[newest[step, row][1] for row in range(BATCH)] for step in range(STEPS_PER_EPOCH * EPOCHS)]


class Driven:
    """`spiketrain launch` of a lab, with more words, in a process of its own."""

    def __init__(self, lab: Lab, *more: str) -> None:
        self.lab, self.run = lab, lab.folder / "runs" / "run"
        words = ["launch", str(lab.folder / "told.py"), *more, "--device", "cpu"]
        words += ["--runs", str(self.run.parent), "--name", self.run.name, "--trust", "told_lab"]
        self.log = lab.folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=lab.folder,
                env={**os.environ, **TOKEN},
            )
        self.follower = Follower(self.run / "journal.jsonl", offset=0)

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], *, within: float = 90.0) -> dict[str, Any]:
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            for event in self.follower.poll():
                if wanted(event):
                    return event
            assert self.process.poll() is None, f"the driver ended:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.01)
        raise AssertionError(f"not seen within {within} s:\n{self.log.read_text()[-3000:]}")

    def start_of(self, workers: int) -> dict[str, Any]:
        start = self.wait_for(lambda event: event["event"] == "start")
        assert start["world_size"] == workers
        return start

    def at_step(self, step: int) -> None:
        self.wait_for(lambda event: event["event"] == "step" and event["step"] >= step)

    def end(self) -> None:
        self.lab.pace(0)
        assert self.process.wait(120) == 0, self.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Lab]]:
    folder = tmp_path_factory.mktemp("elastic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield lambda name: Lab(folder / name)


@pytest.fixture(scope="module")
def unhurt(lab: Callable[[str], Lab]) -> Driven:
    """A run of one worker that nothing happens to."""
    run = Driven(lab("unhurt"), "--inline")
    run.end()
    return run


@pytest.fixture
def driven(lab: Callable[[str], Lab], request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], Driven]]:
    started: list[Driven] = []

    def launch(address: str, sizes: str) -> Driven:
        place = lab(request.node.name)
        place.pace(0.3)
        started.append(Driven(place, "--address", address, "--workers", sizes))
        return started[-1]

    yield launch
    for each in started:
        if each.process.poll() is None:
            for process in psutil.Process(each.process.pid).children(recursive=True):
                process.kill()
            each.process.kill()
            each.process.wait()


@pytest.fixture
def cluster() -> Iterator[Nodes]:
    with nodes(NODES["fast"]) as there:
        yield there


def assert_as(unhurt: Driven, run: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample once in each epoch of what came to stay, and the weights of the run that nothing happened to."""
    monkeypatch.syspath_prepend(unhurt.lab.folder)
    samples = run.lab.samples()
    for epoch in range(EPOCHS):
        seen = [each for step in samples[epoch * STEPS_PER_EPOCH :][:STEPS_PER_EPOCH] for each in step]
        assert len(set(seen)) == STEPS_PER_EPOCH * BATCH
    assert samples == unhurt.lab.samples()
    ours, theirs = (load_run(each, trust=["told_lab"]).state_dict() for each in (run.run, unhurt.run))
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name, value in ours.items():
        assert torch.linalg.norm(value - theirs[name]) <= 1e-5 * torch.linalg.norm(theirs[name]), name


def test_a_node_dies_and_another_comes(
    cluster: Nodes, driven: Callable[[str, str], Driven], unhurt: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(SEED)
    first = cluster.add()
    run = driven(cluster.address, "1:2")
    run.start_of(2)
    run.at_step(draw.randrange(3, 9))
    cluster.kill(first)
    began = time.monotonic()
    alone = run.start_of(1)
    print(f"one worker after {time.monotonic() - began:.1f} s, from step {alone['step']}")
    cluster.add()
    began = time.monotonic()
    again = run.start_of(2)
    print(f"two workers after {time.monotonic() - began:.1f} s, from step {again['step']}")
    saved = [event["step"] for event in read(run.run / "journal.jsonl") if event["event"] == "checkpoint"]
    assert again["step"] == max(saved) > alone["step"]  # saved before it grew
    run.end()
    assert_as(unhurt, run, monkeypatch)
