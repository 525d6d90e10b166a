"""Delivers the events of a journal to MLflow, in a thread of the driver or by `spiketrain sync`.

The workers do not call MLflow. So a server that does not answer cannot slow them. The server gets
the missed events later. Each point (one metric at one step) is sent once, even if the delivering
process dies.

MLflow itself holds the state of the delivery. The run in MLflow has the tag `spiketrain.run_id`.
Points are sent in the order of their steps, so the newest step of a metric in MLflow shows which
points were sent. A journal repeats steps after a rollback. Only the journal decides which value of
a step counts (`Translation`), so all processes send the same points for the same lines. If two
processes send a point at the same time, MLflow's SQL stores keep it once: run, key, step, time and
value are the primary key.

The classes in `events.py` declare which fields of an event are metrics or tags. Events are read as
JSON. Of an event of another version, the known fields are delivered.

By command, this module also adds a report to MLflow, or a checkpoint to its model registry.
"""

import hashlib
import os
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.run_folder import RunFolder
from pipeline.track import events
from pipeline.track.events import KIND, Start, System, Tag, kind_of, uses
from pipeline.track.journal import Follower, Journal, Record, first, last_event, number
from pipeline.track.mlflow_store import (
    DIVERGED_TAG,
    KIND_TAG,
    NOTE_TAG,
    PARENT_OF,
    RESUME,
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

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

CHECKPOINT_TAG = "spiketrain.checkpoint"  # the URI of a run's newest checkpoint
REPORT = "report.html"  # a suite's own report
REPORT_DATA = "report.json"  # the content of the report as data, for the dashboard
INTERVAL_S = 10.0  # between two samples of the load
_BLOCK_BYTES = 4 << 20  # the part of a journal that is read at a time


def tracking_uri(runs_dir: str | os.PathLike[str]) -> str:
    """The absolute URI of the MLflow store: MLFLOW_TRACKING_URI, or else `mlflow.db` in `runs_dir`.

    MLflow resolves a relative URI in the working directory. A Ray worker has another working
    directory.
    """
    uri = (
        os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{Path(runs_dir).resolve() / 'mlflow.db'}"
    )
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        uri = f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}"
    return uri


def sync(run_dir: str | os.PathLike[str], *, uri: str) -> "Delivery":
    """Deliver the events of this run that MLflow does not have yet.

    Returns: the delivery. Its `delivered` is the number of points that were sent, and its
    `translation.already_there` the number of points that MLflow had.

    Raises:
        TrackingError: no attempt of the run has begun, or MLflow cannot be used.
    """
    delivery = Delivery(Path(run_dir), uri=uri)
    with tracking_errors(uri):
        if not delivery.advance(leaving="unless driven"):
            raise TrackingError(f"{run_dir}: must have a start event to be delivered; has none")
    return delivery


class Mirror:
    """Delivers a run's journal to MLflow from a daemon thread, until `close`. A second thread
    samples the machine's load (`sample_load`).

    The first thread waits for a journal that does not exist yet. A failed delivery raises no error
    and is repeated. `warning` describes the failure in one line, and is None after a success.

    Args:
        interval_s: seconds between two deliveries. After each failure in a row, the interval is
            twice as long as before.
        max_interval_s: the longest interval in seconds.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        uri: str,
        interval_s: float = 2.0,
        max_interval_s: float = 30.0,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.uri = uri
        self.warning: str | None = None
        self._interval_s = interval_s
        self._max_interval_s = max_interval_s
        self._closing = threading.Event()
        self._delivery: Delivery | None = None
        # Daemon threads: a call that waits for a dead server must not keep the driver alive.
        self._sampler = threading.Thread(
            target=sample_load,
            args=(RunFolder(run_dir).system, self._closing),
            name="system-metrics",
            daemon=True,
        )
        self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)
        self._sampler.start()
        self._thread.start()

    def close(self, timeout: float = 30.0) -> bool:
        """Deliver the remaining events and stop within `timeout` seconds. Returns whether MLflow
        has all events.

        If the journal does not say how the run ended, the run's status in MLflow is KILLED.
        """
        self._closing.set()
        self._thread.join(timeout)
        return not self._thread.is_alive() and self.warning is None

    def _follow(self) -> None:
        failures = 0
        while not self._closing.is_set():
            self._deliver(leaving=False)
            failures = failures + 1 if self.warning else 0
            self._closing.wait(min(self._interval_s * 2 ** min(failures, 10), self._max_interval_s))
        self._sampler.join(1.0)  # the last sample is delivered, too
        self._deliver(leaving=True)

    def _deliver(self, *, leaving: bool) -> None:
        try:
            self._delivery = self._delivery or Delivery(self.run_dir, uri=self.uri)
            self._delivery.advance(leaving=leaving)
            self.warning = None
        except Exception as error:  # no error of MLflow may end the run
            self._delivery = None
            self.warning = (
                f"{one_line(self.uri, error)}; the journal keeps all events, and `spiketrain sync`"
                " delivers them later"
            )


def sample_load(file: Path, closing: threading.Event) -> None:
    """Sample the system metrics of the driver's machine with MLflow's monitors, and append the
    samples to `file`, until `closing` is set. An error ends the sampling with a warning.

    The metrics include all processes and all GPUs of the machine. The workers measure what the run
    itself uses (`pipeline.measure`).

    MLflow's monitors are called here, without MLflow's monitoring thread (3.17.2). That thread
    writes to the MLflow store, reads its step count from there, and ends at the first failed
    request. Here, samples are appended to `RUN/system.jsonl`, and delivered like other events with
    the time of the sample. After a resume, the step count continues from the file.

    The environment variables are those of MLflow: MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false
    disables the sampling, and MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL is the interval in seconds.
    Only the driver that holds `driver.lock` may sample the run.
    """
    enabled = os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower()
    if enabled in ("false", "0"):
        return
    try:
        given_s = os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or INTERVAL_S
        interval_s = max(0.1, float(given_s))
        if closing.wait(interval_s):  # a short run does not import MLflow
            return
        import psutil
        from mlflow.system_metrics.metrics import (
            cpu_monitor,
            disk_monitor,
            gpu_monitor,
            network_monitor,
        )

        # The first call returns 0. A later call returns the mean since the previous call.
        psutil.cpu_percent()
        monitors: list[Any] = [
            cpu_monitor.CPUMonitor(),
            disk_monitor.DiskMonitor(),
            network_monitor.NetworkMonitor(),
        ]
        with suppress(RuntimeError):  # there is no GPU
            monitors.append(gpu_monitor.GPUMonitor())
        newest = last_event(file, System)
        with Journal(file, attempt=0) as samples:
            for step in count(0 if newest is None else newest.step + 1):
                if closing.wait(interval_s):
                    return
                metrics: dict[str, float] = {}
                for monitor in monitors:
                    monitor.collect_metrics()
                    metrics |= monitor.aggregate_metrics() or {}
                    monitor.clear_metrics()
                samples.write(System(step=step, metrics=metrics))
    except Exception as error:  # such as a full disk, or a failed GPU driver
        warnings.warn(
            f"system metrics are no longer sampled: {type(error).__name__}: {error}",
            stacklevel=1,
        )


class Delivery:
    """Delivers one run over one connection to MLflow. After an exception, create a new `Delivery`.

    `delivered` is the number of points that were sent. `client` and `run_id`, the run's id in
    MLflow, are set by an `advance` that returned True.
    """

    def __init__(self, run_dir: Path, *, uri: str) -> None:
        self.run_dir = run_dir
        self._files = RunFolder(run_dir)
        self.delivered = 0
        self._uri = uri
        self._journal, self._system = Follower(self._files.journal), Follower(self._files.system)
        # The newest event that has `sends_journal`, and the newest event of any kind.
        self._journal_due = self._newest = ""
        self.translation = Translation()
        self.run_id = ""
        self._status_in_parent = ""  # the run's status when the parent's status was last set

    def advance(self, *, leaving: bool | Literal["unless driven"] = False) -> bool:
        """Deliver the events that the journal has now. Returns False if no attempt has begun.

        Args:
            leaving: whether the run has no driver after this call; RUNNING then becomes KILLED.
                "unless driven" looks for a driver while the delivery lock is held, because a driver
                may have started while this call waited for the lock.
        """
        with one_at_a_time(self.run_dir.parent):
            if not self.run_id and not self._open():
                return False
            status, end_time = "", 0
            while new := self._journal.poll(limit_bytes=_BLOCK_BYTES):
                self._send(new)
                end_time = milliseconds(new[-1])
                for event in new:
                    status = kind_of(event).status or status
                    self._newest = f"{event[KIND]} {event.get('time')}"
                    if kind_of(event).sends_journal:
                        self._journal_due = self._newest
            while samples := self._system.poll(limit_bytes=_BLOCK_BYTES):
                self._send(samples)
            status = status or self._status[0]
            if leaving == "unless driven":
                leaving = not is_driven(self.run_dir)
            if status == "RUNNING" and leaving:
                status = "KILLED"
            self._set_status(status, end_time)
            self._send_files(status)
            return True

    def _open(self) -> bool:
        """Find the run in MLflow, or create it. Returns False if no attempt has begun."""
        start = first(self._files.journal, Start.kind)
        if start is None:
            return False
        self.client = connect(self._uri)
        experiment_id = experiment_of(
            self.client, start, uri=self._uri, runs_dir=self.run_dir.parent
        )
        self._suite = suite_of(self.run_dir, start)
        self._parent_id = parent_of(self.client, experiment_id, start, suite=self._suite)
        run = self._find_or_create(experiment_id, start)
        self._params, self._tags = dict(run.data.params), dict(run.data.tags)
        self._status = (run.info.status, run.info.end_time or 0)  # milliseconds
        # `run.data.metrics` (3.17.2) has no steps.
        self.translation.held = {metric.key: int(metric.step) for metric in run.data._metric_objs}
        self.run_id = run.info.run_id
        return True

    def _find_or_create(self, experiment_id: str, start: Record) -> "Run":
        uuid = str(start["run_id"])
        runs = self.client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{uuid}'")
        if runs:
            run_id, *duplicates = sorted(run.info.run_id for run in runs)
            for duplicate in duplicates:  # a server that hung may create a run at each try
                self.client.delete_run(duplicate)
            run = self.client.get_run(run_id)
            if self._parent_id not in (None, run.data.tags.get(PARENT_OF)):
                # The process that created the parent died before it set the tag.
                self.client.set_tag(run_id, PARENT_OF, self._parent_id)
            return run
        tags = {
            RUN_TAG: uuid,
            KIND_TAG: "run",
            NOTE_TAG: f"{RESUME}`{start.get('resume_command', '')}`",
        }
        if self._parent_id:
            tags[PARENT_OF] = self._parent_id
        return self.client.create_run(
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
            if kind_of(event) is Start:  # later starts do not change the values of the first one
                recipe = event.get("params", {}).items()
                params = {_key(key): str(value)[:6000] for key, value in recipe} | params
        tags = {
            key: value[:5000] for key, value in tags.items() if self._tags.get(key) != value[:5000]
        }
        # MLflow cannot change a parameter. The tags show values that a restart changed.
        params = {key: value for key, value in params.items() if key not in self._params}
        # In one call: the client (3.17.2) splits it into requests and keeps the order.
        self.client.log_batch(
            self.run_id,
            metrics=points,
            tags=[RunTag(*tag) for tag in tags.items()],
            params=[Param(*param) for param in params.items()],
        )
        self._tags |= tags
        self._params |= params
        self.delivered += len(points)

    def _set_status(self, status: str, end_time: int) -> None:
        """Set the run's status and end time in MLflow if they changed, and its parent's status.

        If no new event has a status, `status` is the status in MLflow. `end_time` is 0 if there are
        no new events.
        """
        if status == "RUNNING" and self._status[0] != status:
            self.client.update_run(self.run_id, status=status)
        elif status not in ("", "RUNNING") and (
            status != self._status[0] or end_time not in (0, self._status[1])
        ):
            self.client.set_terminated(self.run_id, status=status, end_time=end_time or None)
        elif status in ("", self._status_in_parent):
            return
        self._status = (status, end_time)
        if self._parent_id:
            set_parent_status(self.client, self._parent_id, suite=self._suite)
        self._status_in_parent = status

    def _send_files(self, status: str) -> None:
        """Send each file that has changed, then a tag that names its version.

        If the process dies between the two, the next delivery sends the file again.
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
                self.client.log_artifact(self.run_id, str(file))
                self.client.set_tag(self.run_id, tag, version)
                self._tags[tag] = version


class Translation:
    """Translates one run's events, in the journal's order, to metrics and tags of MLflow.

    A value cannot be replaced in MLflow. So only the first value of a metric at one step is sent.
    An evaluation or a fidelity measurement may be repeated, because the run may return to an
    earlier step: it may fail or stop, or its ranks may have different weights. So the measurement
    waits until a checkpoint of its step or a later one is complete, or the run has finished or
    diverged. A repeated measurement replaces the one that waits. Training metrics of batches that
    were rolled back are sent at once and stay; a tag names the steps.

    `held` has the newest step of each metric in MLflow at the beginning. `already_there` is the
    number of points that were not sent because MLflow had them.
    """

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.already_there = 0
        self._newest_steps: dict[str, int] = {}  # by metric, in the journal
        self._step = 0  # of the newest event
        self._waiting: dict[tuple[str, int], Record] = {}  # newest measurement by kind and step
        self._counts: Counter[str] = Counter()
        self._rolled_back: list[str] = []
        self._end_tags: set[str] = set()  # tags of ends of attempts; the next start clears them

    def points(self, event: Record) -> Iterator["Metric"]:
        """The metrics to send with this event: its own, and those that have waited for it."""
        kind = kind_of(event)
        step = event.get("step", self._step)
        if kind is not events.System:  # the steps of System events are numbers of samples
            self._step = step
        if kind.measures_weights:
            self._waiting[kind.kind, step] = event
            return
        if kind is events.Start:
            self._waiting = {key: value for key, value in self._waiting.items() if key[1] <= step}
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
            if step <= self._newest_steps.get(key, -1):
                continue  # a step that is repeated after a rollback
            self._newest_steps[key] = step
            if step <= self.held.get(key, -1):
                self.already_there += 1
            else:
                yield Metric(key, value, milliseconds(event), step)

    def tags(self, event: Record) -> dict[str, str]:
        """The tags to set with this event."""
        kind = kind_of(event)
        tags = {} if kind.diverged is None else {DIVERGED_TAG: kind.diverged}
        for tag, value in uses(event, Tag):
            tags = _tags(tag, value) | tags  # the recipe's fields come last and replace no tag
        if kind is events.Start:
            return dict.fromkeys(self._end_tags, "") | tags
        if kind.state is not None:
            self._end_tags |= tags.keys()
        if kind is events.Checkpoint and event.get("path"):
            path = str(event["path"])
            tags[CHECKPOINT_TAG] = path if "://" in path else Path(path).absolute().as_uri()
        if name := kind.count_tag:
            self._counts[name] += event[kind.counted_field] if kind.counted_field else 1
            tags[name] = str(self._counts[name])
        if kind is events.Rollback:
            # Metrics of a batch have the number of batches done as their step.
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
    """The numbers in a nested value, each with its metric name, such as
    `summary/operations/forward/additions` for `operations.forward.additions` of a summary.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in without:
                yield from _numbers(f"{name}/{key}", item)
    elif (converted := number(value)) is not None:
        yield _key(name), converted


def _key(name: str) -> str:
    """A valid name. MLflow accepts letters, digits and `_-. :/`, and at most 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", str(name))[:250]


def log_report(
    page: Path,
    runs: Sequence[Path],
    *,
    name: str,
    data: str,
    note: str,
    metrics: Mapping[str, float],
    uri: str,
) -> list[str]:
    """Log an HTML page as the artifact `name` of the parents of these runs. Returns the ids of the
    parents.

    The page replaces an older page of this name. Runs that were launched alone have no parent.

    Args:
        data: the content of the page as JSON. If `name` is `report.html`, a suite's own report,
            the data is logged as `report.json`, and `note` and `metrics` are logged, too.
        note: the description in Markdown.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    run_by_parent = {
        start["study_parent"]: (run, start)
        for run in runs
        if (start := first(RunFolder(run).journal, Start.kind)) and start.get("study_parent")
    }
    parents: list[str] = []
    for run, start in run_by_parent.values():
        with tracking_errors(uri), one_at_a_time(run.parent):
            client = connect(uri)
            suite = suite_of(run, start)
            experiment_id = experiment_of(client, start, uri=uri, runs_dir=run.parent)
            parent = parent_of(client, experiment_id, start, suite=suite)
            assert parent is not None, "the start event names a parent"
            if name == REPORT:
                client.log_text(parent, data, REPORT_DATA)
                _describe_parent(client, parent, note, metrics)
            client.log_text(parent, page.read_text(), name)
            set_parent_status(client, parent, suite=suite)  # the parent may be new
        parents.append(parent)
    return parents


def _describe_parent(
    client: "MlflowClient", parent_id: str, note: str, metrics: Mapping[str, float]
) -> None:
    """Set the description and the metrics of a parent. Equal metrics are not sent again.

    A description that does not end with the resume command is the user's, and is kept.
    """
    from mlflow.entities import Metric

    parent, now = client.get_run(parent_id), int(time.time() * 1000)
    resume = parent.data.tags.get(NOTE_TAG, "").rpartition("\n")[2]
    if resume.startswith(RESUME):
        client.set_tag(parent_id, NOTE_TAG, f"{note[:4500]}\n\n{resume}")
    points = [
        Metric(_key(name), value, now, 0)
        for name, value in metrics.items()
        if parent.data.metrics.get(_key(name)) != value
    ]
    client.log_batch(parent_id, metrics=points)


def register(
    run_dir: str | os.PathLike[str],
    checkpoint: Path,
    *,
    name: str,
    alias: Literal["last", "best"],
    uri: str,
) -> str:
    """Make a run's checkpoint a version of the registered model `name`, and move the alias to this
    version. Returns the version.

    The events of the run are delivered first. If the checkpoint is already a version, no new
    version is created. The checkpoint is not uploaded: the version's tag `uri` is its address. The
    caller must `pin` the checkpoint, so that it is not pruned.

    Raises:
        TrackingError: no attempt of the run has begun, or MLflow cannot be used.
    """
    delivery = sync(run_dir, uri=uri)
    with tracking_errors(uri), one_at_a_time(Path(run_dir).parent):
        client, run = delivery.client, delivery.client.get_run(delivery.run_id)
        address = checkpoint.resolve().as_uri()
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        versions = client.search_model_versions(f"name = '{name}'")
        version = next((v for v in versions if v.tags.get("uri") == address), None)
        version = version or client.create_model_version(
            name,
            # A server (3.17.2) accepts a local source only inside the run's artifacts.
            f"{run.info.artifact_uri}/{checkpoint.name}",
            run.info.run_id,
            tags={"uri": address},
        )
        client.set_registered_model_alias(name, alias, version.version)
    return str(version.version)
