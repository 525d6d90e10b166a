"""A run over time, from its journal: curve, evaluations, starts, gradients, parts of its time."""

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

UNKNOWN_EPOCH = -1  # of an event that was reconstructed from a store's metrics


class Point(NamedTuple):
    """A point of the curve, an evaluation or a start, after `step` batches.

    A point of the curve is the mean over the batches since the previous point.
    """

    step: int
    seconds: float  # since the first attempt began, without the time between attempts
    top1: float | None = None
    loss: float | None = None
    epoch: int | None = None  # the epoch that has ended, counted from 0


@dataclass(frozen=True, kw_only=True)
class History:
    """A run over time."""

    curve: tuple[Point, ...]
    evaluations: tuple[Point, ...]
    starts: tuple[Point, ...]
    fidelity: tuple[Fidelity, ...]  # values that are not finite are None
    step: int  # batches done
    again_from: int | None  # position of a restart that is repeating the batches up to `step`

    @property
    def restarts(self) -> tuple[Point, ...]:
        """All starts but the first."""
        return self.starts[1:]


def read_history(events: Iterable[Event], *, redone: Literal["dropped", "kept"]) -> History:
    """Return the history of a run from its events, oldest first.

    Args:
        redone: "dropped" drops the batches that a restart repeats; "kept" keeps them until they
            have been repeated.
    """
    curve: list[Point] = []
    again: list[Point] = []
    starts: list[Point] = []
    evaluations: dict[int, Point] = {}
    fidelity: dict[int, Fidelity] = {}
    last = 0
    for seconds, event in _with_seconds(events):
        step = getattr(event, "step", None)
        if step is None:
            continue
        # Threads write checkpoints late, with the step of the saved state.
        last = last if isinstance(event, (Checkpoint, Unwritten)) else step
        if isinstance(event, Start):
            starts.append(Point(step, seconds))
            known = _join_points(curve, again)
            curve = [each for each in known if each.step <= step]
            again = [each for each in known if each.step > step and redone == "kept"]
            if redone == "dropped":
                evaluations = {at: each for at, each in evaluations.items() if at <= step}
        elif isinstance(event, Step):
            curve.append(_point(event, seconds))
        elif isinstance(event, Evaluation):
            evaluations[step] = _point(event, seconds)  # a repeated evaluation replaces the former
        elif isinstance(event, Fidelity):
            cosines = {rule: _finite_values(of_rule) for rule, of_rule in event.cosines.items()}
            shares = _finite_values(event.temporal_share)
            fidelity[step] = replace(event, temporal_share=shares, cosines=cosines)
    curve = _join_points(curve, again)
    known = max(last, curve[-1].step) if curve and redone == "kept" else last
    return History(
        curve=tuple(curve),
        evaluations=tuple(each for _, each in sorted(evaluations.items())),
        starts=tuple(starts),
        fidelity=tuple(each for _, each in sorted(fidelity.items())),
        step=known,
        again_from=last if last < known else None,
    )


def parts(events: Iterable[Event]) -> dict[str, float]:
    """Return seconds per batch in each part of the clock, over the batches with known parts.

    The first point of a start is excluded: its first batch waits for imports and compilation.
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
    known = any_number(value)
    return known if known is not None and math.isfinite(known) else None


def _with_seconds(events: Iterable[Event]) -> Iterator[tuple[float, Event]]:
    """Yield each event with the seconds of the attempts up to it, without time between attempts."""
    paid = begun = last = 0.0
    attempt: int | None = None
    for event in events:
        if event.attempt == NO_ATTEMPT:
            yield paid + last - begun, event
            continue
        if event.attempt != attempt:
            paid, attempt, begun = paid + last - begun, event.attempt, event.time
        if isinstance(event, Start):
            begun = event.began  # includes the process's time before its first event
        last = event.time
        yield paid + last - begun, event


def _point(event: Step | Evaluation, seconds: float) -> Point:
    top1, loss = (number(event.metrics.get(name)) for name in ("top1", "loss"))
    epoch = None if event.epoch == UNKNOWN_EPOCH else event.epoch
    return Point(event.step, seconds, top1, loss, epoch)


def _join_points(points: Sequence[Point], again: Sequence[Point]) -> list[Point]:
    """Return the points, followed by those of `again` after the last repeated step."""
    end = max((each.step for each in again), default=0)
    repeated = max((each.step for each in points if each.step <= end), default=0)
    later = (each for each in again if each.step > repeated)
    return sorted([*points, *later], key=lambda each: each.step)


def _finite_values(values: Mapping[str, float]) -> dict[str, Any]:
    return {name: number(value) for name, value in values.items()}
