"""The current state of a study in a store, including running runs.

    live = Live(open_store(uri))
    live.study(live.listed(fresh_s=5.0))

A cache keeps the runs. A run is read again when its status in MLflow changes, or when MLflow has a
newer artifact or metric. For a running run, only the points after its stored journal are requested.
"""

import hashlib
import json
import math
import shlex
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from pipeline.measure.constants import PARTS, REST
from pipeline.report.claims import SuiteReport, parse_result
from pipeline.report.history import UNKNOWN_EPOCH
from pipeline.report.results import (
    ReportError,
    Run,
    describe_machine,
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
_ARTIFACT_TAG = "spiketrain.artifact."  # prefix of the tags with the version of each artifact
_CACHE_SIZE = 512  # entries
T_ = TypeVar("T_")


class Live:
    """A cached reader of a store. It is thread-safe, and raises the errors of the store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        # One thread reads a run; the other threads wait, and then find the run in the cache. The
        # list of runs is read outside the lock: a slow list must not block the figures.
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str], tuple[object, Any]] = OrderedDict()  # by version
        self._listed: tuple[float, list[StoredRun]] = (-math.inf, [])  # the time, and the runs

    def listed(self, *, fresh_s: float) -> list[StoredRun]:
        """Return all runs, from a list at most `fresh_s` seconds old. 0: read the store."""
        read_at, runs = self._listed
        if time.monotonic() - read_at >= fresh_s:
            runs = self.store.runs()
            self._listed = time.monotonic(), runs
        return runs

    def study(self, runs: Sequence[StoredRun]) -> Study:
        """Return a study of these runs. Its notes name excluded runs and thinned curves.

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
                if isinstance(error, ArtifactError):  # the message has its own remedy
                    remedy = ""
                notes.append(f"{stored.name} is excluded: {error}{remedy}")
                continue
            if run.protocol == "trial":
                notes.append(
                    f"{run.name} is excluded: it is a trial on a held-out part of the training set."
                )
                continue
            readable.append(run)
            if run.curve_every > 1:
                note = (
                    f"{run.name} has a long journal: its curve shows one of every {run.curve_every}"
                    " points"
                )
                if run.summary is None and run.parts:
                    note += ", and its parts of time are means over these points"
                notes.append(f"{note}.")
        keys = ", ".join(sorted({run.study[:8] for run in runs}))
        return Study(title=f"Study {keys}", runs=tuple(readable), notes=tuple(notes))

    def reports(self, runs: Sequence[StoredRun]) -> list[SuiteReport]:
        """The reports of the suites that these runs belong to, in the order of the runs.

        Raises:
            StoreError: the store cannot be read.
        """
        suites: dict[str, list[StoredRun]] = {}
        for run in runs:
            if run.parent:
                suites.setdefault(run.parent, []).append(run)
        reports = []
        for suite, members in suites.items():
            tags = [run.tags for run in members]
            commits = dict.fromkeys(filter(None, (each.get("spiketrain.commit") for each in tags)))
            machines = dict.fromkeys(describe_machine(hardware_of(run)) for run in members)
            commit = f", commit {' and '.join(commits)}" if commits else ""
            name = tags[0].get("spiketrain.suite") or "A suite"
            title = f"{name} ({suite[:8]}){commit}, on {'; '.join(machines)}"
            reports.append(replace(self._read_report(suite), key=suite[:8], title=title))
        return reports

    def run(self, stored: StoredRun) -> Run:
        """Return a run from its artifacts, and from its metrics if it runs or has no journal."""
        versions = sorted(item for item in stored.tags.items() if item[0].startswith(_ARTIFACT_TAG))
        with self._lock:
            return self._cached(
                ("run", stored.id),
                (stored.status, stored.newest, versions),
                partial(self._read, stored),
            )

    def _cached(self, key: tuple[str, str], version: object, read: Callable[[], T_]) -> T_:
        """Return the cached value of this version, or read it."""
        if key not in self._cache or self._cache[key][0] != version:
            self._cache[key] = version, read()
        self._cache.move_to_end(key)
        if len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)
        return self._cache[key][1]

    def _read(self, stored: StoredRun) -> Run:
        sent = self._cached(
            ("journal", stored.id),
            stored.tags.get(_ARTIFACT_TAG + JOURNAL),
            partial(self.store.journal, stored.id),
        )
        starts = [event.to_dict() for event in sent.events if isinstance(event, Start)]
        is_running = stored.state == "running"
        if is_running or not starts:
            sent = self._with_metrics(stored, sent)
        if is_running:
            # MLflow stores one value per step, so the values of repeated batches are unknown until
            # the journal is sent again.
            fields: dict[str, Any] = {"redone": "kept", "last_heard": stored.newest}
        else:
            summary = self._json(stored.id, FILES.summary.name, dict)
            refuse_damaged_summary(summary or {}, f"its {FILES.summary.name} in MLflow")
            layers = self._json(stored.id, FILES.activity.name, list)
            fields = {"summary": summary, "layers": lambda: layers}
        run = run_of(
            stored.name,
            state=stored.state,
            starts=starts or [start_of(stored)],
            recipe=self._json(stored.id, FILES.recipe.name, dict),
            curve_every=sent.every,
            journal=lambda: sent.events,
            **fields,
        )
        _ = run.activity  # the file may be damaged
        return run

    def _with_metrics(self, stored: StoredRun, sent: SentJournal) -> SentJournal:
        """Return the stored journal, extended by events from the metrics after it."""
        events = list(sent.events) or [Event(time=stored.started, attempt=0)]
        later: list[Step | Evaluation] = []
        for kind, prefix, more in (
            (Step, "train", {"memory_bytes": stored.metrics.get("train/memory_bytes")}),
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
            fields: dict[str, Any] = {"epoch": UNKNOWN_EPOCH, "attempt": events[-1].attempt, **more}
            later += [
                kind(step=step, metrics=values, time=times[step], **fields)
                for step, values in metrics.items()
            ]
        later.sort(key=lambda event: (event.time, event.step))
        if newest := next((event for event in reversed(later) if isinstance(event, Step)), None):
            # The newest values are already known. Earlier values would take further requests.
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
            value = self._json(suite, REPORT_DATA, dict) or {}
            printed = str(value.get("printed", ""))
            report = parse_result(value, f"{REPORT_DATA} in MLflow", printed=printed)
        except StoreError:
            raise  # the store failed, not this report
        except ReportError as error:
            return SuiteReport(version=str(error), note=f"Its report is excluded: {error}")
        return replace(report, version=hashlib.sha256(json.dumps(value).encode()).hexdigest())

    def _json(self, run_id: str, name: str, kind: type) -> Any:
        text = self.store.text(run_id, name)
        return None if text is None else parsed(text, f"its {name} in MLflow", kind)
