"""A run over time, from its journal: curve, evaluations, starts, gradients, parts of its time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pipeline.measure.constants import PARTS, REST
from pipeline.track import events as kinds
from pipeline.track.events import OF_NONE, kind_of
from pipeline.track.journal import Record

_FROM_THREADS = (kinds.Checkpoint, kinds.Unwritten)  # written late, with the step that they are of


class Point(NamedTuple):
    """A point of the curve, an evaluation, or a start, after `step` batches.

    A point of the curve is the mean over the batches since the point before.
    """

    step: int
    seconds: float  # since the first attempt began, without the time between attempts
    top1: float | None = None
    loss: float | None = None
    epoch: int | None = None  # that has ended, from 0


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """The rule's gradient beside BPTT's on one batch; None for a layer where BPTT's is 0."""

    step: int
    epoch: int | None  # that has ended, from 0; None at the start
    temporal_share: Mapping[str, float | None]  # by layer
    cosines: Mapping[str, Mapping[str, float | None]]  # by rule, then by layer


@dataclass(frozen=True, kw_only=True)
class History:
    """A run over time."""

    curve: tuple[Point, ...]
    evaluations: tuple[Point, ...]
    starts: tuple[Point, ...]
    fidelity: tuple[Fidelity, ...]
    step: int  # batches done
    again_from: int | None  # where a restart stands that repeats the batches up to `step`

    @property
    def restarts(self) -> tuple[Point, ...]:
        """All starts but the first."""
        return self.starts[1:]


def read_history(events: Sequence[Record], *, redone: Literal["dropped", "kept"]) -> History:
    """From a journal's events, oldest first.

    Args:
        redone: batches that a restart repeats are dropped, or kept until it has repeated them.
    """
    curve: list[Point] = []
    again: list[Point] = []
    starts: list[Point] = []
    evaluations: dict[int, Point] = {}
    fidelity: dict[int, Fidelity] = {}
    last = 0
    for seconds, event in _timed(events):
        kind, step = kind_of(event), count(event.get("step", event.get("steps")))
        if step is None:
            continue
        last = last if kind in _FROM_THREADS else step
        metrics = event.get("metrics") or {}
        top1, loss = number(metrics.get("top1")), number(metrics.get("loss"))
        point = Point(step, seconds, top1, loss, count(event.get("epoch")))
        if kind is kinds.Start:
            starts.append(point)
            known = _joined(curve, again)
            curve = [each for each in known if each.step <= step]
            again = [each for each in known if each.step > step and redone == "kept"]
            if redone == "dropped":
                evaluations = {at: each for at, each in evaluations.items() if at <= step}
        elif kind is kinds.Step:
            curve.append(point)
        elif kind is kinds.Evaluation:
            evaluations[step] = point  # of one that is repeated the newest
        elif kind is kinds.Fidelity:
            fidelity[step] = _fidelity(event, step)
    curve = _joined(curve, again)
    known = max(last, curve[-1].step) if curve and redone == "kept" else last
    return History(
        curve=tuple(curve),
        evaluations=tuple(each for _, each in sorted(evaluations.items())),
        starts=tuple(starts),
        fidelity=tuple(each for _, each in sorted(fidelity.items())),
        step=known,
        again_from=last if last < known else None,
    )


def parts(events: Iterable[Record]) -> dict[str, float]:
    """Seconds of a batch in each part of the clock, of the batches whose parts are known.

    The first point of a start is left out: its first batch waits for imports and compilation.
    """
    seconds: dict[str, float] = {}
    done = batches_known = 0
    is_first = True
    for event in events:
        kind, step = kind_of(event), count(event.get("step"))
        if kind not in (kinds.Start, kinds.Step) or step is None:
            continue
        metrics = {} if is_first or kind is kinds.Start else event.get("metrics") or {}
        found = {name: number(metrics.get(f"{name}_s")) for name in (*PARTS, REST)}
        means = {name: mean for name, mean in found.items() if mean is not None}
        batches = max(0, step - done) if means else 0
        batches_known += batches
        for name, mean in means.items():
            seconds[name] = seconds.get(name, 0.0) + mean * batches
        done, is_first = step, kind is kinds.Start
    return {name: total / batches_known for name, total in seconds.items()} if batches_known else {}


def number(value: Any) -> float | None:
    """A finite number; journals write infinities and NaN as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def count(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _timed(events: Iterable[Record]) -> Iterator[tuple[float, Record]]:
    """Each event with the seconds of the attempts up to it; time between attempts is left out."""
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
        if kind_of(event) is kinds.Start and (began := number(event.get("began"))) is not None:
            begun = began  # with what the process did before its first event
        last = now
        yield paid + now - begun, event


def _joined(points: Sequence[Point], again: Sequence[Point]) -> list[Point]:
    """With those points of `again` that lie behind what `points` has repeated."""
    if not again:
        return list(points)
    repeated = max((each.step for each in points if each.step <= again[-1].step), default=0)
    return sorted(
        [*points, *(each for each in again if each.step > repeated)], key=lambda each: each.step
    )


def _fidelity(event: Record, step: int) -> Fidelity:
    shares = event.get("temporal_share") or {}
    cosines = event.get("cosines") or {}
    return Fidelity(
        step=step,
        epoch=count(event.get("epoch")),
        temporal_share=_numbers(shares),
        cosines={str(rule): _numbers(by_layer) for rule, by_layer in cosines.items()},
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, float | None]:
    return {str(name): number(value) for name, value in values.items()}
