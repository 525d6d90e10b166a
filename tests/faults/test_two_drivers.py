"""A second driver that is to go on with a run which one trains already is refused, and the first one goes on."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.lab import Driven, Lab
from tests.small import Command, command

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

SEED = 20261127  # of the step at which the first one is stopped

spiketrain = pytest.fixture(command)


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driven]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    lab = Lab(tmp_path / "held")
    lab.pace(0.2)
    driven = Driven(lab, "--inline")
    yield driven
    driven.kill()


def test_the_second_is_refused_in_one_line_and_the_first_goes_on(first: Driven, spiketrain: Command) -> None:
    first.wait_for(lambda event: event["event"] == "start")
    for _ in range(2):
        code, _, error = spiketrain("resume", "run", "--inline", "--runs", str(first.run.parent), "--trust", "told_lab")
        assert (code, error) == (2, "run: is being trained by another process on this machine\n")
    first.at_step(random.Random(SEED).randrange(3, 9))
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 130
