"""What a run says of its time once it has finished."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.measure.totals import Totals
from pipeline.track.events import Event
from pipeline.train.evaluation import Evaluation
from pipeline.train.metadata import summarise
from tests.helpers.events import event


def told(attempt: int, kind: str, time: float, **fields: Any) -> Event:
    return event(kind, attempt=attempt, time=time, **fields)


def test_start_up_is_told_apart_from_the_wall_clock_that_it_is_part_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first attempt's first batch ends after 12 s, 2 of which an evaluation took, and it is
    lost after 25. The second is lost before its first batch, 4 s after it began and 3 after its
    start. The third's first batch ends after 9 s."""
    events = [
        told(0, "start", 105.0, began=100.0, commit="a"),
        told(0, "first_batch", 112.0, step=1, startup_s=10.0),
        told(0, "step", 125.0, step=3),
        told(1, "start", 201.0, began=200.0, commit="a"),
        told(1, "died", 204.0),
        told(2, "start", 307.0, began=300.0, commit="a"),
        told(2, "first_batch", 309.0, step=1, startup_s=9.0),
        told(2, "step", 387.0, step=9),
    ]
    monkeypatch.setattr("pipeline.train.metadata.time.time", lambda: 390.0)
    totals = Totals(batches=9, timed_batches=7, operation_samples=1)
    totals.seconds |= {"forward": 60.0, "evaluation": 20.0}
    result = Evaluation(samples=1, top1=1.0, top5=1.0, loss=0.0, firing_rate=0.0)
    found = summarise(result, totals, events)
    assert (found["wall_s"], found["startup_s"]) == (25 + 4 + 90, 10 + 1 + 9)
    assert (found["net_s"], found["timed_batches"]) == (80, 7)


def test_net_time_has_nothing_of_starts() -> None:
    """The first attempt sets up for 5 s and is lost after 25, the second sets up for 7; checkpoints
    remember 80 s of both.
    """
    events = [
        told(0, "start", 105.0, began=100.0, commit="a"),
        told(0, "step", 125.0, step=3),
        told(1, "start", 207.0, began=200.0, commit="a"),
        told(1, "step", 287.0, step=9),
    ]
    totals = Totals(batches=9, operation_samples=1)
    totals.seconds |= {"forward": 60.0, "evaluation": 20.0}
    result = Evaluation(samples=1, top1=1.0, top5=1.0, loss=0.0, firing_rate=0.0)
    assert summarise(result, totals, events)["net_s"] == 80
