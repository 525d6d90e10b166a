"""A study in the store's current state, including running runs.

    live = Live(open_store(uri))
    live.study(live.members(key))

A cache keeps what was read. An ended run is read again when MLflow has a newer artifact or metric.
For a running run, the next look asks only for points after the known ones.
"""

import hashlib
import json
import math
import shlex
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from pipeline.measure.constants import PARTS, REST
from pipeline.recipe import BASELINE
from pipeline.report.claims import Returned, returned
from pipeline.report.history import UNKNOWN_EPOCH
from pipeline.report.results import (
    ReportError,
    Run,
    machine,
    parsed,
    refuse_damaged_summary,
    run_of,
)
from pipeline.report.stores import (
    FILES,
    JOURNAL,
    ArtifactError,
    Point,
    Sent,
    Store,
    StoredRun,
    StoreError,
    hardware_of,
    start_of,
)
from pipeline.report.study import Study
from pipeline.track.events import Evaluation, Event, Start, Step
from pipeline.track.mlflow import REPORT_DATA

_METRICS = ("loss", "top1")  # under train/ and val/
_PARTS = tuple(f"{name}_s" for name in (*PARTS, REST))
_SENT = "spiketrain.artifact."  # prefix of the tags that hold each sent artifact's version
_KEPT = 512  # the most runs in the cache
_FRESH_S = 0.5  # two callbacks of one look ask for the same runs
T_ = TypeVar("T_")


@dataclass
class _Running:
    seen: float = 0.0  # the time of MLflow's newest metric at the last look
    points: dict[str, list[Point]] = field(default_factory=dict)
    version: str = ""  # of the sent journal
    sent: Sent = Sent()


@dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """A suite's report as `spiketrain report` stored it in MLflow."""

    key: str = ""  # the beginning of the MLflow run id of the suite
    title: str = ""  # the suite, with the commits and machines of its shown runs
    version: str = ""
    returned: Returned = Returned()
    printed: str = ""  # the text that the suite's own report printed
    note: str = ""  # why the report is omitted


class Live:
    """A cached reader of a store. Threads may share it. Errors of the store propagate."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.RLock()
        self._recent: OrderedDict[tuple[str, str], tuple[float, Any]] = OrderedDict()
        self._ended: OrderedDict[tuple[Any, ...], Run] = OrderedDict()
        self._running: OrderedDict[str, _Running] = OrderedDict()

    def listed(self, *, fresh_s: float) -> list[StoredRun]:
        """Return all runs, at most `fresh_s` seconds old; 0 asks the store."""
        return self._cached("listed", "", self.store.listed, fresh_s=fresh_s)

    def members(self, study: str) -> list[StoredRun]:
        """The runs of a study key, newest start first."""
        return self._cached("members", study, lambda: self.store.runs(study))

    def study(self, runs: Sequence[StoredRun], *, against: str = BASELINE) -> Study:
        """Return a study of these runs. Its notes name the runs that cannot be read.

        Raises:
            StoreError: the store cannot be read.
        """
        readable: list[Run] = []
        notes: list[str] = []
        for stored in runs:
            try:
                run = self.run(stored)
            except StoreError:
                raise  # the store failed, not this run
            except ReportError as error:
                resent = f"; `spiketrain sync {shlex.quote(stored.name)}`"
                notes.append(
                    f"{stored.name} is left out:"
                    f" {error}{'' if isinstance(error, ArtifactError) else resent}"
                )
                continue
            if run.protocol == "trial":
                notes.append(
                    f"{run.name} is a trial on a held-out part, no run to set beside others."
                )
                continue
            readable.append(run)
            if run.curve_every > 1:
                is_of_points = run.summary is None and run.parts
                parts = ", and its parts of time are of those" if is_of_points else ""
                notes.append(
                    f"{run.name} has a long journal: of the points of its curve one of"
                    f" {run.curve_every} is shown{parts}."
                )
        keys = ", ".join(sorted({run.study[:8] for run in runs}))
        return Study(
            title=f"Study {keys}", runs=tuple(readable), against=against, notes=tuple(notes)
        )

    def reports(self, runs: Sequence[StoredRun]) -> list[SuiteReport]:
        """The reports of the suites that these runs belong to, newest launch first.

        Raises:
            StoreError: the store cannot be read.
        """
        suites: dict[str, list[StoredRun]] = {}
        for run in runs:
            if run.parent:
                suites.setdefault(run.parent, []).append(run)
        found = []
        for suite, members in suites.items():
            tags = [run.tags for run in members]
            commits = dict.fromkeys(filter(None, (each.get("spiketrain.commit") for each in tags)))
            machines = dict.fromkeys(machine(hardware_of(run)) for run in members)
            at = f", commit {' and '.join(commits)}" if commits else ""
            name = tags[0].get("spiketrain.suite") or "A suite"
            title = f"{name} ({suite[:8]}){at}, on {'; '.join(machines)}"
            report = self._cached("report", suite, partial(self._read_report, suite))
            found.append(replace(report, key=suite[:8], title=title))
        return found

    def run(self, stored: StoredRun) -> Run:
        """Return a run from its artifacts; a running run also from its metrics."""
        with self._lock:
            if stored.state == "running":
                running = self._running.setdefault(stored.id, _Running())
                _keep(self._running, stored.id, running)
                sent = self._with_metrics(stored, running)
                # MLflow stores no second value of a step. It lacks the batches that a restart
                # repeats until the journal is sent again.
                return self._run_from(stored, sent, redone="kept", heard=stored.newest)
            sent = tuple(sorted(item for item in stored.tags.items() if item[0].startswith(_SENT)))
            key = (stored.id, stored.status, stored.newest, sent)
            run = self._ended.get(key) or self._read_ended(stored)
            _keep(self._ended, key, run)
            self._running.pop(stored.id, None)
            return run

    def _cached(
        self, what: str, key: str, ask: Callable[[], T_], *, fresh_s: float = _FRESH_S
    ) -> T_:
        asked_at, answer = self._recent.get((what, key), (-math.inf, None))
        if time.monotonic() - asked_at >= fresh_s:
            answer = ask()  # outside the lock: a slow list must not block the figures
            _keep(self._recent, (what, key), (time.monotonic(), answer))
        return answer  # type: ignore[return-value]

    def _read_ended(self, stored: StoredRun) -> Run:
        sent = self.store.journal(stored.id)
        if not any(isinstance(event, Start) for event in sent.events):
            sent = self._with_metrics(stored, _Running())
        summary = self._json(stored.id, FILES.summary.name, dict)
        refuse_damaged_summary(summary or {}, f"its {FILES.summary.name} in MLflow")
        layers = self._json(stored.id, FILES.activity.name, list)
        run = self._run_from(stored, sent, summary=summary, layers=lambda: layers)
        _ = run.activity  # the file may be damaged
        return run

    def _run_from(self, stored: StoredRun, sent: Sent, **about: Any) -> Run:
        starts = [event.to_dict() for event in sent.events if isinstance(event, Start)]
        recipe = self._json(stored.id, FILES.recipe.name, dict)
        about |= {"recipe": recipe, "curve_every": sent.every, "journal": lambda: sent.events}
        starts = starts or [start_of(stored)]
        return run_of(stored.name, state=stored.state, starts=starts, **about)

    def _with_metrics(self, stored: StoredRun, running: _Running) -> Sent:
        """Return the journal as it was last sent, with the later metrics as events."""
        version = stored.tags.get(_SENT + JOURNAL, "")
        if version != running.version:
            running.version, running.sent = version, self.store.journal(stored.id)
        if stored.newest > running.seen:
            for key in (f"{prefix}/{name}" for prefix in ("train", "val") for name in _METRICS):
                if key in stored.metrics:
                    known = running.points.setdefault(key, [])
                    known += self.store.history(
                        stored.id, key, since=known[-1].step if known else -1
                    )
            running.seen = stored.newest
        events = list(running.sent.events) or [Event(time=stored.started, attempt=0)]
        later = _events_after(events, running.points)
        if newest := next((event for event in reversed(later) if isinstance(event, Step)), None):
            # The run's newest values cost no further request. Earlier values are not requested.
            newest.metrics.update(
                {
                    name: stored.metrics[f"train/{name}"]
                    for name in _PARTS
                    if f"train/{name}" in stored.metrics
                }
            )
        return replace(running.sent, events=[*events, *later])

    def _read_report(self, suite: str) -> SuiteReport:
        try:
            value = self._json(suite, REPORT_DATA, dict)
            found = returned(value, f"{REPORT_DATA} in MLflow")
        except StoreError:
            raise  # the store failed, not this report
        except ReportError as error:
            return SuiteReport(version=str(error), note=f"Its report is left out: {error}")
        version = hashlib.sha256(json.dumps(value).encode()).hexdigest()
        printed = str((value or {}).get("printed") or "")
        return SuiteReport(version=version, returned=found, printed=printed)

    def _json(self, run_id: str, name: str, kind: type) -> Any:
        text = self.store.text(run_id, name)
        return None if text is None else parsed(text, f"its {name} in MLflow", kind)


def _events_after(
    events: Sequence[Event], points: Mapping[str, Sequence[Point]]
) -> list[Step | Evaluation]:
    """Return points of steps that the journal lacks, as events in the order of their time."""
    later: list[Step | Evaluation] = []
    for kind, prefix in ((Step, "train"), (Evaluation, "val")):
        known = max((event.step for event in events if isinstance(event, kind)), default=-1)
        metrics: dict[int, dict[str, float]] = {}
        times: dict[int, float] = {}
        for name in _METRICS:
            for point in points.get(f"{prefix}/{name}", ()):
                if point.step > known:
                    metrics.setdefault(point.step, {})[name] = point.value
                    times.setdefault(point.step, point.time)
        more: dict[str, Any] = {"samples": 0} if kind is Evaluation else {"memory_bytes": None}
        later += [
            kind(
                step=step,
                epoch=UNKNOWN_EPOCH,
                metrics=values,
                time=times[step],
                attempt=events[-1].attempt,
                **more,
            )
            for step, values in metrics.items()
        ]
    return sorted(later, key=lambda event: (event.time, event.step))


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _KEPT:
        kept.popitem(last=False)
