"""The MLflow server hangs, goes on, and dies while a run trains: the run waits for nothing, and the
new server misses nothing.
"""

import os
import random
import signal
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline.report.stores import open_store
from pipeline.track.mlflow import sync
from tests.helpers.lab import EPOCHS, STEPS_PER_EPOCH, Driven, Lab
from tests.helpers.nodes import free_port
from tests.helpers.small import events, same_weights
from tests.track.test_mlflow import start_server

pytestmark = [pytest.mark.full, pytest.mark.timeout(400)]

SEED = 20261127  # of the steps at which something happens
TIMEOUT_S = 6
PACE_S = 0.4  # of a step


def test_a_server_that_hangs_and_dies_costs_no_bit_and_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store := tmp_path / "server").mkdir()
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT_S))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    untouched = Lab(tmp_path / "untouched")
    Driven(untouched, "--inline").finish()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    lab = Lab(tmp_path / "disturbed")
    lab.pace(PACE_S)
    server = start_server(store, port)
    draw = random.Random(SEED)
    hangs_at = draw.randrange(2, 6)
    driven = Driven(lab, "--inline")
    try:
        driven.at_step(hangs_at)
        hangs = time.time()
        os.killpg(server.pid, signal.SIGSTOP)
        driven.at_step(hangs_at + 26)
        os.killpg(server.pid, signal.SIGCONT)
        goes_on = time.time()
        assert (
            goes_on - hangs > TIMEOUT_S + 2
        )  # a request is begun at least every 2 s: one of them was given up
        driven.at_step(hangs_at + 26 + draw.randrange(2, 6))
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        driven.finish()
        server = start_server(store, port)
        run = driven.run
        trained = [event["time"] for event in events(run, "step")]
        while_it_hung = [when for when in trained if hangs < when < goes_on]
        assert len(while_it_hung) > 20
        assert max(after - before for before, after in pairwise(while_it_hung)) < TIMEOUT_S / 2
        assert sync(run, uri=uri).delivered > 0
        [seen] = open_store(uri).listed()
        assert seen.status == "FINISHED"
        steps = [point.step for point in open_store(uri).history(seen.id, "train/loss", since=0)]
        assert steps == list(range(1, STEPS_PER_EPOCH * EPOCHS + 1))
    finally:
        driven.kill()
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert lab.samples() == untouched.samples()
    monkeypatch.syspath_prepend(lab.folder)
    assert same_weights(run, untouched.folder / "runs" / "run", trust=("told_lab",))
