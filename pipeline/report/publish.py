"""A study's page where it belongs: a file, and an artifact in MLflow of each parent that some of its runs were launched with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from pipeline.report.finite import finite
from pipeline.report.page import write
from pipeline.report.read_study import Found
from pipeline.report.returned import Returned
from pipeline.track.mlflow import tracking_uri
from pipeline.track.publish import log_report


class Published(NamedTuple):
    page: Path
    parents: list[str]
    """ids in MLflow; none where all of the runs were launched by themselves"""


def publish(found: Found, out: Path | None = None) -> Published:
    """Write the page, to `out` rather than its own place, and put it into MLflow.

    Raises:
        OSError: it cannot be written.
        TrackingError: MLflow could not be reached or refused; one line. The file is there.
    """
    page = write(found.study, out or found.place)
    told = {**Returned(claims=found.study.claims, sweeps=found.study.sweeps).to_json(), "printed": found.study.printed}
    text = json.dumps(finite(told), allow_nan=False)
    uri = tracking_uri(found.folders[0].parent)
    return Published(page, log_report(page, found.folders, name=found.place.name, told=text, uri=uri))
