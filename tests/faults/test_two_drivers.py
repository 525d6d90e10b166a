"""A second driver that is to go on with a run which one trains already is refused, and the first
one goes on.
"""

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.lab import Driven, Lab
from tests.helpers.small import Command, same_weights

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

SEED = 20261127  # of the step at which the first one is stopped


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Lab], Driven]]:
    monkeypatch.delenv(
        "MLFLOW_TRACKING_URI", raising=False
    )  # two make their stores at a time: each its own
    started: list[Driven] = []

    def start(lab: Lab) -> Driven:
        started.append(Driven(lab, "--inline"))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_the_second_is_refused_in_one_line_and_the_first_goes_on(
    tmp_path: Path,
    driven: Callable[[Lab], Driven],
    spiketrain: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And ends, stopped and resumed, with the bits of a run that nobody touched."""
    untouched, lab = driven(Lab(tmp_path / "untouched")), Lab(tmp_path / "held")
    lab.pace(0.2)
    first = driven(lab)
    first.wait_for(lambda event: event["event"] == "start")
    for _ in range(2):
        code, _, error = spiketrain(
            "resume", "run", "--inline", "--runs", str(first.run.parent), "--trust", "told_lab"
        )
        assert (code, error) == (2, "run: is being trained by another process on this machine\n")
    first.at_step(random.Random(SEED).randrange(3, 9))
    first.process.send_signal(signal.SIGTERM)
    assert first.end() == 130
    driven(lab).finish()
    untouched.finish()
    monkeypatch.syspath_prepend(lab.folder)
    assert same_weights(first.run, untouched.run, trust=["told_lab"])
