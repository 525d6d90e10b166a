"""Drivers in processes of their own: asked to stop, their terminal lost, a second one beside the
first, and an MLflow server that hangs and dies. What was saved goes on to the bits of an untouched
run.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.launch.driver import ECHO_S
from pipeline.report.stores import open_store
from pipeline.track.mlflow import sync
from pipeline.train.checkpoint import step_folders, step_name
from tests.helpers.lab import EPOCHS, STEPS_PER_EPOCH, Driven, Lab
from tests.helpers.nodes import free_port
from tests.helpers.small import Command, events, same_weights, steps_of
from tests.track.test_mlflow import start_server

SEED = 20261128  # of the steps at which something happens
Start = Callable[..., Driven]


@pytest.fixture
def whole(tmp_path: Path, driven: Start, monkeypatch: pytest.MonkeyPatch) -> Driven:
    lab = Lab(tmp_path / "whole")
    monkeypatch.syspath_prepend(lab.folder)
    return driven(lab)


def assert_stopped(run: Driven, number: signal.Signals) -> int:
    assert run.process.wait(60) == 130, run.log.read_text()
    stopped = events(run.run)[-1]
    assert (stopped["event"], stopped["reason"]) == ("stopped", f"asked to stop by {number.name}")
    assert step_folders(run.run / "checkpoints")[-1].name == step_name(stopped["step"])
    return stopped["step"]


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("own_store")
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(
    tmp_path: Path, driven: Start, whole: Driven
) -> None:
    whole.finish()
    draw = random.Random(SEED)
    lab, step = Lab(tmp_path / "hit"), 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        lab.pace(0.1)
        run = driven(lab)
        run.at_step(step + draw.randrange(3, 6))
        asked = time.monotonic()
        run.process.send_signal(number)
        step = assert_stopped(run, number)
        assert time.monotonic() - asked < 45  # what a step and MLflow take, on a busy machine

    run = driven(lab)
    run.at_step(step + 2)
    lab.pace(60)  # a step that nobody wants to wait for
    at = run.wait_for(lambda event: event["event"] == "step")["step"]
    run.process.send_signal(signal.SIGINT)
    time.sleep(ECHO_S + 0.3)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(20) == 130
    assert events(run.run)[-1]["event"] != "stopped"
    newest = step_folders(run.run / "checkpoints")[-1].name
    assert newest <= step_name(at)

    driven(lab).finish()
    starts = steps_of(run.run, "start")
    assert len(starts) == 6 and step_name(starts[-1]) == newest
    assert same_weights(run.run, whole.run, trust=["told_lab"])


def shown_until(master: int, lost: threading.Event) -> None:
    while not lost.is_set():
        os.read(master, 65536)
    os.close(master)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("own_store")
@pytest.mark.parametrize("where", [("--inline",), ("--workers", "2")], ids=["inline", "under Ray"])
def test_a_lost_terminal_saves_and_stops(
    tmp_path: Path, driven: Start, where: tuple[str, ...]
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
    assert_stopped(run, signal.SIGHUP)


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_the_second_is_refused_in_one_line_and_the_first_goes_on(
    tmp_path: Path, driven: Start, spiketrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two make their stores at a time: each its own.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    untouched, lab = driven(Lab(tmp_path / "untouched")), Lab(tmp_path / "held")
    lab.pace(0.2)
    first = driven(lab)
    first.wait_for(lambda event: event["event"] == "start")
    words = ("resume", "run", "--inline", "--runs", str(first.run.parent), "--trust", "told_lab")
    for _ in range(2):
        code, _, error = spiketrain(*words)
        assert (code, error) == (2, "run: is being trained by another process on this machine\n")
    first.at_step(random.Random(SEED).randrange(3, 9))
    first.process.send_signal(signal.SIGTERM)
    assert_stopped(first, signal.SIGTERM)
    driven(lab).finish()
    untouched.finish()
    monkeypatch.syspath_prepend(lab.folder)
    assert same_weights(first.run, untouched.run, trust=["told_lab"])


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("own_store")
def test_a_server_that_hangs_and_dies_costs_no_bit_and_misses_nothing(
    tmp_path: Path, driven: Start, whole: Driven, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole.finish()
    (store := tmp_path / "server").mkdir()
    port, timeout_s = free_port(), 6
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout_s))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    lab = Lab(tmp_path / "disturbed")
    lab.pace(0.4)
    server, draw = start_server(store, port), random.Random(SEED)
    try:
        hit = driven(lab)
        hit.at_step(hangs_at := draw.randrange(2, 6))
        hangs = time.time()
        os.killpg(server.pid, signal.SIGSTOP)
        hit.at_step(hangs_at + 26)
        os.killpg(server.pid, signal.SIGCONT)
        goes_on = time.time()
        # A request is begun at least every 2 s: one of them was given up.
        assert goes_on - hangs > timeout_s + 2
        hit.at_step(hangs_at + 26 + draw.randrange(2, 6))
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        hit.finish()
        server = start_server(store, port)
        trained = [event["time"] for event in events(hit.run, "step")]
        while_it_hung = [when for when in trained if hangs < when < goes_on]
        assert len(while_it_hung) > 20
        assert max(after - before for before, after in pairwise(while_it_hung)) < timeout_s / 2
        assert sync(hit.run, uri=uri).delivered > 0
        [seen] = open_store(uri).runs()
        steps = [point.step for point in open_store(uri).history(seen.id, "train/loss", since=0)]
        assert (seen.status, steps) == ("FINISHED", [*range(1, STEPS_PER_EPOCH * EPOCHS + 1)])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert lab.samples() == whole.lab.samples()
    assert same_weights(hit.run, whole.run, trust=("told_lab",))
