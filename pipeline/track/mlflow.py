"""MLflow as a mirror of the journal, kept up to date by a thread of the driver or by `sync`.

The training processes never talk to MLflow. A server that is down does not slow them, and receives
the missed events when it is back. Each (metric, step) is sent once, however often the process dies.

There is no state file; MLflow itself holds the state. The run is found by its tag
`spiketrain.run_id`. Points are sent in the order of their steps, so the newest step of a metric in
MLflow shows how far the metric was delivered. A journal repeats steps after a rollback; the journal
alone decides which value counts (`Translation`). So all deliverers send the same points from the
same lines. Two concurrent deliverers send identical points, which MLflow's SQL stores keep once:
run, key, step, time and value are their primary key.

The classes in `events.py` declare which fields of an event are metrics or tags. Events are read as
JSON, so events of another version are delivered as far as they are understood.

This module also puts a report, or a checkpoint in the model registry, into MLflow by command.
"""

import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.run_folder import RunFolder
from pipeline.track import events
from pipeline.track.events import KIND, Start, Tag, kind_of, uses
from pipeline.track.journal import Follower, Record, first, number
from pipeline.track.mlflow_store import (
    DIVERGED_TAG,
    KIND_TAG,
    PARENT_OF,
    RUN_TAG,
    SQLITE,
    TrackingError,
    connect,
    experiment_of,
    milliseconds,
    one_at_a_time,
    one_line,
    parent_of,
    set_parent_status,
    suite_of,
    tracking_errors,
)
from pipeline.track.run_state import is_driven
from pipeline.track.system_metrics import Sampler

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

CHECKPOINT_TAG = "spiketrain.checkpoint"  # the URI of a run's newest checkpoint
REPORT = "report.html"  # of a suite
REPORT_DATA = "report.json"  # the content of the report as data, for the dashboard
_BLOCK = 4 << 20  # bytes of journal read at a time


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """Numbers of points (one metric at one step): sent now, and already in MLflow."""

    delivered: int
    already_there: int


def tracking_uri(runs_dir: str | os.PathLike[str]) -> str:
    """The absolute URI of the MLflow store: MLFLOW_TRACKING_URI, or `mlflow.db` in the folder.

    MLflow resolves a relative URI in the working directory, which differs in a Ray worker.
    """
    uri = (
        os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{Path(runs_dir).resolve() / 'mlflow.db'}"
    )
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        uri = f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}"
    return uri


def sync(run_dir: str | os.PathLike[str], *, uri: str) -> SyncReport:
    """Deliver to MLflow the events of this run that MLflow does not have yet.

    Raises:
        TrackingError: no attempt of the run has begun, or MLflow could not be reached or refused.
    """
    delivery = Delivery(Path(run_dir), uri=uri)
    with tracking_errors(uri):
        if not delivery.advance(leaving="unless driven"):
            raise TrackingError(f"{run_dir} has no journal of a run that began; nothing to deliver")
    return SyncReport(
        delivered=delivery.delivered, already_there=delivery.translation.already_there
    )


class Mirror:
    """Delivers a run's journal to MLflow from a daemon thread, until `close`.

    It raises nothing. Failures are retried after growing waits, and `warning` is the newest failure
    in one line (None: none). It waits for a journal that does not exist yet. `interval` is the time
    between readings of the journal and `patience` the longest wait after a failure, in seconds. It
    also samples the machine's load (`system`).
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        uri: str,
        interval: float = 2.0,
        patience: float = 30.0,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.uri = uri
        self.warning: str | None = None
        self._interval = interval
        self._patience = patience
        self._leaving = threading.Event()
        self._delivery: Delivery | None = None
        self._sampler = Sampler(self.run_dir)
        # A daemon thread: a call that waits for a dead server must not keep the driver alive.
        self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 30.0) -> bool:
        """Deliver the rest and stop within `timeout` seconds. Returns whether MLflow then has all.

        If the server is down, it returns False soon. A run without an end in its journal is marked
        KILLED.
        """
        self._sampler.close()
        self._leaving.set()
        self._thread.join(timeout)
        return not self._thread.is_alive() and self.warning is None

    def _follow(self) -> None:
        failures = 0
        while not self._leaving.is_set():
            self._deliver(leaving=False)
            failures = failures + 1 if self.warning else 0
            self._leaving.wait(min(self._interval * 2 ** min(failures, 10), self._patience))
        self._deliver(leaving=True)

    def _deliver(self, *, leaving: bool) -> None:
        """Deliver what is new. `warning` describes a failure."""
        try:
            self._delivery = self._delivery or Delivery(self.run_dir, uri=self.uri)
            self._delivery.advance(leaving=leaving)
            self.warning = None
        except Exception as error:  # of any kind: the run goes on
            self._delivery = None
            self.warning = (
                f"{one_line(self.uri, error)}; the journal keeps everything, `spiketrain sync`"
                " delivers it later"
            )


class Delivery:
    """One connection to MLflow and one reading of the journal. Replace it after an exception.

    `delivered` counts the points sent.
    """

    def __init__(self, run_dir: Path, *, uri: str) -> None:
        self.run_dir = run_dir
        self._files = RunFolder(run_dir)
        self.delivered = 0
        self._uri = uri
        self._journal, self._system = Follower(self._files.journal), Follower(self._files.system)
        # The event up to which the journal must be sent as an artifact, and the last event read.
        self._journal_due = self._newest = ""
        self.translation = Translation()
        self._run_id = ""  # in MLflow; empty until the run is found or created there
        self._parent_knows = ""  # the status of this run that its parent was last set from

    @property
    def run(self) -> "Run":
        """The run in MLflow; after `advance`."""
        return self._client.get_run(self._run_id)

    def advance(self, *, leaving: bool | Literal["unless driven"] = False) -> bool:
        """Deliver the current content of the journal. Returns False if no attempt has begun.

        `leaving`: the run has no driver after this call, so RUNNING becomes KILLED. "unless driven"
        checks for a driver under the lock: one may have begun while another process delivered.
        """
        with one_at_a_time(self.run_dir.parent):
            if not self._run_id and not self._open():
                return False
            status, ended = "", 0
            while new := self._journal.poll(limit_bytes=_BLOCK):
                self._send(new)
                ended = milliseconds(new[-1])
                for event in new:
                    status = kind_of(event).status or status
                    self._newest = f"{event[KIND]} {event.get('time')}"
                    if kind_of(event).sends_journal:
                        self._journal_due = self._newest
            while samples := self._system.poll(limit_bytes=_BLOCK):
                self._send(samples)
            status = status or self._status[0]
            if leaving == "unless driven":
                leaving = not is_driven(self.run_dir)
            if status == "RUNNING" and leaving:
                status = "KILLED"
            self._set_status(status, ended)
            self._send_files(status)
            return True

    def _open(self) -> bool:
        start = first(self._files.journal, Start.kind)
        if start is None:
            return False
        client = connect(self._uri)
        experiment_id = experiment_of(client, start, uri=self._uri, runs_dir=self.run_dir.parent)
        self._parent_id = parent_of(client, experiment_id, start)
        self._suite = suite_of(self.run_dir, start)
        run = self._find_or_create(client, experiment_id, start)
        self._client, self._run_id = client, run.info.run_id
        self._params, self._tags = dict(run.data.params), dict(run.data.tags)
        self._status = (run.info.status, run.info.end_time or 0)  # milliseconds
        # The newest step of each metric: `run.data.metrics` (3.17.2) has values alone.
        self.translation.held = {metric.key: int(metric.step) for metric in run.data._metric_objs}
        return True

    def _find_or_create(self, client: "MlflowClient", experiment_id: str, start: Record) -> "Run":
        uuid = str(start["run_id"])
        runs = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{uuid}'")
        if runs:
            kept, *twins = sorted(run.info.run_id for run in runs)
            for twin in twins:  # a server that hung may have created it late, after a retry
                client.delete_run(twin)
            run = client.get_run(kept)
            if self._parent_id not in (None, run.data.tags.get(PARENT_OF)):
                # The process that created the parent died before it set the tag.
                client.set_tag(kept, PARENT_OF, self._parent_id)
            return run
        tags = {RUN_TAG: uuid, KIND_TAG: "run"}
        if self._parent_id:
            tags[PARENT_OF] = self._parent_id
        return client.create_run(
            experiment_id,
            start_time=milliseconds(start),
            tags=tags,
            run_name=str(start.get("run", self.run_dir.name)),
        )

    def _send(self, new: list[Record]) -> None:
        from mlflow.entities import Param, RunTag

        points = [point for event in new for point in self.translation.points(event)]
        tags: dict[str, str] = {}
        params: dict[str, str] = {}
        for event in new:
            tags.update(self.translation.tags(event))
            if kind_of(event) is Start:  # the first start's values stay
                recipe = event.get("params", {}).items()
                params = {_key(key): str(value)[:6000] for key, value in recipe} | params
        tags = {
            key: value[:5000] for key, value in tags.items() if self._tags.get(key) != value[:5000]
        }
        # MLflow accepts a parameter once; the tags show the values that a restart changed.
        params = {key: value for key, value in params.items() if key not in self._params}
        # One call: the client (3.17.2) splits it to the limits of a request and keeps the order.
        self._client.log_batch(
            self._run_id,
            metrics=points,
            tags=[RunTag(*tag) for tag in tags.items()],
            params=[Param(*param) for param in params.items()],
        )
        self._tags |= tags
        self._params |= params
        self.delivered += len(points)

    def _set_status(self, status: str, ended: int) -> None:
        if status == "RUNNING" and self._status[0] != status:
            self._client.update_run(self._run_id, status=status)
        elif status not in ("", "RUNNING") and (
            status != self._status[0] or ended not in (0, self._status[1])
        ):
            self._client.set_terminated(self._run_id, status=status, end_time=ended or None)
        elif status in ("", self._parent_knows):
            return
        self._status = (status, ended)
        if self._parent_id:
            set_parent_status(self._client, self._parent_id, suite=self._suite)
        self._parent_knows = status

    def _send_files(self, status: str) -> None:
        """Send each file that is due and has changed, then a tag that names its version.

        If a deliverer dies between the two, the next one sends the same file again.
        """
        late = self._files.late_artifacts if status == "FINISHED" else ()
        versions = {
            file: hashlib.sha256(file.read_bytes()).hexdigest()[:16]
            for file in (*self._files.early_artifacts, *late)
            if file.exists()
        }
        versions[self._files.journal] = self._journal_due if status == "RUNNING" else self._newest
        for file, version in versions.items():
            tag = f"spiketrain.artifact.{file.name}"
            if version and self._tags.get(tag) != version:
                self._client.log_artifact(self._run_id, str(file))
                self._client.set_tag(self._run_id, tag, version)
                self._tags[tag] = version


class Translation:
    """Translates one run's events, in the journal's order. The first value of a step counts.

    MLflow accepts no second value of a step. So an evaluation or a fidelity measurement waits for a
    checkpoint at its step or later, or for the run to finish or diverge. Until then the run may
    fail, stop, or find that the ranks' weights differ, go back and measure again. Training metrics
    of batches that are rolled back are sent and stay; a tag names their steps.

    `held` has the newest step of each metric that MLflow had before. `already_there` counts the
    points that were not sent because MLflow had them.
    """

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.already_there = 0
        self._seen: dict[str, int] = {}  # metric -> newest step read from the journal
        self._step = 0  # newest step of any event
        self._waiting: dict[tuple[str, int], Record] = {}  # newest event of each kind and step
        self._counts: Counter[str] = Counter()
        self._rolled_back: list[str] = []
        self._of_ends: set[str] = set()  # tags of ended attempts; the next start empties them

    def points(self, event: Record) -> Iterator["Metric"]:
        """The metrics to send with this event: its own, and those that waited for it."""
        kind = kind_of(event)
        step = event.get("step", self._step)
        if kind is not events.System:  # its steps count samples
            self._step = step
        if kind.measures_weights:
            self._waiting[kind.kind, step] = event
            return
        if kind is events.Start:
            self._waiting = {key: each for key, each in self._waiting.items() if key[1] <= step}
        elif kind.settles_weights:
            for key in sorted(self._waiting, key=lambda key: key[1]):
                if key[1] <= step:
                    yield from self._new(self._waiting.pop(key), key[1])
        yield from self._new(event, step)

    def _new(self, event: Record, step: int) -> Iterator["Metric"]:
        from mlflow.entities import Metric

        points = (
            point
            for metric, value in uses(event, events.Metric)
            for point in _numbers(metric.name, value, without=metric.without)
        )
        for key, value in points:
            if step <= self._seen.get(key, -1):
                continue  # a step that is repeated after a rollback
            self._seen[key] = step
            if step <= self.held.get(key, -1):
                self.already_there += 1
            else:
                yield Metric(key, value, milliseconds(event), step)

    def tags(self, event: Record) -> dict[str, str]:
        """The tags to set with this event."""
        kind = kind_of(event)
        tags = {} if kind.diverged is None else {DIVERGED_TAG: kind.diverged}
        for tag, value in uses(event, Tag):
            tags = _tags(tag, value) | tags  # the recipe's fields are last and replace none
        if kind is events.Start:
            return dict.fromkeys(self._of_ends, "") | tags
        if kind.state is not None:
            self._of_ends |= tags.keys()
        if kind is events.Checkpoint and event.get("path"):
            path = str(event["path"])
            tags[CHECKPOINT_TAG] = path if "://" in path else Path(path).absolute().as_uri()
        if name := kind.count_tag:
            self._counts[name] += event[kind.counted_field] if kind.counted_field else 1
            tags[name] = str(self._counts[name])
        if kind is events.Rollback:
            # The steps of the batches that were rolled back. Their training metrics stay.
            self._rolled_back.append(f"{event['to'] + 1}-{event['step'] + 1}")
            tags["spiketrain.rolled_back"] = ", ".join(self._rolled_back)
        return tags


def _tags(tag: Tag, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {} if value is None else {tag.name: str(value)}
    keys = value if tag.keys is None else [key for key in tag.keys if key in value]
    return {f"{tag.name}.{_key(key)}": str(value[key]) for key in keys}


def _numbers(
    name: str, value: Any, *, without: Collection[str] = ()
) -> Iterator[tuple[str, float]]:
    """Metric names and numbers of a nested value, such as `summary/operations/forward/additions`
    for `operations.forward.additions` of a summary.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in without:
                yield from _numbers(f"{name}/{key}", item)
    elif (converted := number(value)) is not None:
        yield _key(name), converted


def _key(name: str) -> str:
    """A valid name: MLflow accepts letters, digits and `_-. :/`, and 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", str(name))[:250]


def log_report(page: Path, runs: Sequence[Path], *, name: str, data: str, uri: str) -> list[str]:
    """Put an HTML page as the artifact `name` on the parents of these runs. Returns their ids.

    The page replaces an older one. Runs that were launched alone have no parent. If `name` is
    `report.html`, a suite's own report, its `data` (JSON) become `report.json` beside it.

    Raises:
        TrackingError: MLflow could not be reached or refused; one line.
    """
    of_suites = {
        start["study_parent"]: (run, start)
        for run in runs
        if (start := first(RunFolder(run).journal, Start.kind)) and start.get("study_parent")
    }
    parents: list[str] = []
    for run, start in of_suites.values():
        with tracking_errors(uri), one_at_a_time(run.parent):
            client = connect(uri)
            parent = parent_of(
                client, experiment_of(client, start, uri=uri, runs_dir=run.parent), start
            )
            assert parent is not None, "its start names one"
            if name == REPORT:
                client.log_text(parent, data, REPORT_DATA)
            client.log_text(parent, page.read_text(), name)
            set_parent_status(client, parent, suite=suite_of(run, start))  # the parent may be new
        parents.append(parent)
    return parents


def register(
    run_dir: str | os.PathLike[str],
    checkpoint: Path,
    *,
    name: str,
    alias: Literal["last", "best"],
    uri: str,
) -> str:
    """Make a run's checkpoint a version of the registered model `name`, and move the alias to it.

    The events of the run are delivered first. A checkpoint that is already a version stays that
    version. Nothing is uploaded: the version's tag `uri` names the checkpoint, and `pin` protects
    it from pruning.

    Returns:
        The version.

    Raises:
        TrackingError: no attempt of the run has begun, or MLflow could not be reached or refused.
    """
    run_dir = Path(run_dir)
    delivery = Delivery(run_dir, uri=uri)
    with tracking_errors(uri):
        if not delivery.advance(leaving="unless driven"):
            raise TrackingError(
                f"{run_dir} has no journal of a run that began; nothing to register"
            )
        with one_at_a_time(run_dir.parent):
            client, run = connect(uri), delivery.run
            address = checkpoint.resolve().as_uri()
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name)
            versions = client.search_model_versions(f"name = '{name}'")
            version = next((each for each in versions if each.tags.get("uri") == address), None)
            # A server (3.17.2) refuses a local source outside of the run's artifacts.
            source = f"{run.info.artifact_uri}/{checkpoint.name}"
            version = version or client.create_model_version(
                name, source, run.info.run_id, tags={"uri": address}
            )
            client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)
