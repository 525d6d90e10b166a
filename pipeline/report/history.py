"""What a run's journal tells of it over time: its curve, evaluations, starts, gradients beside
BPTT's, and parts of its time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.measure.constants import PARTS, REST
from pipeline.track.journal import OF_NONE, Event

Timed = tuple[float, Event]
"""an event, and the seconds of wall clock that its run had taken by then"""


@dataclass(frozen=True, kw_only=True)
class TrainPoint:
    """Means over the batches since the point before, at the end of batch `step`."""

    step: int
    seconds: float
    """of wall clock since the run's first attempt began, without what lies between attempts"""
    loss: float | None
    top1: float | None
    images_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """On the evaluation set, after `step` batches."""

    step: int
    seconds: float
    epoch: int | None
    """that has ended, from 0"""
    top1: float | None
    loss: float | None
    firing_rate: float | None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the run: the first, or a restart where a checkpoint stood."""

    number: int
    step: int
    """batches that were done by then"""
    seconds: float
    commit: str | None


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """The rule's gradient beside BPTT's on one batch; a layer where BPTT's is 0 has None."""

    step: int
    epoch: int | None
    """that has ended, from 0; None at the start"""
    temporal_share: Mapping[str, float | None]
    """by layer"""
    cosines: Mapping[str, Mapping[str, float | None]]
    """by rule, then by layer"""


def timed(events: Iterable[Event]) -> Iterator[Timed]:
    """Each event with its seconds: those of its attempts, one after another. What is told of
    between them costs nothing.
    """
    paid = begun = now = last = 0.0
    attempt: Any = None
    for event in events:
        if event.get("attempt") == OF_NONE:
            yield paid + last - begun, event
            continue
        time = number(event.get("time"))
        now = now if time is None else time
        if event.get("attempt") != attempt:
            paid, attempt, begun = paid + last - begun, event.get("attempt"), now
        if event["event"] == "start" and (began := number(event.get("began"))) is not None:
            begun = began  # what the process did before its first event, too
        last = now
        yield paid + now - begun, event


def curve(events: Iterable[Timed], *, redone: Literal["dropped", "kept"]) -> list[TrainPoint]:
    """`redone`: what a restart does again is dropped, or kept until it is told again."""
    points: list[TrainPoint] = []
    again: list[TrainPoint] = []
    for seconds, event in events:
        step = count(event.get("step"))
        if step is None:
            continue
        if event["event"] == "start":
            known = _joined(points, again)
            points = [point for point in known if point.step <= step]
            again = [point for point in known if point.step > step and redone == "kept"]
        elif event["event"] == "step":
            metrics = event.get("metrics") or {}
            values = {name: number(metrics.get(name)) for name in ("loss", "top1", "images_per_s")}
            points.append(TrainPoint(step=step, seconds=seconds, **values))
    return _joined(points, again)


def evaluations(events: Iterable[Timed], *, redone: Literal["dropped", "kept"]) -> list[Evaluated]:
    """Of one that is done again the newest, on the weights that came to stay; `redone` as for the
    curve.
    """
    found: dict[int, Evaluated] = {}
    for seconds, event in events:
        step = count(event.get("step"))
        if step is None:
            continue
        if event["event"] == "start" and redone == "dropped":
            found = {at: each for at, each in found.items() if at <= step}
        elif event["event"] == "evaluation":
            metrics = event.get("metrics") or {}
            values = {name: number(metrics.get(name)) for name in ("top1", "loss", "firing_rate")}
            found[step] = Evaluated(
                step=step, seconds=seconds, epoch=count(event.get("epoch")), **values
            )
    return sorted(found.values(), key=lambda each: each.step)


def attempts(events: Iterable[Timed]) -> Iterator[Attempt]:
    for seconds, event in events:
        if event["event"] == "start":
            step, commit = count(event.get("step")) or 0, event.get("commit")
            yield Attempt(
                number=count(event.get("attempt")) or 0,
                step=step,
                seconds=seconds,
                commit=None if commit is None else str(commit),
            )


def fidelity(events: Iterable[Event]) -> list[Fidelity]:
    found: dict[int, Fidelity] = {}
    for event in events:
        if event["event"] == "fidelity" and (step := count(event.get("step"))) is not None:
            shares = {
                str(layer): number(value)
                for layer, value in (event.get("temporal_share") or {}).items()
            }
            cosines = {
                str(rule): {str(layer): number(value) for layer, value in by_layer.items()}
                for rule, by_layer in (event.get("cosines") or {}).items()
            }
            found[step] = Fidelity(
                step=step, epoch=count(event.get("epoch")), temporal_share=shares, cosines=cosines
            )
    return sorted(found.values(), key=lambda each: each.step)


def parts(events: Iterable[Timed]) -> dict[str, float]:
    """Of the batches alone: a point has the mean of a batch since the one before, and one that
    metrics told may have no parts.

    A start's first point is left out: its first batch waits for imports and compilation.
    """
    seconds: dict[str, float] = {}
    done = told_of = 0
    is_first = True
    for _, event in events:
        step = count(event.get("step"))
        if event["event"] == "step" and step is not None:
            metrics = {} if is_first else event.get("metrics") or {}
            means = {
                name: mean
                for name in (*PARTS, REST)
                if (mean := number(metrics.get(f"{name}_s"))) is not None
            }
            batches = max(0, step - done) if means else 0
            told_of += batches
            for name, mean in means.items():
                seconds[name] = seconds.get(name, 0.0) + mean * batches
        if event["event"] in ("start", "step") and step is not None:
            done, is_first = step, event["event"] == "start"
    return {name: total / told_of for name, total in seconds.items()} if told_of else {}


def _joined(points: Sequence[TrainPoint], again: Sequence[TrainPoint]) -> list[TrainPoint]:
    """With those of `again` that lie behind what the points tell anew."""
    if not again:
        return list(points)
    told = max((point.step for point in points if point.step <= again[-1].step), default=0)
    return sorted(
        [*points, *(point for point in again if point.step > told)], key=lambda point: point.step
    )


def number(value: Any) -> float | None:
    """A finite number; journals write infinities and NaN as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def count(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)
