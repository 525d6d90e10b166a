"""What somebody puts into MLflow by hand: a report of a suite, a checkpoint in the model registry."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pipeline.suite import runs_of
from pipeline.track.base import TrackingError
from pipeline.track.connect import connect, one_line
from pipeline.track.delivery import Delivery
from pipeline.track.hierarchy import experiment_of, one_at_a_time, parent_of
from pipeline.track.jsonl import first
from pipeline.track.models import KeptOf, Registered, inside, register_checkpoint
from pipeline.track.state import is_driven

__all__ = ["REPORT", "REPORT_DATA", "Registered", "log_report", "register"]

REPORT = "report.html"
REPORT_DATA = "report.json"


def log_report(folder_of_suite: str | os.PathLike[str], page: Path, told: str, *, uri: str) -> str:
    """Put an HTML page, and `told` of it in JSON, on the MLflow run that stands for a suite, over older ones; its id.

    They are its artifacts `report.html` and `report.json`.

    Raises:
        TrackingError: none of its runs has begun, or MLflow could not be reached or refused; one line.
        ValueError: the suite cannot be read.
    """
    folder = Path(folder_of_suite)
    starts = (first(run / "journal.jsonl", "start") for run in runs_of(folder).values())
    start = next((event for event in starts if event is not None), None)
    if start is None:
        raise TrackingError(f"{folder} has no run that began; there is nothing in MLflow to put a report on")
    text = page.read_text()
    with _told_in_a_line(uri), one_at_a_time(folder.parent):
        client = connect(uri)
        parent = parent_of(client, experiment_of(client, start, uri=uri, runs_dir=folder.parent), start)
        if parent is None:
            raise TrackingError(f"{folder}: its runs were launched without it; got a journal that names no suite")
        client.log_text(parent, told, REPORT_DATA)
        client.log_text(parent, text, REPORT)
    return parent


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
        if not delivery.advance(leaving=not is_driven(run_dir)):
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
