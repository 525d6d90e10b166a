"""MLflow as a mirror of the journal, kept up to date by a thread of the driver or by `sync`.

The training processes never talk to MLflow. A server that is down does not slow them, and receives
the missed events when it is back.

This module also puts a report, or a checkpoint in the model registry, into MLflow by command.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.core.run_folder import RunFolder
from pipeline.track.connect import (
    SQLITE,
    TrackingError,
    connect,
    experiment_of,
    one_at_a_time,
    one_line,
    parent_of,
    set_parent_status,
    suite_of,
    tracking_errors,
)
from pipeline.track.events import Start
from pipeline.track.journal import first
from pipeline.track.mlflow_delivery import Delivery
from pipeline.track.system import Sampler

__all__ = ["Mirror", "SyncReport", "TrackingError", "sync", "tracking_uri"]

_LATER = "the journal keeps everything, `spiketrain sync` delivers it later"


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
    return SyncReport(delivered=delivery.delivered, already_there=delivery.already_there)


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
        self._whole = False
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
        return not self._thread.is_alive() and self._whole

    def _follow(self) -> None:
        delivery: Delivery | None = None
        failures = last_tries = 0
        while True:
            leaving = self._leaving.is_set()
            try:
                delivery = delivery or Delivery(self.run_dir, uri=self.uri)
                delivery.advance(leaving=leaving)
            except Exception as error:  # of any kind: the run goes on
                delivery = None
                failures += 1
                self.warning = f"{one_line(self.uri, error)}; {_LATER}"
            else:
                failures = 0
                self.warning = None
            if not leaving:
                self._leaving.wait(
                    min(self._interval * 2 ** min(failures, 10), self._patience)
                    if failures
                    else self._interval
                )
                continue
            last_tries += 1
            if failures == 0 or last_tries == 2:
                self._whole = failures == 0
                return
            time.sleep(0.3)  # another driver may have held the SQLite file


if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

REPORT = "report.html"  # of a suite
REPORT_DATA = "report.json"  # the content of the report as data, for the dashboard


def log_report(page: Path, runs: Sequence[Path], *, name: str, data: str, uri: str) -> list[str]:
    """Put an HTML page as the artifact `name` on the parents of these runs. Returns their ids.

    The page replaces an older one. Runs that were launched alone have no parent. If `name` is
    `report.html`, a suite's own report, its `data` (JSON) become `report.json` beside it.

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
