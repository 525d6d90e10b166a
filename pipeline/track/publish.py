"""What somebody puts into MLflow by hand: a report, a checkpoint in the model registry."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pipeline.track.base import TrackingError
from pipeline.track.connect import connect, one_line
from pipeline.track.delivery import Delivery
from pipeline.track.hierarchy import experiment_of, one_at_a_time, parent_of, set_parent_status, suite_of
from pipeline.track.jsonl import first
from pipeline.track.models import KeptOf, Registered, inside, register_checkpoint

__all__ = ["REPORT", "REPORT_DATA", "Registered", "log_report", "register"]

REPORT = "report.html"
"""of a suite"""
REPORT_DATA = "report.json"
"""what is told on it, for whoever shows it elsewhere"""


def log_report(page: Path, runs: Sequence[Path], *, name: str, told: str, uri: str) -> list[str]:
    """Put an HTML page, over an older one, as the artifact `name` on the runs in MLflow that these were launched with; their ids.

    One for each suite; none where all were launched by themselves. Where it is `report.html`, a suite's own, `told` of it in JSON
    goes beside it as `report.json`.

    Raises:
        TrackingError: MLflow could not be reached or refused; one line.
    """
    starts = [(run, start) for run in runs if (start := first(run / "journal.jsonl", "start")) is not None]
    of_suites = {start["study_parent"]: (run, start) for run, start in starts if start.get("study_parent")}
    parents: list[str] = []
    for run, start in of_suites.values():
        with _told_in_a_line(uri), one_at_a_time(run.parent):
            client = connect(uri)
            parent = parent_of(client, experiment_of(client, start, uri=uri, runs_dir=run.parent), start)
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
    kept_of: KeptOf = inside,
) -> Registered:
    """Make a run's checkpoint a version of the registered model `name`, and its alias; what the run has is delivered first.

    A checkpoint that is a version of that model already becomes none again. It stays where it is; `pin` keeps it
    from being pruned by a resume.

    Raises:
        TrackingError: no attempt of the run has begun, or MLflow could not be reached or refused; one line.
    """
    run_dir = Path(run_dir)
    delivery = Delivery(run_dir, uri=uri, kept_of=kept_of)
    with _told_in_a_line(uri):
        if not delivery.advance(leaving="unless driven"):
            raise TrackingError(f"{run_dir} has no journal of a run that began; nothing to register")
        with one_at_a_time(run_dir.parent):
            return register_checkpoint(connect(uri), delivery.run, checkpoint, name=name, alias=alias)


@contextmanager
def _told_in_a_line(uri: str) -> Iterator[None]:
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:  # whatever MLflow, its store or its transport may raise
        raise TrackingError(one_line(uri, error)) from error
