"""A study as a store holds it now, runs that go on included: what a dashboard draws.

    live = Live(open_store(uri))
    live.study(live.members(key))

What was read is kept. Of a run that has ended, as long as MLflow tells of no newer artifact or
metric; of one that goes on its points, so that the next look asks for those after them.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.measure.constants import PARTS, REST
from pipeline.recipe import BASELINE
from pipeline.report.history import number
from pipeline.report.places import machine
from pipeline.report.returned import Returned, returned
from pipeline.report.runs import ReportError, refuse_damaged_summary
from pipeline.report.store import ArtifactError, Point, Store, StoredRun, StoreError, Told, state_of
from pipeline.report.study import Study
from pipeline.report.study_run import StudyRun, study_run
from pipeline.track.files import JOURNAL
from pipeline.track.journal import Event
from pipeline.track.publish import REPORT_DATA

_ASKED = {
    "step": ("train/", ("loss", "top1", "images_per_s")),
    "evaluation": ("val/", ("top1", "loss", "firing_rate")),
}
_PARTS = tuple(f"{name}_s" for name in (*PARTS, REST))
_SENT = "spiketrain.artifact."  # tags that say which version of an artifact was sent
_BESIDE = {"summary": dict, "activity": list, "recipe": dict}
_KEPT = 512  # runs
_FRESH_S = 0.5  # two callbacks of one look ask for the same runs


@dataclass
class _Going:
    """What was read of a run that goes on."""

    seen: float = 0.0
    """the time of the newest metric that MLflow had at the last look"""
    points: dict[str, list[Point]] = field(default_factory=dict)
    journal: tuple[str, Told] = ("", Told())
    """the version that was sent, and what it tells"""


@dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """What `spiketrain report` told of a suite: of all runs that were launched with it, whichever
    of them are shown.
    """

    key: str
    """the beginning of the id of its run in MLflow"""
    title: str
    """the suite, and commits and machines of those of its runs that are shown"""
    told: Returned
    printed: str
    """by a report of its own; empty where it has none"""
    note: str
    """why it is left out, or empty"""


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A report as it was read."""

    at: float
    """by the clock that nobody sets"""
    version: str
    told: Returned = Returned()
    printed: str = ""
    note: str = ""


class Live:
    """Reads a store for as long as somebody looks; safe to share between threads. What it asks of
    the store may raise.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.RLock()
        self._ended: OrderedDict[tuple[Any, ...], StudyRun] = OrderedDict()
        self._going: OrderedDict[str, _Going] = OrderedDict()
        self._reports: OrderedDict[str, _Read] = OrderedDict()
        self._members: dict[str, tuple[float, list[StoredRun]]] = {}
        self._listed: tuple[float, list[StoredRun]] = (-math.inf, [])

    def listed(self, *, fresh_s: float) -> list[StoredRun]:
        """All runs, as the store had them `fresh_s` ago at most; 0 asks it."""
        read, runs = self._listed
        if time.monotonic() - read >= fresh_s:
            runs = (
                self.store.listed()
            )  # without the lock: a list that takes long keeps nobody from the figures
            self._listed = (time.monotonic(), runs)
        return runs

    def members(self, study: str) -> list[StoredRun]:
        """The runs of a study key, the one that started last first."""
        with self._lock:
            read, runs = self._members.get(study, (0.0, []))
            if time.monotonic() - read > _FRESH_S:
                runs = self.store.runs(study)
                self._members = {study: (time.monotonic(), runs)}
            return runs

    def study(self, runs: Sequence[StoredRun], *, against: str = BASELINE) -> Study:
        """What is known of these runs; what cannot be read is named in the notes.

        Raises:
            StoreError: the store cannot be read.
        """
        found: list[StudyRun] = []
        notes: list[str] = []
        for stored in runs:
            try:
                run = self.run(stored)
            except StoreError:
                raise  # of the store, not of this run
            except ArtifactError as error:  # to be sent again would not mend it
                notes.append(f"{stored.name} is left out: {error}")
                continue
            except ReportError as error:
                notes.append(
                    f"{stored.name} is left out: {error}; `spiketrain sync"
                    f" {shlex.quote(stored.name)}`"
                )
                continue
            if run.recipe.get("protocol") == "trial":
                notes.append(
                    f"{run.name} is a trial on a held-out part, no run to set beside others."
                )
                continue
            found.append(run)
            if run.every > 1:
                parts = (
                    ", and its parts of time are of those"
                    if run.parts and run.summary is None
                    else ""
                )
                notes.append(
                    f"{run.name} has a long journal: of the points of its curve one of {run.every}"
                    f" is shown{parts}."
                )
        keys = {run.study[:8] for run in runs}
        return Study(
            title=f"Study {', '.join(sorted(keys))}",
            runs=tuple(found),
            against=against,
            notes=tuple(notes),
        )

    def reports(self, runs: Sequence[StoredRun]) -> list[SuiteReport]:
        """What the reports of the suites tell that these runs were launched with, the one launched
        last first.

        Raises:
            StoreError: the store cannot be read.
        """
        suites = _by_suite(runs)
        return [
            SuiteReport(
                key=suite[:8],
                title=_title(suite, members),
                told=read.told,
                printed=read.printed,
                note=read.note,
            )
            for (suite, members), read in zip(suites.items(), self._read(suites), strict=True)
        ]

    def versions(self, runs: Sequence[StoredRun]) -> list[str]:
        """Of the reports of their suites: others when one of them is another."""
        return [read.version for read in self._read(_by_suite(runs))]

    def run(self, stored: StoredRun) -> StudyRun:
        """One run, from its artifacts, and where it goes on from its metrics."""
        with self._lock:
            if state_of(stored) == "running":
                return self._going_on(stored)
            sent = tuple(sorted(item for item in stored.tags.items() if item[0].startswith(_SENT)))
            key = (stored.id, stored.state, stored.newest, sent)
            if key not in self._ended:
                self._ended[key] = self._as_it_ended(stored)
                self._going.pop(stored.id, None)
                _forget(self._ended)
            self._ended.move_to_end(key)
            return self._ended[key]

    def _as_it_ended(self, stored: StoredRun) -> StudyRun:
        told = self.store.journal(stored.id)
        if not any(event["event"] == "start" for event in told.events):
            told = self._told_by_metrics(stored, _Going())
        beside = {
            name: self._json(stored.id, f"{name}.json", kind) for name, kind in _BESIDE.items()
        }
        refuse_damaged_summary(beside["summary"] or {}, "its summary.json in MLflow")
        return study_run(
            stored.name, told.events, state=state_of(stored), every=told.every, **beside
        )

    def _going_on(self, stored: StoredRun) -> StudyRun:
        going = self._going.setdefault(stored.id, _Going())
        _forget(self._going)
        self._going.move_to_end(stored.id)
        told = self._told_by_metrics(stored, going)
        recipe = self._json(stored.id, "recipe.json", dict)
        # MLflow takes no second value of a step: of what a restart does again nothing is told until
        # the next journal.
        run = study_run(
            stored.name,
            told.events,
            state="running",
            recipe=recipe,
            redone="kept",
            every=told.every,
        )
        return replace(run, heard=stored.newest)

    def _told_by_metrics(self, stored: StoredRun, going: _Going) -> Told:
        """The journal as it was last sent, at a start or when its weights were looked at, and after
        it what metrics tell.
        """
        version = stored.tags.get(_SENT + JOURNAL, "")
        if version != going.journal[0]:
            going.journal = version, self.store.journal(stored.id)
        if stored.newest > going.seen:
            for prefix, names in _ASKED.values():
                for key in (prefix + name for name in names):
                    if key in stored.metrics:
                        known = going.points.setdefault(key, [])
                        known += self.store.history(
                            stored.id, key, since=known[-1].step if known else -1
                        )
            going.seen = stored.newest
        told = going.journal[1]
        events = list(told.events) or [_start(stored)]
        attempt = events[-1].get("attempt")
        later = list(_after(events, going.points, attempt))
        if newest := next((event for event in reversed(later) if event["event"] == "step"), None):
            # Their newest values come with the run, and cost no further question; of the points
            # before it nothing is known.
            newest["metrics"] |= {
                name: stored.metrics[f"train/{name}"]
                for name in _PARTS
                if f"train/{name}" in stored.metrics
            }
        return replace(told, events=[*events, *later])

    def _read(self, suites: Iterable[str]) -> list[_Read]:
        with self._lock:
            return [self._report(suite) for suite in suites]

    def _report(self, suite: str) -> _Read:
        known = self._reports.get(suite)
        if known is None or time.monotonic() - known.at > _FRESH_S:
            known = self._reports[suite] = self._read_report(suite)
            _forget(self._reports)
        return known

    def _read_report(self, suite: str) -> _Read:
        try:
            told = self._json(suite, REPORT_DATA, dict)
            version = hashlib.sha256(json.dumps(told).encode()).hexdigest()
            found, printed = (
                returned(told, f"{REPORT_DATA} in MLflow"),
                str((told or {}).get("printed") or ""),
            )
            return _Read(at=time.monotonic(), version=version, told=found, printed=printed)
        except StoreError:
            raise  # of the store, not of this report
        except ReportError as error:
            return _Read(
                at=time.monotonic(),
                version=str(error),
                note=f"What its report tells is left out: {error}",
            )

    def _json(self, run_id: str, name: str, kind: type) -> Any:
        text = self.store.text(run_id, name)
        try:
            value = None if text is None else json.loads(text)
        except ValueError as error:
            raise ReportError(f"its {name} in MLflow is not JSON ({error})") from error
        if value is not None and not isinstance(value, kind):
            raise ReportError(
                f"its {name} in MLflow must hold a {kind.__name__}; got a {type(value).__name__}"
            )
        return value


def _after(
    events: Sequence[Event], points: Mapping[str, Sequence[Point]], attempt: Any
) -> Iterator[Event]:
    """Points of steps that the journal has not told, as events in the order of their time."""
    found: list[Event] = []
    for kind, (prefix, names) in _ASKED.items():
        told = max(
            (int(number(event.get("step")) or 0) for event in events if event["event"] == kind),
            default=-1,
        )
        by_step: dict[int, Event] = {}
        for name in names:
            for point in points.get(prefix + name, ()):
                if point.step > told:
                    about = {
                        "event": kind,
                        "time": point.time,
                        "attempt": attempt,
                        "step": point.step,
                        "metrics": {},
                    }
                    by_step.setdefault(point.step, about)["metrics"][name] = point.value
        found += by_step.values()
    yield from sorted(found, key=lambda event: (event["time"], event["step"]))


def _by_suite(runs: Iterable[StoredRun]) -> dict[str, list[StoredRun]]:
    """Those that were launched with one, by the id of its run; in the order of their first runs."""
    suites: dict[str, list[StoredRun]] = {}
    for run in runs:
        if run.parent:
            suites.setdefault(run.parent, []).append(run)
    return suites


def _title(suite: str, members: Sequence[StoredRun]) -> str:
    """`claims-fashion-20260105-120000 (01234567), commit abc, on a cpu, 2 cores, 1 thread`"""
    name = members[0].tags.get("spiketrain.suite") or "A suite"
    commits = dict.fromkeys(filter(None, (run.tags.get("spiketrain.commit") for run in members)))
    machines = dict.fromkeys(machine(_hardware(run)) for run in members)
    told = f", commit {' and '.join(commits)}" if commits else ""
    return f"{name} ({suite[:8]}){told}, on {'; '.join(machines)}"


def _start(stored: StoredRun) -> Event:
    """What tags tell of a run whose journal was not sent yet."""
    about = {name: stored.tags.get(f"spiketrain.{name}") for name in ("rule", "study", "commit")}
    numbers = ("seed", "world_size", "micro_batch", "attempt")
    counts = {name: _value(stored.tags.get(f"spiketrain.{name}", "")) for name in numbers}
    return {
        "event": "start",
        "time": stored.started,
        "step": 0,
        "hardware": _hardware(stored),
        **about,
        **counts,
    }


def _hardware(stored: StoredRun) -> dict[str, str | int]:
    return {
        name.removeprefix("hardware."): _value(value)
        for name, value in stored.tags.items()
        if name.startswith("hardware.")
    }


def _value(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def _forget(kept: OrderedDict[Any, Any]) -> None:
    while len(kept) > _KEPT:
        kept.popitem(last=False)
