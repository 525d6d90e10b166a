"""A study in the store's current state, including running runs.

    live = Live(open_store(uri))
    live.study(live.members(key))

A cache keeps what was read. A run is read again when MLflow has a newer artifact or metric. Of a
running run, only the points after its sent journal are asked for.
"""

import hashlib
import json
import math
import shlex
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from pipeline.measure.constants import PARTS, REST
from pipeline.report.claims import SuiteResult, parse_result
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
    SentJournal,
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
_KEPT = 512  # the most answers in the cache
_FRESH_S = 0.5  # one view of a page asks for the same runs twice
T_ = TypeVar("T_")


@dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """A suite's report as `spiketrain report` stored it in MLflow."""

    key: str = ""  # the beginning of the MLflow run id of the suite
    title: str = ""  # the suite, with the commits and machines of its shown runs
    version: str = ""
    returned: SuiteResult = SuiteResult()
    printed: str = ""  # the text that the suite's own report printed
    note: str = ""  # why the report is omitted


class Live:
    """A cached reader of a store. Threads may share it. Errors of the store propagate."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._reading = (
            threading.Lock()
        )  # one thread reads a run; the others wait and take its answer
        # by key: the time of the answer, its version, and the answer
        self._kept: OrderedDict[tuple[str, str], tuple[float, object, Any]] = OrderedDict()

    def listed(self, *, fresh_s: float) -> list[StoredRun]:
        """Return all runs, at most `fresh_s` seconds old; 0 asks the store."""
        return self._cached(("listed", ""), self.store.listed, fresh_s=fresh_s)

    def members(self, study: str) -> list[StoredRun]:
        """The runs of a study key, newest start first."""
        return self._cached(("members", study), lambda: self.store.runs(study), fresh_s=_FRESH_S)

    def study(self, runs: Sequence[StoredRun]) -> Study:
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
                remedy = f"; `spiketrain sync {shlex.quote(stored.name)}`"
                if isinstance(error, ArtifactError):  # which names its own
                    remedy = ""
                notes.append(f"{stored.name} is left out: {error}{remedy}")
                continue
            if run.protocol == "trial":
                notes.append(
                    f"{run.name} is a trial on a held-out part; it is not compared with runs."
                )
                continue
            readable.append(run)
            if run.curve_every > 1:
                is_of_points = run.summary is None and run.parts
                parts = ", and its parts of time are means over these" if is_of_points else ""
                notes.append(
                    f"{run.name} has a long journal: its curve shows one of {run.curve_every}"
                    f" points{parts}."
                )
        keys = ", ".join(sorted({run.study[:8] for run in runs}))
        return Study(title=f"Study {keys}", runs=tuple(readable), notes=tuple(notes))

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
            report = self._cached(
                ("report", suite), partial(self._read_report, suite), fresh_s=_FRESH_S
            )
            found.append(replace(report, key=suite[:8], title=title))
        return found

    def run(self, stored: StoredRun) -> Run:
        """Return a run from its artifacts; a running run also from its metrics."""
        sent = sorted(item for item in stored.tags.items() if item[0].startswith(_SENT))
        with self._reading:
            return self._cached(
                ("run", stored.id),
                partial(self._read, stored),
                version=(stored.status, stored.newest, sent),
            )

    def _cached(
        self,
        key: tuple[str, str],
        ask: Callable[[], T_],
        *,
        version: object = None,
        fresh_s: float = math.inf,
    ) -> T_:
        """Return the kept answer, unless it is of another version or at least `fresh_s` old."""
        asked_at, known, answer = self._kept.get(key, (-math.inf, None, None))
        if known != version or time.monotonic() - asked_at >= fresh_s:
            answer = ask()  # outside the lock: a slow list must not block the figures
            asked_at = time.monotonic()
        with self._lock:
            self._kept[key] = asked_at, version, answer
            self._kept.move_to_end(key)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return answer  # type: ignore[return-value]

    def _read(self, stored: StoredRun) -> Run:
        sent = self._cached(
            ("journal", stored.id),
            partial(self.store.journal, stored.id),
            version=stored.tags.get(_SENT + JOURNAL),
        )
        starts = [event.to_dict() for event in sent.events if isinstance(event, Start)]
        is_running = stored.state == "running"
        if is_running or not starts:
            sent = self._with_metrics(stored, sent)
        if is_running:
            # MLflow stores no second value of a step. It lacks the batches that a restart repeats
            # until the journal is sent again.
            about: dict[str, Any] = {"redone": "kept", "last_heard": stored.newest}
        else:
            summary = self._json(stored.id, FILES.summary.name, dict)
            refuse_damaged_summary(summary or {}, f"its {FILES.summary.name} in MLflow")
            layers = self._json(stored.id, FILES.activity.name, list)
            about = {"summary": summary, "layers": lambda: layers}
        run = run_of(
            stored.name,
            state=stored.state,
            starts=starts or [start_of(stored)],
            recipe=self._json(stored.id, FILES.recipe.name, dict),
            curve_every=sent.every,
            journal=lambda: sent.events,
            **about,
        )
        _ = run.activity  # the file may be damaged
        return run

    def _with_metrics(self, stored: StoredRun, sent: SentJournal) -> SentJournal:
        """Return the journal as it was last sent, with the later metrics as events."""
        events = list(sent.events) or [Event(time=stored.started, attempt=0)]
        later: list[Step | Evaluation] = []
        for kind, prefix, more in (
            (Step, "train", {"memory_bytes": None}),
            (Evaluation, "val", {"samples": 0}),
        ):
            since = max((event.step for event in events if isinstance(event, kind)), default=-1)
            metrics: dict[int, dict[str, float]] = {}
            times: dict[int, float] = {}
            for name in _METRICS:
                if (key := f"{prefix}/{name}") in stored.metrics:
                    for point in self.store.history(stored.id, key, since=since):
                        metrics.setdefault(point.step, {})[name] = point.value
                        times.setdefault(point.step, point.time)
            about: dict[str, Any] = {"epoch": UNKNOWN_EPOCH, "attempt": events[-1].attempt, **more}
            later += [
                kind(step=step, metrics=values, time=times[step], **about)
                for step, values in metrics.items()
            ]
        later.sort(key=lambda event: (event.time, event.step))
        if newest := next((event for event in reversed(later) if isinstance(event, Step)), None):
            # The run's newest values cost no further request. Earlier values are not requested.
            newest.metrics.update(
                {
                    name: stored.metrics[f"train/{name}"]
                    for name in _PARTS
                    if f"train/{name}" in stored.metrics
                }
            )
        return replace(sent, events=[*events, *later])

    def _read_report(self, suite: str) -> SuiteReport:
        try:
            value = self._json(suite, REPORT_DATA, dict)
            found = parse_result(value, f"{REPORT_DATA} in MLflow")
        except StoreError:
            raise  # the store failed, not this report
        except ReportError as error:
            return SuiteReport(version=str(error), note=f"Its report is left out: {error}")
        version = hashlib.sha256(json.dumps(value).encode()).hexdigest()
        return SuiteReport(
            version=version,
            returned=found,
            printed=str((value or {}).get("printed") or ""),
        )

    def _json(self, run_id: str, name: str, kind: type) -> Any:
        text = self.store.text(run_id, name)
        return None if text is None else parsed(text, f"its {name} in MLflow", kind)
