"""One run as a report reads it: from its journal, and where it has them its summary, firing rates and recipe.

A run's folder and the artifacts of MLflow hold the same files, so that both make the same value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.measure.time_parts import BETWEEN, PARTS, REST
from pipeline.report.runs import ReportError, load, load_list
from pipeline.track.jsonl import Event, read
from pipeline.track.state import State, state_of
from pipeline.trained_on import told_in, trained_on

__all__ = ["Attempt", "Evaluated", "Fidelity", "LayerRates", "StudyRun", "TrainPoint", "TrainedOn", "from_folder", "study_run"]


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
class TrainedOn:
    """What one or several of a run's starts trained on."""

    workers: int | None
    micro_batch: int | None
    """samples that a worker held at a time"""
    hardware: Mapping[str, Any]
    loader_threads: int | None
    own_cores: bool
    """whether each worker on a CPU kept to cores that no other run computed on"""


@dataclass(frozen=True, kw_only=True)
class LayerRates:
    """Of one layer of neurons in the last evaluation. Shares in 0..1."""

    name: str
    neurons: int
    rates: tuple[float, ...]
    """spikes per neuron at each time step"""
    silent: float
    saturated: float


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


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """What is known of a run; a field that was not measured is None, or empty."""

    name: str
    state: State
    rule: str
    """its label in tables"""
    seed: int
    study: str
    """study key: runs that have the same one may be compared, on equal machines"""
    recipe: Mapping[str, Any]
    """the fields of recipe.json; where only the journal is there, its flat parameters"""
    summary: Mapping[str, Any] | None
    """None until the run has finished"""
    trained_on: tuple[TrainedOn, ...]
    """each once, oldest first; more than one: something of it changed on the way"""
    commits: tuple[str, ...]
    """of its attempts, each once"""
    step: int
    """batches done"""
    total_steps: int | None
    steps_per_epoch: int | None
    curve: tuple[TrainPoint, ...]
    evaluations: tuple[Evaluated, ...]
    attempts: tuple[Attempt, ...]
    activity: tuple[LayerRates, ...]
    fidelity: tuple[Fidelity, ...]
    parts: Mapping[str, float] = field(default_factory=dict)
    """seconds of a batch in each part of the clock: of a finished run all that it was charged with, evaluations and checkpoints
    too; of another its batches alone, in the mean over those whose parts were told"""

    @property
    def is_finished(self) -> bool:
        return self.state == "finished" and self.summary is not None

    @property
    def workers(self) -> int | None:
        """The last of what it was trained on."""
        return self.trained_on[-1].workers if self.trained_on else None

    @property
    def hardware(self) -> Mapping[str, Any]:
        """The last of what it was trained on."""
        return self.trained_on[-1].hardware if self.trained_on else {}

    @property
    def restarts(self) -> tuple[Attempt, ...]:
        """All attempts but the first."""
        return self.attempts[1:]

    def value(self, name: str) -> float | None:
        """A number of the summary, such as "top1", or "inference.energy_j" within an object of it."""
        found: Any = self.summary
        for key in name.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return number(found)


def study_run(
    name: str,
    events: Sequence[Event],
    *,
    state: State,
    summary: Mapping[str, Any] | None = None,
    activity: Sequence[Mapping[str, Any]] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> StudyRun:
    """From what a run has written.

    Args:
        events: its journal, oldest first.
        summary, activity, recipe: what summary.json, activity.json and recipe.json hold; None where there is no such file.
    """
    finished = summary if state == "finished" else None
    starts = [event for event in events if event["event"] == "start"]
    told = {**(starts[-1] if starts else {}), **(finished or {})}
    timed = list(_timed(events))
    curve = tuple(_curve(timed))
    done = [int(step) for event in events if (step := number(event.get("step", event.get("steps")))) is not None]
    last = done[-1] if done else 0
    return StudyRun(
        name=name,
        state=state,
        rule=str(told.get("rule") or "unknown rule"),
        seed=int(number(told.get("seed")) or 0),
        study=str(told.get("study") or ""),
        recipe=_fields(recipe) or told.get("params") or {},
        summary=finished,
        trained_on=tuple(map(_trained_on, told_in(finished, starts) if finished else trained_on(starts, steps=None))),
        commits=tuple(dict.fromkeys(str(event["commit"]) for event in starts if event.get("commit"))),
        step=last,
        total_steps=_count(told.get("total_steps")),
        steps_per_epoch=_count(told.get("steps_per_epoch")),
        curve=curve,
        evaluations=tuple(_evaluations(timed)),
        attempts=tuple(_attempts(timed)),
        activity=tuple(_layers(activity or ())),
        fidelity=tuple(_fidelity(events)),
        parts=_parts_of(finished, last) if finished else _parts_so_far(timed),
    )


def from_folder(folder: Path) -> StudyRun:
    """From a run's folder.

    Raises: ReportError for a file in it that is damaged.
    """
    return study_run(
        folder.name,
        read(folder / "journal.jsonl"),
        state=state_of(folder),
        summary=load(folder / "summary.json"),
        activity=load_list(folder / "activity.json"),
        recipe=load(folder / "recipe.json"),
    )


def number(value: Any) -> float | None:
    """A finite number; journals write infinities and NaN as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _count(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _fields(recipe: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """recipe.json holds a version beside them."""
    inner = (recipe or {}).get("recipe", recipe)
    return inner if isinstance(inner, Mapping) else {}


def _trained_on(told: Mapping[str, Any]) -> TrainedOn:
    return TrainedOn(
        workers=_count(told.get("world_size")),
        micro_batch=_count(told.get("micro_batch")),
        hardware=told.get("hardware") or {},
        loader_threads=_count(told.get("loader_threads")),
        own_cores=bool(told.get("own_cores")),
    )


def _timed(events: Iterable[Event]) -> Iterator[tuple[float, Event]]:
    """Each event with the seconds of wall clock that the run had taken by then: those of its attempts, one after another."""
    paid = begun = now = last = 0.0
    attempt: Any = None
    for event in events:
        time = number(event.get("time"))
        now = now if time is None else time
        if event.get("attempt") != attempt:
            paid, attempt, begun = paid + last - begun, event.get("attempt"), now
        if event["event"] == "start" and (began := number(event.get("began"))) is not None:
            begun = began  # what the process did before its first event, too
        last = now
        yield paid + now - begun, event


def _curve(timed: Iterable[tuple[float, Event]]) -> list[TrainPoint]:
    points: list[TrainPoint] = []
    for seconds, event in timed:
        step = _count(event.get("step"))
        if step is None:
            continue
        if event["event"] == "start":
            points = [point for point in points if point.step <= step]  # what a restart does again
        elif event["event"] == "step":
            metrics = event.get("metrics") or {}
            values = {name: number(metrics.get(name)) for name in ("loss", "top1", "images_per_s")}
            points.append(TrainPoint(step=step, seconds=seconds, **values))
    return points


def _evaluations(timed: Iterable[tuple[float, Event]]) -> list[Evaluated]:
    found: dict[int, Evaluated] = {}  # one that is done again after a restart counts once
    for seconds, event in timed:
        if event["event"] == "evaluation" and (step := _count(event.get("step"))) is not None:
            metrics = event.get("metrics") or {}
            values = {name: number(metrics.get(name)) for name in ("top1", "loss", "firing_rate")}
            found.setdefault(step, Evaluated(step=step, seconds=seconds, epoch=_count(event.get("epoch")), **values))
    return sorted(found.values(), key=lambda each: each.step)


def _attempts(timed: Iterable[tuple[float, Event]]) -> Iterator[Attempt]:
    for seconds, event in timed:
        if event["event"] == "start":
            step, commit = _count(event.get("step")) or 0, event.get("commit")
            yield Attempt(
                number=_count(event.get("attempt")) or 0,
                step=step,
                seconds=seconds,
                commit=None if commit is None else str(commit),
            )


def _layers(activity: Sequence[Mapping[str, Any]]) -> Iterator[LayerRates]:
    for layer in activity:
        try:
            rates = tuple(float(rate) for rate in layer["rates"])
            shares = {name: float(layer[name]) for name in ("silent", "saturated")}
            yield LayerRates(name=str(layer["name"]), neurons=int(layer["neurons"]), rates=rates, **shares)
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(
                f"activity.json: a layer must have name, neurons, rates, silent, saturated; got {layer!r}"
            ) from error


def _fidelity(events: Iterable[Event]) -> list[Fidelity]:
    found: dict[int, Fidelity] = {}
    for event in events:
        if event["event"] == "fidelity" and (step := _count(event.get("step"))) is not None:
            shares = {str(layer): number(value) for layer, value in (event.get("temporal_share") or {}).items()}
            cosines = {
                str(rule): {str(layer): number(value) for layer, value in by_layer.items()}
                for rule, by_layer in (event.get("cosines") or {}).items()
            }
            found[step] = Fidelity(step=step, epoch=_count(event.get("epoch")), temporal_share=shares, cosines=cosines)
    return sorted(found.values(), key=lambda each: each.step)


def _parts_of(summary: Mapping[str, Any], done: int) -> dict[str, float]:
    """Of a finished run; runs from before the clock had all its parts have fewer."""
    steps = number(summary.get("steps")) or done
    names = (*PARTS, REST, *BETWEEN) if steps else ()
    return {name: value / steps for name in names if (value := number(summary.get(f"{name}_s"))) is not None}


def _parts_so_far(timed: Iterable[tuple[float, Event]]) -> dict[str, float]:
    """Of the batches alone: a point has the mean of a batch since the one before, and one that metrics told may have no parts."""
    seconds: dict[str, float] = {}
    done = told_of = 0
    for _, event in timed:
        step = _count(event.get("step"))
        if event["event"] == "step" and step is not None:
            metrics = event.get("metrics") or {}
            means = {name: mean for name in (*PARTS, REST) if (mean := number(metrics.get(f"{name}_s"))) is not None}
            batches = max(0, step - done) if means else 0
            told_of += batches
            for name, mean in means.items():
                seconds[name] = seconds.get(name, 0.0) + mean * batches
        if event["event"] in ("start", "step") and step is not None:
            done = step
    return {name: total / told_of for name, total in seconds.items()} if told_of else {}
