"""A run over time, from its journal: learning curve, evaluations, starts, gradients, time parts."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from pipeline.measure.constants import PARTS, REST
from pipeline.track.events import (
    NO_ATTEMPT,
    Checkpoint,
    Evaluation,
    Event,
    Fidelity,
    Start,
    Step,
    Unwritten,
)
from pipeline.track.journal import number as any_number

UNKNOWN_EPOCH = -1  # the epoch of an event that was reconstructed from a store's metrics


class Point(NamedTuple):
    """A point of the curve, an evaluation or a start, after `step` batches.

    A point of the curve is the mean over the batches since the previous point.
    """

    step: int
    seconds: float  # since the first attempt began, without the time between attempts
    top1: float | None = None
    loss: float | None = None
    epoch: int | None = None  # of the last batch, counted from 0


@dataclass(frozen=True, kw_only=True)
class History:
    curve: tuple[Point, ...]
    evaluations: tuple[Point, ...]
    starts: tuple[Point, ...]
    fidelity: tuple[Fidelity, ...]  # with None in place of values that are not finite
    step: int  # batches done
    again_from: int | None  # the newest step of a restart that still repeats batches up to `step`

    @property
    def restarts(self) -> tuple[Point, ...]:
        return self.starts[1:]


def read_history(events: Iterable[Event], *, redone: Literal["dropped", "kept"]) -> History:
    """Return the history of a run from its events, oldest first.

    Args:
        redone: "dropped" drops the batches that a restart repeats; "kept" keeps them until the
            restart has repeated them.
    """
    curve: list[Point] = []
    kept: list[Point] = []  # points that a restart has not repeated yet
    starts: list[Point] = []
    evaluations: dict[int, Point] = {}
    fidelity: dict[int, Fidelity] = {}
    last = 0
    for seconds, event in _with_seconds(events):
        step = getattr(event, "step", None)
        if step is None:
            continue
        # A thread writes these events late, with the step of the saved state.
        last = last if isinstance(event, (Checkpoint, Unwritten)) else step
        if isinstance(event, Start):
            starts.append(Point(step, seconds))
            points = _join_points(curve, kept)
            curve = [each for each in points if each.step <= step]
            if redone == "kept":
                kept = [each for each in points if each.step > step]
            else:
                evaluations = {at: each for at, each in evaluations.items() if at <= step}
        elif isinstance(event, Step):
            curve.append(_point(event, seconds))
        elif isinstance(event, Evaluation):
            evaluations[step] = _point(event, seconds)  # replaces an earlier one of this step
        elif isinstance(event, Fidelity):
            fidelity[step] = replace(
                event,
                temporal_share=_finite_values(event.temporal_share),
                cosines={rule: _finite_values(layers) for rule, layers in event.cosines.items()},
            )
    curve = _join_points(curve, kept)
    newest = max(last, curve[-1].step) if curve and redone == "kept" else last
    return History(
        curve=tuple(curve),
        evaluations=tuple(each for _, each in sorted(evaluations.items())),
        starts=tuple(starts),
        fidelity=tuple(each for _, each in sorted(fidelity.items())),
        step=newest,
        again_from=last if last < newest else None,
    )


def parts(events: Iterable[Event]) -> dict[str, float]:
    """Return the mean seconds per batch in each part of the clock, over batches with known parts.

    The first point of each start is excluded, because it includes imports and compilation.
    """
    seconds: Counter[str] = Counter()
    batches_known = 0
    points = (event for event in events if isinstance(event, (Start, Step)))
    for before, point in pairwise(points):
        if isinstance(before, Start) or isinstance(point, Start):
            continue
        means = {name: number(point.metrics.get(f"{name}_s")) for name in (*PARTS, REST)}
        known = {name: mean for name, mean in means.items() if mean is not None}
        batches = max(0, point.step - before.step) if known else 0
        batches_known += batches
        seconds.update({name: mean * batches for name, mean in known.items()})
    return {name: total / batches_known for name, total in seconds.items()} if batches_known else {}


def number(value: Any) -> float | None:
    """The value as a float; None if it is not a finite number."""
    parsed = any_number(value)
    return parsed if parsed is not None and math.isfinite(parsed) else None


def _with_seconds(events: Iterable[Event]) -> Iterator[tuple[float, Event]]:
    """Yield each event with the seconds of all attempts up to it, without time between attempts."""
    previous_s = start_time = last_time = 0.0
    attempt: int | None = None
    for event in events:
        if event.attempt == NO_ATTEMPT:
            yield previous_s + last_time - start_time, event
            continue
        if event.attempt != attempt:
            previous_s += last_time - start_time
            attempt, start_time = event.attempt, event.time
        if isinstance(event, Start):
            start_time = event.began  # includes the process's time before its first event
        last_time = event.time
        yield previous_s + last_time - start_time, event


def _point(event: Step | Evaluation, seconds: float) -> Point:
    top1, loss = (number(event.metrics.get(name)) for name in ("top1", "loss"))
    epoch = None if event.epoch == UNKNOWN_EPOCH else event.epoch
    return Point(event.step, seconds, top1, loss, epoch)


def _join_points(points: Sequence[Point], kept: Sequence[Point]) -> list[Point]:
    """Return the points, and those of `kept` after the last repeated step, in order of steps."""
    end = max((each.step for each in kept), default=0)
    repeated = max((each.step for each in points if each.step <= end), default=0)
    return sorted(
        [*points, *(each for each in kept if each.step > repeated)], key=lambda each: each.step
    )


def _finite_values(values: Mapping[str, float]) -> dict[str, Any]:
    return {name: number(value) for name, value in values.items()}
