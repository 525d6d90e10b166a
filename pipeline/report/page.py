"""A study as one self-contained HTML page, which asks the network for nothing.

page.write(study, Path("report.html"))
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from markupsafe import Markup

from pipeline.report import tables
from pipeline.report.claims import Returned
from pipeline.report.compare import finite
from pipeline.report.read_study import Found
from pipeline.report.runs import ReportError
from pipeline.report.study import Study
from pipeline.report.sweeps import LARGEST_SAID, swept
from pipeline.report.views import WEB, drawn, environment, plotly_script, section_of
from pipeline.track.mlflow import log_report, tracking_uri

_NO_SWEEP = (
    "Memory and time against time steps",
    (
        "this study carries no sweep; spiketrain sweep RECIPE --steps 1,2,4,8,16 --format json >"
        " sweep.json, then spiketrain report STUDY --sweep sweep.json"
    ),
)
_NO_SCALING = (
    "Scaling over workers",
    (
        "no rule has finished on two numbers of workers, all else equal; spiketrain launch RECIPE"
        " --workers N with another N"
    ),
)


def write(study: Study, out: Path) -> Path:
    """Write the page whole or not at all; returns its path.

    Raises:
        OSError: it cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.write_text(render(study), encoding="utf-8")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def render(study: Study) -> str:
    """The page's HTML. A group with one rule stands alone, unless it is the only group."""
    groups = study.groups
    compared = [group for group in groups if len(group.rules) > 1 or len(groups) == 1]
    alone = [group for group in groups if group not in compared]
    lone_views = ("time", "learning", "gradients")
    sections = [
        section_of(each, f"g{at}", among=groups) for at, each in enumerate(compared, start=1)
    ]
    lone = [
        section_of(each, f"alone{at}", lone_views, among=groups)
        for at, each in enumerate(alone, start=1)
    ]
    memory = list(swept(study.sweeps))
    scaled = tables.scaling(study)
    drawings = {
        key: drawing for each in (*sections, *lone) for key, drawing in each.drawings.items()
    }
    drawings |= {
        f"{each.key}-{figure.name}": drawn(figure) for each in memory for figure in each.figures
    }
    missing = [reason for each in sections for reason in each.reasons]
    missing += [] if any(each.figures for each in memory) else [_NO_SWEEP]
    missing += [] if scaled else [_NO_SCALING]
    return (
        environment()
        .get_template("page.html")
        .render(
            study=study,
            made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            sections=sections,
            lone=lone,
            memory=memory,
            largest_said=LARGEST_SAID,
            scaled=scaled,
            missing=missing,
            drawings=drawings,
            plotly=Markup(plotly_script()),
            css=Markup((WEB / "page.css").read_text()),
            js=Markup((WEB / "page.js").read_text()),
        )
    )


def publish(found: Found, page: Path) -> list[str]:
    """Put the page into MLflow as an artifact of each parent that some runs were launched with.

    Returns:
        the ids of the parents; none where all of the runs were launched by themselves.

    Raises:
        ReportError: what a suite's own report has returned has no JSON form.
        TrackingError: MLflow could not be reached or refused; one line.
    """
    study = found.study
    own = Returned(claims=study.claims, sweeps=study.sweeps).to_json() | {"printed": study.printed}
    try:
        text = json.dumps(finite(own), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ReportError(
            f"report: what {study.title} reports by itself must be JSON values; {error}"
        ) from error
    uri = tracking_uri(found.folders[0].parent)
    return log_report(page, found.folders, name=found.place.name, data=text, uri=uri)
