"""One run as a report reads it: from its journal, and where it has them its summary, firing rates
and recipe.

A run's folder and the artifacts of MLflow hold the same files, so that both make the same value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.measure.constants import BETWEEN, PARTS, REST
from pipeline.report import history
from pipeline.report.history import Attempt, Evaluated, Fidelity, TrainPoint, count, number
from pipeline.report.runs import ReportError, load, load_list, summary_of
from pipeline.track.journal import Event, read
from pipeline.track.provenance import told_in, trained_on
from pipeline.track.state import State, state_of

__all__ = ["UNKNOWN_RULE", "LayerRates", "StudyRun", "TrainedOn", "from_folder", "study_run"]

UNKNOWN_RULE = "unknown rule"
"""the label of a run that does not say which"""


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
    samples: int
    """of that evaluation on which spikes were counted"""
    rates: tuple[float, ...]
    """spikes per neuron at each time step"""
    silent: float
    saturated: float


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """What is known of a run; a field that was not measured is None, or empty."""

    name: str
    state: State
    heard: float | None = None
    """of a run that goes on by what MLflow says, its last sign of life, in unix seconds; a folder
    knows its state
    """
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
    again_from: int | None = None
    """where a restart stands, as far as it was told, that does the batches up to `step` again; None
    where none does
    """
    total_steps: int | None
    steps_per_epoch: int | None
    curve: tuple[TrainPoint, ...]
    every: int = 1
    """of the points of its curve that it told, one of so many is here"""
    evaluations: tuple[Evaluated, ...]
    attempts: tuple[Attempt, ...]
    activity: tuple[LayerRates, ...]
    fidelity: tuple[Fidelity, ...]
    parts: Mapping[str, float] = field(default_factory=dict)
    """seconds of a batch in each part of the clock: of a finished run all that it was charged with
    but its start-up, evaluations and checkpoints too; of another its batches alone, in the mean
    over those whose parts were told"""

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
        """A number of the summary, such as "top1", or "inference.energy_j" within an object of
        it.
        """
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
    redone: Literal["dropped", "kept"] = "dropped",
    every: int = 1,
) -> StudyRun:
    """From what a run has written.

    Args:
        events: its journal, oldest first.
        summary, activity, recipe: what summary.json, activity.json and recipe.json hold; None where
        there is no such file. redone: what becomes of batches that a restart does again, until they
        are told again.
        every: of the events of its curve that the journal has, one of so many is among `events`.
    """
    finished = summary if state == "finished" else None
    starts = [event for event in events if event["event"] == "start"]
    told = {**(starts[-1] if starts else {}), **(finished or {})}
    timed = list(history.timed(events))
    curve = tuple(history.curve(timed, redone=redone))
    told_in_time = [
        event for event in events if event["event"] not in ("checkpoint", "unwritten")
    ]  # of which a thread tells
    done = [
        int(step)
        for event in told_in_time
        if (step := number(event.get("step", event.get("steps")))) is not None
    ]
    last = done[-1] if done else 0
    known = max(last, curve[-1].step) if curve and redone == "kept" else last
    return StudyRun(
        name=name,
        state=state,
        rule=str(told.get("rule") or UNKNOWN_RULE),
        seed=int(number(told.get("seed")) or 0),
        study=str(told.get("study") or ""),
        recipe=_fields(recipe) or told.get("params") or {},
        summary=finished,
        trained_on=tuple(
            map(
                _trained_on,
                told_in(finished, starts) if finished else trained_on(starts, steps=None),
            )
        ),
        commits=tuple(
            dict.fromkeys(str(event["commit"]) for event in starts if event.get("commit"))
        ),
        step=known,
        again_from=last if last < known else None,
        total_steps=count(told.get("total_steps")),
        steps_per_epoch=count(told.get("steps_per_epoch")),
        curve=curve,
        every=every,
        evaluations=tuple(history.evaluations(timed, redone=redone)),
        attempts=tuple(history.attempts(timed)),
        activity=tuple(_layers(activity or ())),
        fidelity=tuple(history.fidelity(events)),
        parts=_parts_of(finished, last) if finished else history.parts(timed),
    )


def from_folder(folder: Path) -> StudyRun:
    """From a run's folder.

    Raises: ReportError for a file in it that is damaged.
    """
    return study_run(
        folder.name,
        read(folder / "journal.jsonl"),
        state=state_of(folder),
        summary=summary_of(folder),
        activity=load_list(folder / "activity.json"),
        recipe=load(folder / "recipe.json"),
    )


def _fields(recipe: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """recipe.json holds a version beside them."""
    inner = (recipe or {}).get("recipe", recipe)
    return inner if isinstance(inner, Mapping) else {}


def _trained_on(told: Mapping[str, Any]) -> TrainedOn:
    return TrainedOn(
        workers=count(told.get("world_size")),
        micro_batch=count(told.get("micro_batch")),
        hardware=told.get("hardware") or {},
        loader_threads=count(told.get("loader_threads")),
        own_cores=bool(told.get("own_cores")),
    )


def _layers(activity: Sequence[Mapping[str, Any]]) -> Iterator[LayerRates]:
    for layer in activity:
        try:
            yield LayerRates(
                name=str(layer["name"]),
                neurons=int(layer["neurons"]),
                samples=int(layer["samples"]),
                rates=tuple(float(rate) for rate in layer["rates"]),
                silent=float(layer["silent"]),
                saturated=float(layer["saturated"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(
                "activity.json: a layer must have name, neurons, samples, rates, silent,"
                f" saturated; got {layer!r}"
            ) from error


def _parts_of(summary: Mapping[str, Any], done: int) -> dict[str, float]:
    """Of a finished run; runs from before the clock had all its parts have fewer."""
    steps = number(summary.get("timed_batches")) or number(summary.get("steps")) or done
    names = (*PARTS, REST, *BETWEEN) if steps else ()
    return {
        name: value / steps
        for name in names
        if (value := number(summary.get(f"{name}_s"))) is not None
    }
