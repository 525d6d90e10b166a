"""Signals at steps of their own, and a terminal that is lost: what was saved goes on to the bits of
an untouched run.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.launch.signals import ECHO_S
from pipeline.train.checkpoint import step_folders
from tests.helpers.lab import Driven, Lab
from tests.helpers.small import events, same_weights, steps_of

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("own_store"),
]

SEED = 20261128


@pytest.fixture
def driven() -> Iterator[Callable[..., Driven]]:
    started: list[Driven] = []

    def launch(lab: Lab, *more: str, terminal: int | None = None) -> Driven:
        started.append(Driven(lab, *(more or ("--inline",)), terminal=terminal))
        return started[-1]

    yield launch
    for each in started:
        each.kill()


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(
    tmp_path: Path, driven: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = driven(Lab(tmp_path / "whole"))
    whole.finish()
    draw = random.Random(SEED)
    lab, step = Lab(tmp_path / "hit"), 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        lab.pace(0.1)
        run = driven(lab)
        step += draw.randrange(3, 6)
        run.at_step(step)
        asked = time.monotonic()
        run.process.send_signal(number)
        assert run.process.wait(60) == 130, run.log.read_text()
        assert time.monotonic() - asked < 45  # what a step and MLflow take, on a busy machine
        stopped = events(run.run)[-1]
        assert (stopped["event"], stopped["reason"]) == (
            "stopped",
            f"asked to stop by {number.name}",
        )
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
    assert events(run.run)[-1]["event"] != "stopped"
    newest = int(step_folders(run.run / "checkpoints")[-1].name.removeprefix("step_"))
    assert newest <= at

    lab.pace(0)
    driven(lab).finish()
    starts = steps_of(run.run, "start")
    assert len(starts) == 6 and starts[-1] == newest
    monkeypatch.syspath_prepend(lab.folder)
    assert same_weights(run.run, whole.run, trust=["told_lab"])


def shown_until(master: int, lost: threading.Event) -> None:
    """Reads what a driver shows, which would stand still before a terminal that takes nothing,
    until it is `lost`.
    """
    while not lost.is_set():
        os.read(master, 65536)
    os.close(master)


@pytest.mark.parametrize("where", [("--inline",), ("--workers", "2")], ids=["inline", "under Ray"])
def test_a_lost_terminal_saves_and_stops(
    tmp_path: Path, driven: Callable[..., Driven], where: tuple[str, ...]
) -> None:
    """As of an ssh that ended: all processes of the session get the signal, and what they write
    fails.
    """
    lab = Lab(tmp_path / "lost")
    lab.pace(0.1)
    master, slave = os.openpty()
    run = driven(lab, *where, terminal=slave)
    os.close(slave)
    lost = threading.Event()
    reader = threading.Thread(target=shown_until, args=(master, lost), daemon=True)
    reader.start()
    run.at_step(5)
    lost.set()
    reader.join(20)
    assert not reader.is_alive()
    os.killpg(run.process.pid, signal.SIGHUP)
    assert run.process.wait(60) == 130
    stopped = events(run.run)[-1]
    assert (stopped["event"], stopped["reason"]) == ("stopped", "asked to stop by SIGHUP")
    assert step_folders(run.run / "checkpoints")[-1].name == f"step_{stopped['step']:08d}"
