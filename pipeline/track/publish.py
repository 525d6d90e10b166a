"""What a user puts into MLflow by command: a report, a checkpoint in the model registry."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.core.run_folder import RunFolder
from pipeline.track.connect import TrackingError, connect, tracking_errors
from pipeline.track.delivery import Delivery
from pipeline.track.events import Start
from pipeline.track.hierarchy import (
    experiment_of,
    one_at_a_time,
    parent_of,
    set_parent_status,
    suite_of,
)
from pipeline.track.journal import first

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

REPORT = "report.html"
"""of a suite"""
REPORT_DATA = "report.json"
"""the content of the report as data, for the dashboard"""


def log_report(page: Path, runs: Sequence[Path], *, name: str, told: str, uri: str) -> list[str]:
    """Put an HTML page as the artifact `name` on the parents of these runs in MLflow; their ids.

    It replaces an older one. Runs that were launched alone have no parent. With `report.html`, a
    suite's own, its data `told` (JSON) are put beside it as `report.json`.

    Raises:
        TrackingError: MLflow could not be reached or refused; one line.
    """
    starts = [
        (run, start)
        for run in runs
        if (start := first(RunFolder(run).journal, Start.kind)) is not None
    ]
    of_suites = {
        start["study_parent"]: (run, start) for run, start in starts if start.get("study_parent")
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
                client.log_text(parent, told, REPORT_DATA)
            client.log_text(parent, page.read_text(), name)
            set_parent_status(client, parent, suite=suite_of(run, start))  # it may be a new one
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

    The events of the run are delivered first. A checkpoint that is a version already stays that
    version. Nothing is uploaded: the version's tag `uri` names the checkpoint, and `pin` keeps it
    from being pruned.

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
            return _register(connect(uri), delivery.run, checkpoint, name=name, alias=alias)


def _register(client: MlflowClient, run: Run, checkpoint: Path, *, name: str, alias: str) -> str:
    from mlflow.exceptions import MlflowException

    address = checkpoint.resolve().as_uri()
    try:
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        versions = client.search_model_versions(f"name = '{name}'")
        version = next((each for each in versions if each.tags.get("uri") == address), None)
        if version is None:
            # A server (3.17.2) refuses a local source outside of the run's artifacts.
            source = f"{run.info.artifact_uri}/{checkpoint.name}"
            version = client.create_model_version(
                name, source, run.info.run_id, tags={"uri": address}
            )
        client.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise TrackingError(
            f"register: MLflow refuses the name {name!r}: {error.message}"
        ) from error
    return str(version.version)
