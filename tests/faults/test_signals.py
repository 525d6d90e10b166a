"""SIGTERM, Ctrl-C and a second Ctrl-C at steps of their own: what was saved goes on to the bits of an untouched run."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint import step_folders
from pipeline.launch.drive import ECHO_S
from pipeline.track.jsonl import read
from tests.faults.lab import Driven, Lab
from tests.small import same_weights

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

SEED = 20261128


@pytest.fixture
def driven() -> Iterator[Callable[[Lab], Driven]]:
    started: list[Driven] = []

    def launch(lab: Lab) -> Driven:
        started.append(Driven(lab, "--inline"))
        return started[-1]

    yield launch
    for each in started:
        each.kill()


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(
    tmp_path: Path, driven: Callable[[Lab], Driven], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    whole = driven(Lab(tmp_path / "whole"))
    whole.finish()
    draw = random.Random(SEED)
    lab, step = Lab(tmp_path / "hit"), 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        lab.pace(0.1)
        run = driven(lab)
        step += draw.randrange(3, 8)
        run.at_step(step)
        asked = time.monotonic()
        run.process.send_signal(number)
        assert run.process.wait(60) == 130, run.log.read_text()
        assert time.monotonic() - asked < 45  # what a step and MLflow take, on a busy machine
        stopped = read(run.run / "journal.jsonl")[-1]
        assert (stopped["event"], stopped["reason"]) == ("stopped", f"asked to stop by {number.name}")
        step = stopped["step"]
        assert step_folders(run.run / "checkpoints")[-1].name == f"step_{step:08d}"

    lab.pace(0.1)
    run = driven(lab)
    run.at_step(step + 2)
    lab.pace(60)  # a step that nobody wants to wait for
    at = run.wait_for(lambda event: event["event"] == "step")["step"]
    run.process.send_signal(signal.SIGINT)
    time.sleep(ECHO_S + 0.3)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(20) == 130
    assert read(run.run / "journal.jsonl")[-1]["event"] != "stopped"
    newest = int(step_folders(run.run / "checkpoints")[-1].name.removeprefix("step_"))
    assert newest <= at

    lab.pace(0)
    driven(lab).finish()
    starts = [event["step"] for event in read(run.run / "journal.jsonl") if event["event"] == "start"]
    assert len(starts) == 5 and starts[-1] == newest
    monkeypatch.syspath_prepend(lab.folder)
    assert same_weights(run.run, whole.run, trust=["told_lab"])
