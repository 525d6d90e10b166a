"""What a finished run says of itself in `summary.json`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from pipeline.measure.totals import Totals
from pipeline.track.journal import OF_NONE
from pipeline.train.evaluation import Evaluation


def summarise(
    result: Evaluation, totals: Totals, events: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Accuracy, speed, memory and time; `events` is the run's whole journal. Seconds, bytes, shares
    in 0..1.

    What is called steady is of a batch, the first of each attempt and those whose bytes or
    operations were counted left out; None where there was no other. Saved bytes and states are None
    where no batch was whole on which they are counted. `wall_s` is all time from a worker's first
    line to the run's end; `startup_s` is the part of it up to the end of each attempt's first batch
    (imports, compilation, the first batch itself), without evaluations, checkpoints and the like.
    `net_s` is without start-up and without what was done again after restarts.
    """
    starts = [event for event in events if event["event"] == "start"]
    attempts = {event["attempt"] for event in events} - {OF_NONE}
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
        "rollbacks": sum(event["event"] == "rollback" for event in events),
        "skipped_batches": len({event["step"] for event in events if event["event"] == "skipped"}),
        "commits": sorted({event["commit"] for event in starts}),
    }


def versions() -> dict[str, str]:
    return {
        name: version(name)
        for name in ("torch", "deepspeed", "ray", "ffcv", "mlflow", "timm", "numpy", "numba")
    }


def _attempt_seconds(events: Sequence[dict[str, Any]], attempt: int) -> float:
    """From the worker's first line of code to the attempt's last sign of life: what a killed
    attempt lost is paid for, too.

    A clock that was set back between two signs counts as no time at all, not as less.
    """
    mine = [event for event in events if event["attempt"] == attempt]
    begun = next((event["began"] for event in mine if event["event"] == "start"), mine[0]["time"])
    times = [begun, *(event["time"] for event in mine)] + (
        [time.time()] if attempt == events[-1]["attempt"] else []
    )
    return sum(max(0.0, later - earlier) for earlier, later in pairwise(times))


def _startup_seconds(events: Sequence[dict[str, Any]], attempt: int) -> float:
    """Of an attempt that ended before its first batch did, what came before its event "start"."""
    mine = {
        event["event"]: event for event in reversed(events) if event["attempt"] == attempt
    }  # of each kind the first
    wall = _attempt_seconds(events, attempt)
    if "first_batch" in mine:
        return min(mine["first_batch"]["startup_s"], wall)
    return (
        min(max(0.0, mine["start"]["time"] - mine["start"]["began"]), wall)
        if "start" in mine
        else wall
    )
