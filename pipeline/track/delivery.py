"""Delivers one run's journal to MLflow, each (metric, step) once, however often the deliverer dies.

There is no state file. MLflow tells what it holds: the run is searched by its tag `spiketrain.run_id`, and a metric's newest
step marks how far it was delivered, because points are sent in the journal's order. A journal repeats steps after a rollback;
the first value of a step counts. So every deliverer, at any time, sends the same points from the same lines, and two of them
at once send identical points, which MLflow's SQL stores keep once (run, key, step, time and value are its primary key).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.track.base import TrackingError
from pipeline.track.jsonl import Event, Follower, first
from pipeline.track.translate import STATUS, Translation, milliseconds, parameters

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

RUN_TAG = "spiketrain.run_id"
PARENT_TAG = "spiketrain.study_parent"
_PARENT_OF = "mlflow.parentRunId"
_BLOCK = 4 << 20  # bytes of journal read at a time


class Delivery:
    """One connection to MLflow and one reading of the journal. After any exception: throw it away and open another.

    `delivered` counts the points sent, `already_there` those that MLflow held when this delivery opened.
    """

    def __init__(self, run_dir: Path, *, uri: str, experiment: str) -> None:
        self.run_dir = run_dir
        self.delivered = 0
        self._uri = uri
        self._experiment = experiment
        self._follower = Follower(run_dir / "journal.jsonl")
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._parent_id: str | None = None
        self._translation = Translation()
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._status = ("", 0)  # in MLflow, with the end in milliseconds
        self._parent_knows = ""

    @property
    def already_there(self) -> int:
        return self._translation.already_there

    def advance(self, *, leaving: bool = False) -> bool:
        """Deliver what the journal holds by now; False when no attempt of the run has begun.

        `leaving`: nobody drives the run after this, whatever its journal says.
        """
        # Making a schema, an experiment, a run or a tag is no atomic step in MLflow (3.17.2): two at once can both fail.
        with _one_at_a_time(self.run_dir.parent):
            return self._advance(leaving=leaving)

    def _advance(self, *, leaving: bool) -> bool:
        if self._client is None and not self._open():
            return False
        status, ended = "", 0
        while events := self._follower.poll(limit_bytes=_BLOCK):
            points: list[Metric] = []
            tags: dict[str, str] = {}
            params: dict[str, str] = {}
            for event in events:
                points += self._translation.points(event)
                tags.update(self._translation.tags(event))
                params.update(parameters(event))
                status, ended = STATUS.get(event["event"], status), milliseconds(event)
            self._send(points, tags, params)
        status = status or self._status[0]
        if status == "RUNNING" and leaving:
            status = "KILLED"
        self._set_status(status, ended)
        self._send_files()
        return True

    # ------------------------------------------------------------------------------------------------- finding the run

    def _open(self) -> bool:
        start = first(self.run_dir / "journal.jsonl", "start")
        if start is None:
            return False
        client = connect(self._uri)
        experiment_id = self._experiment_id(client, start)
        if start.get("study_parent"):
            self._parent_id = self._parent(client, experiment_id, start)
        run = self._find_or_create(client, experiment_id, start)
        self._client = client
        self._run_id = run.info.run_id
        self._note_for_people(experiment_id)
        self._params, self._tags = dict(run.data.params), dict(run.data.tags)
        self._status = (run.info.status, run.info.end_time or 0)
        # The newest step of each metric. `run.data.metrics` has the values alone (3.17.2), the whole histories may be 100 MB.
        self._translation.held = {metric.key: int(metric.step) for metric in run.data._metric_objs}
        return True

    def _note_for_people(self, experiment_id: str) -> None:
        """Where to look, beside the run; nothing here reads it back."""
        uri = re.sub(r"//[^/@\s]*@", "//", self._uri)
        note = json.dumps({"uri": uri, "experiment_id": experiment_id, "run_id": self._run_id})
        path = self.run_dir / "mlflow.json"
        if not path.exists() or path.read_text() != note:
            part = path.with_suffix(".part")
            part.write_text(note)
            part.replace(path)

    def _experiment_id(self, client: MlflowClient, start: Event) -> str:
        from mlflow.exceptions import MlflowException

        name = f"{self._experiment}/{str(start.get('study', 'unknown'))[:8]}"
        found = client.get_experiment_by_name(name)
        if found is None:
            # A local store would put artifacts under the working directory of the moment; a server knows its own place.
            place = (self.run_dir.parent / "mlartifacts" / name.replace("/", "-")).resolve().as_uri()
            tags = {"spiketrain.study": str(start.get("study", ""))}
            try:
                return client.create_experiment(name, artifact_location=None if _is_server(self._uri) else place, tags=tags)
            except MlflowException:
                found = client.get_experiment_by_name(name)  # somebody else's runs folder, the same store, the same moment
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"MLflow experiment {name!r} was deleted; restore it: mlflow experiments restore {found.experiment_id}"
            )
        return found.experiment_id

    def _parent(self, client: MlflowClient, experiment_id: str, start: Event) -> str:
        """The run that holds the runs of one comparison together."""
        uuid = str(start["study_parent"])
        found = client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{uuid}' and tags.`spiketrain.kind` = 'comparison'")
        if found:
            return found[0].info.run_id
        tags = {PARENT_TAG: uuid, "spiketrain.kind": "comparison", "spiketrain.study": str(start.get("study", ""))}
        name = f"compare {uuid[:8]}"
        return client.create_run(experiment_id, start_time=milliseconds(start), tags=tags, run_name=name).info.run_id

    def _find_or_create(self, client: MlflowClient, experiment_id: str, start: Event) -> Run:
        uuid = str(start["run_id"])
        found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{uuid}'")
        if found:
            kept, *twins = sorted(run.info.run_id for run in found)
            for twin in twins:  # a server that hung may carry out a creation after it was tried again
                client.delete_run(twin)
            return client.get_run(kept)
        tags = {RUN_TAG: uuid, "spiketrain.kind": "run"}
        if self._parent_id:
            tags[_PARENT_OF] = self._parent_id
        name = str(start.get("run", self.run_dir.name))
        return client.create_run(experiment_id, start_time=milliseconds(start), tags=tags, run_name=name)

    # ----------------------------------------------------------------------------------------------------------- sending

    def _send(self, points: list[Metric], tags: dict[str, str], params: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        assert self._client is not None
        new_tags = [RunTag(key, value[:5000]) for key, value in tags.items() if self._tags.get(key) != value[:5000]]
        # A parameter is written once in MLflow; what a restart changed stands in the tags.
        new_params = [Param(key, value) for key, value in params.items() if key not in self._params]
        # One call: the client (3.17.2) cuts it to the limits of a request, and keeps the order.
        self._client.log_batch(self._run_id, metrics=points, tags=new_tags, params=new_params)
        self._tags |= {tag.key: tag.value for tag in new_tags}
        self._params |= {param.key: param.value for param in new_params}
        self.delivered += len(points)

    def _set_status(self, status: str, ended: int) -> None:
        assert self._client is not None
        if status == "RUNNING" and self._status[0] != status:
            self._client.update_run(self._run_id, status=status)
        elif status not in ("", "RUNNING") and (status != self._status[0] or ended not in (0, self._status[1])):
            self._client.set_terminated(self._run_id, status=status, end_time=ended or None)
        elif status in ("", self._parent_knows):
            return
        self._status = (status, ended)
        if self._parent_id:
            self._set_parent_status(self._parent_id)
        self._parent_knows = status

    def _set_parent_status(self, parent_id: str) -> None:
        """RUNNING while one of its runs is; then FINISHED, or FAILED when one of them did not finish."""
        assert self._client is not None
        parent = self._client.get_run(parent_id)
        runs = self._client.search_runs([parent.info.experiment_id], f"tags.`{_PARENT_OF}` = '{parent_id}'")
        states = {run.info.status for run in runs}
        status = "RUNNING" if "RUNNING" in states else "FINISHED" if states == {"FINISHED"} else "FAILED"
        if status == parent.info.status:
            return
        if status == "RUNNING":
            self._client.update_run(parent_id, status=status)
        else:
            self._client.set_terminated(parent_id, status=status)

    def _send_files(self) -> None:
        assert self._client is not None
        for name in ("recipe.json", "summary.json"):
            path = self.run_dir / name
            if not path.exists():
                continue
            tag, digest = f"spiketrain.artifact.{name}", hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            if self._tags.get(tag) != digest:
                self._client.log_artifact(self._run_id, str(path))
                self._client.set_tag(self._run_id, tag, digest)
                self._tags[tag] = digest


def connect(uri: str) -> MlflowClient:
    """A client for this process: it sends no telemetry, logs no chatter, and gives up on a dead server in seconds.

    The first one for an SQLite file makes the schema, which takes seconds.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # 3.17.2 retries 7 times with 120 s each. Here whoever holds the client retries, and can wait as long as it takes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # if somebody imported it before the variables were set
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger(name).level))
    return MlflowClient(tracking_uri=uri)


@contextmanager
def _one_at_a_time(runs_dir: Path) -> Iterator[None]:
    with (runs_dir / ".mlflow.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))
