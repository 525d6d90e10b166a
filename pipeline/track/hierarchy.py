"""Where a run stands in MLflow: in the experiment of its family, beneath the suite that it was launched with.

    experiment   the family, such as fashion: MLflow shows runs beneath their parent within one experiment alone
      parent     one launch of several recipes; its status follows theirs, and the suite's report is its artifact
        child    one training run

Making an experiment or a run is no atomic step in MLflow (3.17.2): two at once can both fail, or both make one. So whoever
calls this holds `one_at_a_time` of the folder of runs.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.disk import is_name
from pipeline.suite import is_suite, runs_of, sources_in
from pipeline.track.base import TrackingError
from pipeline.track.connect import is_server, sqlite_file
from pipeline.track.jsonl import Event
from pipeline.track.state import is_driven
from pipeline.track.translate import milliseconds

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_TAG = "spiketrain.run_id"
PARENT_TAG = "spiketrain.study_parent"
KIND_TAG = "spiketrain.kind"
PARENT_OF = "mlflow.parentRunId"
PATIENCE_S = 120.0
"""for somebody else's delivery, which takes seconds; a suite that ends must not keep its machines for one that was stopped"""


def experiment_of(client: MlflowClient, start: Event, *, uri: str, runs_dir: Path) -> str:
    """The id of the experiment that a run belongs to, which is made if need be."""
    from mlflow.exceptions import MlflowException

    name = str(start.get("family") or start.get("recipe") or "spiketrain")
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=_artifacts(uri, runs_dir, name))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # somebody else's folder of runs, the same store, the same moment
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment {name!r} was deleted; restore it: mlflow experiments restore {found.experiment_id}"
        )
    return found.experiment_id


def _artifacts(uri: str, runs_dir: Path, name: str) -> str | None:
    """Beside a local store, which itself would put them under the working directory of the moment; a server knows its place."""
    if is_server(uri):
        return None
    file, folder = sqlite_file(uri), name.replace("/", "-")
    if not is_name(folder):
        raise TrackingError(f"{runs_dir}: the family of a run becomes a folder's name and must be one; got {name!r}")
    return ((runs_dir if file is None else file.parent).resolve() / "mlartifacts" / folder).as_uri()


def parent_of(client: MlflowClient, experiment_id: str, start: Event) -> str | None:
    """The id of the run that stands for the suite which a run was launched with; it is made if need be.

    Where somebody has deleted it, another is made, and takes the runs of the suite that MLflow has.
    """
    uuid = start.get("study_parent")
    if not uuid:
        return None
    of_suite = f"tags.`{PARENT_TAG}` = '{uuid}' and tags.`{KIND_TAG}` = "
    if found := client.search_runs([experiment_id], f"{of_suite}'suite'"):
        return found[0].info.run_id
    tags = {PARENT_TAG: str(uuid), KIND_TAG: "suite"}
    name = str(start.get("suite") or f"suite {str(uuid)[:8]}")
    made = client.create_run(experiment_id, start_time=milliseconds(start), tags=tags, run_name=name).info.run_id
    for run in client.search_runs([experiment_id], f"{of_suite}'run'"):
        client.set_tag(run.info.run_id, PARENT_OF, made)
    return made


def suite_of(run_dir: Path, start: Event) -> Path | None:
    """The folder of the suite that a run was launched with.

    Raises:
        TrackingError: it would not lie beside the run's; the journal may be from elsewhere.
    """
    name = start.get("suite")
    if not name:
        return None
    if not is_name(str(name)):
        raise TrackingError(f"{run_dir}: its suite must be the name of a folder beside it; the journal says {name!r}")
    return run_dir.parent / str(name)


def set_parent_status(client: MlflowClient, parent_id: str, *, suite: Path | None) -> None:
    """What its runs say; `suite` is its folder, which knows how many there will be."""
    parent = client.get_run(parent_id)
    runs = client.search_runs([parent.info.experiment_id], f"tags.`{PARENT_OF}` = '{parent_id}'")
    needed: set[str] = set()
    if suite is not None and is_suite(suite):
        folders = runs_of(suite)
        needed = {folders[name].name for name in sources_in(suite)}
    status = _status_of_all([_status_in_suite(run, is_needed=run.info.run_name in needed) for run in runs], suite)
    if status == parent.info.status:
        return
    if status == "RUNNING":
        client.update_run(parent_id, status=status)
    else:
        client.set_terminated(parent_id, status=status)


def _status_in_suite(run: Run, *, is_needed: bool) -> str:
    """What diverged has failed by itself; beside others it is an answer, unless they take its weights."""
    is_answer = not is_needed and run.data.tags.get("spiketrain.diverged") == "true"
    return "FINISHED" if is_answer and run.info.status == "FAILED" else run.info.status


def _status_of_all(states: Collection[str], suite: Path | None) -> str:
    for status in ("RUNNING", "FAILED", "KILLED"):
        if status in states:
            return status
    if suite is None or not is_suite(suite) or len(states) >= len(runs_of(suite)):
        return "FINISHED"
    return "RUNNING" if is_driven(suite) else "KILLED"


@contextmanager
def one_at_a_time(runs_dir: Path) -> Iterator[None]:
    """Hold the lock of all deliveries from this folder of runs.

    Raises:
        TrackingError: another process still holds it after two minutes.
    """
    path, deadline = runs_dir / ".mlflow.lock", time.monotonic() + PATIENCE_S
    with path.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TrackingError(
                        f"{path}: another process still delivers to MLflow after {PATIENCE_S:.0f} s; see who it is"
                    ) from None
            time.sleep(0.1)
        yield
