"""A study's page as an artifact in MLflow, of each parent that some of its runs were launched
with.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.report.finite import finite
from pipeline.report.read_study import Found
from pipeline.report.returned import Returned
from pipeline.report.runs import ReportError
from pipeline.track.mlflow import tracking_uri
from pipeline.track.publish import log_report


def publish(found: Found, page: Path) -> list[str]:
    """Ids of the parents in MLflow that have the page now; none where all of the runs were launched
    by themselves.

    Raises:
        ReportError: what a suite's own report has returned cannot be told in JSON.
        TrackingError: MLflow could not be reached or refused; one line.
    """
    told = {
        **Returned(claims=found.study.claims, sweeps=found.study.sweeps).to_json(),
        "printed": found.study.printed,
    }
    try:
        text = json.dumps(finite(told), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ReportError(
            f"report: what {found.study.title} reports by itself must be JSON values; {error}"
        ) from error
    return log_report(
        page,
        found.folders,
        name=found.place.name,
        told=text,
        uri=tracking_uri(found.folders[0].parent),
    )
