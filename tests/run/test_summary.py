"""What a run says of its time once it has finished."""

from __future__ import annotations

from typing import Any

from pipeline.evaluate import Evaluation
from pipeline.measure.totals import Totals
from pipeline.run.summary import summarise


def test_net_time_has_the_first_beginning_in_it_and_nothing_of_restarts() -> None:
    """The first attempt sets up for 5 s and is lost after 25, the second sets up for 7; checkpoints remember 80 s of both."""

    def told(attempt: int, kind: str, time: float, **fields: Any) -> dict[str, Any]:
        return {"event": kind, "attempt": attempt, "time": time, **fields}

    events = [
        told(0, "start", 105.0, began=100.0, commit="a"),
        told(0, "step", 125.0, step=3),
        told(1, "start", 207.0, began=200.0, commit="a"),
        told(1, "step", 287.0, step=9),
    ]
    totals = Totals(batches=9, operation_samples=1)
    totals.seconds |= {"forward": 60.0, "evaluation": 20.0}
    result = Evaluation(samples=1, top1=1.0, top5=1.0, loss=0.0, firing_rate=0.0)
    assert summarise(result, totals, events)["net_s"] == 5 + 80
