"""What a finished run says of itself in `summary.json`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any, TypeVar

from pipeline.measure.meters import Totals
from pipeline.track.events import OF_NONE, Event, FirstBatch, Rollback, Skipped, Start
from pipeline.train.evaluation import Evaluation

E_ = TypeVar("E_", bound=Event)


def summarise(result: Evaluation, totals: Totals, events: Sequence[Event]) -> dict[str, Any]:
    """Accuracy, speed, memory and time; `events` is the run's whole journal. Seconds, bytes, shares
    in 0..1.

    What is called steady is of a batch, the first of each attempt and those whose bytes or
    operations were counted left out; None where there was no other. Saved bytes and states are None
    where no batch was whole on which they are counted. `wall_s` is all time from a worker's first
    line to the run's end; `startup_s` is the part of it up to the end of each attempt's first batch
    (imports, compilation, the first batch itself), without evaluations, checkpoints and the like.
    `net_s` is without start-up and without what was done again after restarts.
    """
    starts = [event for event in events if isinstance(event, Start)]
    attempts = {event.attempt for event in events} - {OF_NONE}
    return {
        **result.metrics,
        "evaluated_samples": result.samples,
        "images_per_s": totals.steady_samples / totals.steady_s if totals.steady_s else None,
        "steady_forward_s": totals.of_a_steady_batch("forward"),
        "steady_backward_s": totals.of_a_steady_batch("backward"),
        "wall_s": sum(_attempt_seconds(events, attempt) for attempt in attempts),
        "startup_s": sum(_startup_seconds(events, attempt) for attempt in attempts),
        "net_s": sum(totals.seconds.values()),
        "timed_batches": totals.timed_batches,
        "train_s": totals.train_s,
        **{f"{name}_s": value for name, value in totals.seconds.items()},
        "peak_saved_bytes": totals.peak_saved_bytes,
        "state_bytes": totals.state_bytes,
        "peak_device_bytes": totals.peak_device_bytes,
        "peak_reserved_bytes": totals.peak_reserved_bytes,
        "peak_rss_bytes": totals.peak_rss_bytes,
        "peak_pss_bytes": totals.peak_pss_bytes,
        "evaluation_peak_rss_bytes": totals.evaluation_peak_rss_bytes,
        "evaluation_peak_device_bytes": totals.evaluation_peak_device_bytes,
        "evaluation_peak_reserved_bytes": totals.evaluation_peak_reserved_bytes,
        "device_j": totals.device_j,
        "operations": totals.operations_per_sample(),
        "not_counted": totals.not_counted,
        "backward_calls_per_batch": totals.backward_calls / max(1, totals.batches),
        "restarts": len(starts) - 1,
        "rollbacks": sum(isinstance(event, Rollback) for event in events),
        "skipped_batches": len({event.step for event in events if isinstance(event, Skipped)}),
        "commits": sorted({start.commit for start in starts}),
    }


def versions() -> dict[str, str]:
    return {
        name: version(name)
        for name in ("torch", "deepspeed", "ray", "ffcv", "mlflow", "timm", "numpy", "numba")
    }


def _attempt_seconds(events: Sequence[Event], attempt: int) -> float:
    """From the worker's first line of code to the attempt's last sign of life: what a killed
    attempt lost is paid for, too.

    A clock that was set back between two signs counts as no time at all, not as less.
    """
    mine = [event for event in events if event.attempt == attempt]
    start = _first(Start, events, attempt)
    times = [mine[0].time if start is None else start.began, *(event.time for event in mine)]
    if attempt == events[-1].attempt:
        times.append(time.time())
    return sum(max(0.0, later - earlier) for earlier, later in pairwise(times))


def _startup_seconds(events: Sequence[Event], attempt: int) -> float:
    """Of an attempt that ended before its first batch did, what came before its event "start"."""
    wall = _attempt_seconds(events, attempt)
    if first_batch := _first(FirstBatch, events, attempt):
        return min(first_batch.startup_s, wall)
    start = _first(Start, events, attempt)
    return wall if start is None else min(max(0.0, start.time - start.began), wall)


def _first(kind: type[E_], events: Sequence[Event], attempt: int) -> E_ | None:
    return next(
        (each for each in events if isinstance(each, kind) and each.attempt == attempt), None
    )
