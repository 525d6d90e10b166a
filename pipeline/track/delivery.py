"""Delivers one run's journal to MLflow: each (metric, step) once, however often the process dies.

There is no state file; MLflow itself holds the state. The run is found by its tag
`spiketrain.run_id`. The newest step of a metric says how far it was delivered, because points are
sent in the order of their steps. A journal repeats steps after a rollback; which value counts
follows from the journal alone (translate.py). So all deliverers send the same points from the same
lines. Two at once send identical points, which MLflow's SQL stores keep once: run, key, step, time
and value are their primary key.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.core.run_folder import RunFolder
from pipeline.recipe.json import write_json
from pipeline.track.connect import connect, without_password
from pipeline.track.events import KIND, Start, kind_of
from pipeline.track.hierarchy import (
    KIND_TAG,
    PARENT_OF,
    RUN_TAG,
    experiment_of,
    one_at_a_time,
    parent_of,
    set_parent_status,
    suite_of,
)
from pipeline.track.journal import Follower, Record, first
from pipeline.track.state import is_driven
from pipeline.track.translate import Translation, milliseconds, parameters

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_BLOCK = 4 << 20  # bytes of journal read at a time


def read_note(run_dir: Path) -> Any:
    """Where MLflow has the run, for people; None where the note is missing or damaged."""
    try:
        return json.loads(RunFolder(run_dir).mlflow.read_text())
    except (OSError, ValueError):
        return None


class Delivery:
    """One connection to MLflow and one reading of the journal; to be replaced after an exception.

    `delivered` counts the points sent; `already_there` those that MLflow had before.
    """

    def __init__(self, run_dir: Path, *, uri: str) -> None:
        self.run_dir = run_dir
        self._files = RunFolder(run_dir)
        self.delivered = 0
        self._uri = uri
        self._journal, self._system = Follower(self._files.journal), Follower(self._files.system)
        # The event up to which the journal is due as an artifact, and the last one read.
        self._journal_due = self._newest = ""
        self._translation = Translation()
        self._is_open = False
        self._parent_knows = ""  # the status of this run that its parent's follows from

    @property
    def run(self) -> Run:
        """The run in MLflow; after `advance`."""
        return self._client.get_run(self._run_id)

    @property
    def already_there(self) -> int:
        return self._translation.already_there

    def advance(self, *, leaving: bool | Literal["unless driven"] = False) -> bool:
        """Deliver what is in the journal now; False when no attempt of the run has begun.

        `leaving`: the run has no driver after this, so RUNNING becomes KILLED. With "unless driven"
        a driver is looked for under the lock: one may have begun while another process delivered.
        """
        with one_at_a_time(self.run_dir.parent):
            return self._advance(
                leaving=not is_driven(self.run_dir) if leaving == "unless driven" else leaving
            )

    def _advance(self, *, leaving: bool) -> bool:
        if not self._is_open and not self._open():
            return False
        status, ended = "", 0
        while events := self._journal.poll(limit_bytes=_BLOCK):
            points: list[Metric] = []
            tags: dict[str, str] = {}
            params: dict[str, str] = {}
            for event in events:
                points += self._translation.points(event)
                tags.update(self._translation.tags(event))
                params = {**parameters(event), **params}  # those of the first start stay
                status, ended = kind_of(event).status or status, milliseconds(event)
                self._newest = f"{event[KIND]} {event.get('time')}"
                if kind_of(event).sends_journal:
                    self._journal_due = self._newest
            self._send(points, tags, params)
        while samples := self._system.poll(limit_bytes=_BLOCK):
            self._send(
                [point for each in samples for point in self._translation.points(each)], {}, {}
            )
        status = status or self._status[0]
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
        self._client, self._run_id, self._is_open = client, run.info.run_id, True
        note = {
            "uri": without_password(self._uri),
            "experiment_id": experiment_id,
            "run_id": self._run_id,
        }
        if read_note(self.run_dir) != note:
            write_json(self._files.mlflow, note)
        self._params, self._tags = dict(run.data.params), dict(run.data.tags)
        self._status = (run.info.status, run.info.end_time or 0)  # milliseconds
        # The newest step of each metric: `run.data.metrics` (3.17.2) has values alone.
        self._translation.held = {metric.key: int(metric.step) for metric in run.data._metric_objs}
        return True

    def _find_or_create(self, client: MlflowClient, experiment_id: str, start: Record) -> Run:
        uuid = str(start["run_id"])
        found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{uuid}'")
        if found:
            kept, *twins = sorted(run.info.run_id for run in found)
            for twin in twins:  # a server that hung may have made it late, after a retry
                client.delete_run(twin)
            run = client.get_run(kept)
            if self._parent_id not in (
                None,
                run.data.tags.get(PARENT_OF),
            ):  # the process that made the parent died
                client.set_tag(kept, PARENT_OF, self._parent_id)
            return run
        tags = {RUN_TAG: uuid, KIND_TAG: "run"}
        if self._parent_id:
            tags[PARENT_OF] = self._parent_id
        name = str(start.get("run", self.run_dir.name))
        return client.create_run(
            experiment_id, start_time=milliseconds(start), tags=tags, run_name=name
        )

    def _send(self, points: list[Metric], tags: dict[str, str], params: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        new_tags = [
            RunTag(key, value[:5000])
            for key, value in tags.items()
            if self._tags.get(key) != value[:5000]
        ]
        # MLflow takes a parameter once; what a restart changed is in the tags.
        new_params = [Param(key, value) for key, value in params.items() if key not in self._params]
        # One call: the client (3.17.2) cuts it to the limits of a request, and keeps the order.
        self._client.log_batch(self._run_id, metrics=points, tags=new_tags, params=new_params)
        self._tags |= {tag.key: tag.value for tag in new_tags}
        self._params |= {param.key: param.value for param in new_params}
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
        """Send each file that is due and has changed, and behind it a tag that names its version.

        A deliverer that dies between the two has sent the file twice at worst, over itself.
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
