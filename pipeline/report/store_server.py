"""An MLflow server, asked through MLflow's client."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.report.store import (
    ArtifactError,
    Point,
    StoredRun,
    StoreError,
    Told,
    journal_at,
    refuse_unknown_artifact,
)
from pipeline.track.connect import connect, reason, without_password
from pipeline.track.files import JOURNAL
from pipeline.track.hierarchy import KIND_TAG, PARENT_OF
from pipeline.track.publish import REPORT, REPORT_DATA

if TYPE_CHECKING:
    from mlflow.entities import Run

TIMEOUT_S = "5"
_PAGE = 1000
_OF_SUITES = (REPORT, REPORT_DATA)
"""artifacts of a run that may have been deleted, for its id is from the tags of others; a search
finds no deleted run
"""
Item = TypeVar("Item")


class ServerStore:
    """See `Store`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        os.environ.setdefault(
            "MLFLOW_HTTP_REQUEST_TIMEOUT", TIMEOUT_S
        )  # `connect` has it not retry

    def listed(self) -> list[StoredRun]:
        return self._search(f"tags.`{KIND_TAG}` = 'run'", metrics=False)

    def runs(self, study: str) -> list[StoredRun]:
        quoted = study.replace("'", "")
        found = self._search(
            f"tags.`{KIND_TAG}` = 'run' and tags.`spiketrain.study` = '{quoted}'", metrics=True
        )
        return sorted(found, key=lambda run: run.started, reverse=True)

    def history(self, run_id: str, metric: str, *, since: int = -1) -> list[Point]:
        with self._told():
            found = connect(self.uri).get_metric_history(run_id, metric)
        points = [
            Point(point.step, point.timestamp / 1000, point.value)
            for point in found
            if point.step > since
        ]
        return sorted(points, key=lambda point: point.step)

    def text(self, run_id: str, name: str) -> str | None:
        refuse_unknown_artifact(name)
        return self._read(run_id, name, lambda path: path.read_text(errors="replace"))

    def journal(self, run_id: str) -> Told:
        return self._read(run_id, JOURNAL, journal_at) or Told()

    def _read(self, run_id: str, name: str, read: Callable[[Path], Item]) -> Item | None:
        """What `read` makes of the file of an artifact; None where there is none."""
        with self._told():
            client = connect(self.uri)
        try:
            with tempfile.TemporaryDirectory() as folder:
                if name in _OF_SUITES and client.get_run(run_id).info.lifecycle_stage != "active":
                    return None  # MLflow hands out its artifacts all the same
                if name not in {file.path for file in client.list_artifacts(run_id)}:
                    return None
                return read(Path(client.download_artifacts(run_id, name, folder)))
        except (
            Exception
        ) as error:  # whatever MLflow, its transport or the place of its artifacts may raise
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return None
            with self._told():
                client.get_run(run_id)  # a store that does not answer is in trouble as a whole
            raise ArtifactError(
                f"store {without_password(self.uri)}: {name} of run {run_id} cannot be read"
                f" ({reason(self.uri, error)}); look at it by hand"
            ) from error

    def _search(self, text: str, *, metrics: bool) -> list[StoredRun]:
        with self._told():
            client = connect(self.uri)
            experiments = dict(
                _all(
                    lambda page: client.search_experiments(max_results=_PAGE, page_token=page),
                    _id_and_name,
                )
            )
            if not experiments:
                return []
            runs = _all(
                lambda page: client.search_runs(
                    [*experiments], text, max_results=_PAGE, page_token=page
                ),
                lambda run: run,
            )
            return [_run(run, experiments[run.info.experiment_id], metrics=metrics) for run in runs]

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever MLflow or its transport may raise
            raise StoreError(
                f"store {without_password(self.uri)} does not answer as an MLflow server"
                f" ({reason(self.uri, error)}); is it up, and is MLFLOW_TRACKING_URI right?"
            ) from error


def _all(ask: Callable[[str | None], Any], take: Callable[[Any], Item]) -> Iterator[Item]:
    """Page after page."""
    page = ask(None)
    while True:
        yield from map(take, page)
        if not page.token:
            return
        page = ask(page.token)


def _id_and_name(experiment: Any) -> tuple[str, str]:
    return experiment.experiment_id, experiment.name


def _run(run: Run, experiment: str, *, metrics: bool) -> StoredRun:
    tags = run.data.tags
    times = [
        metric.timestamp for metric in run.data._metric_objs
    ]  # `run.data.metrics` has the values alone (3.17.2)
    return StoredRun(
        id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        experiment=experiment,
        state=run.info.status,
        started=(run.info.start_time or 0) / 1000,
        newest=max(run.info.end_time or 0, run.info.start_time or 0, *times) / 1000,
        tags=dict(tags),
        metrics=dict(run.data.metrics) if metrics else {},
        parent=tags.get(PARENT_OF),
        **{name: tags.get(f"spiketrain.{name}", "") for name in ("study", "rule", "seed")},
    )
