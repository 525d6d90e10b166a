"""A study as one self-contained HTML page, which makes no network requests.

    page.write(study, Path("report.html"))

The page and the dashboard share the figures of each view and the templates in web/.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.core.files import write_whole
from pipeline.core.run_folder import RunFolder
from pipeline.core.units import rounded
from pipeline.report import tables
from pipeline.report.claims import SuiteResult
from pipeline.report.compare import finite
from pipeline.report.drawing import NOT_MEASURED, THEMES, Cell, Figure, Missing, Table, slug
from pipeline.report.figures import learning_curves, ratios, standings, time_parts, trade_off
from pipeline.report.heat_maps import confusion, firing_rates, gradient_fidelity, temporal_share
from pipeline.report.metrics import ENERGY
from pipeline.report.results import ReportError, describe_state
from pipeline.report.study import Group, Study
from pipeline.report.suite import StudyPage
from pipeline.report.sweeps import LARGEST_SAID, swept
from pipeline.track.mlflow import log_report, tracking_uri

_NO_SWEEP = (
    "Memory and time against time steps",
    (
        "this study has no sweep; run spiketrain sweep RECIPE --steps 1,2,4,8,16 --format json >"
        " sweep.json, then spiketrain report STUDY --sweep sweep.json"
    ),
)
_NO_SCALING = (
    "Scaling over workers",
    (
        "no rule has finished with two numbers of workers under otherwise equal conditions; run"
        " spiketrain launch RECIPE --workers N with another N"
    ),
)


def write(study: Study, out: Path) -> Path:
    """Write the page atomically and return its path.

    Raises:
        OSError: the page cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, render(study).encode())
    return out


def render(study: Study) -> str:
    """The page's HTML. A group with one rule is listed apart, unless it is the only group."""
    groups = study.groups
    compared = [group for group in groups if len(group.rules) > 1 or len(groups) == 1]
    alone = [group for group in groups if group not in compared]
    sections = [
        section_of(group, f"g{index}", among=groups) for index, group in enumerate(compared, 1)
    ]
    lone = [
        section_of(group, f"alone{index}", ("time", "learning", "gradients"), among=groups)
        for index, group in enumerate(alone, 1)
    ]
    memory = list(swept(study.sweeps))
    scaled = tables.scaling(study)
    drawings: dict[str, Any] = {}
    fine_tuned = [RunFolder(run.folder).mistakes for run in study.runs]
    mistakes = (
        json.loads(fine_tuned[0].read_text())
        if len(fine_tuned) == 1 and fine_tuned[0].exists()
        else None
    )

    def offer(key: str, figure: Figure) -> str:
        """Add a figure's drawing to the page; return the address of its table."""
        drawings[key] = drawn(figure)
        return _csv_address(figure.table)

    missing = [reason for each in sections for reason in each.reasons]
    if not any(each.figures for each in memory):
        missing.append(_NO_SWEEP)
    if not scaled:
        missing.append(_NO_SCALING)
    return (
        environment()
        .get_template("page.html")
        .render(
            study=study,
            written_at=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            sections=sections,
            lone=lone,
            memory=memory,
            largest_said=LARGEST_SAID,
            scaled=scaled,
            missing=missing,
            mistakes=mistakes,
            confusion=mistakes and confusion(mistakes),
            drawings=drawings,
            offer=offer,
            plotly=Markup(plotly_script()),
            css=Markup((WEB / "page.css").read_text()),
            js=Markup((WEB / "page.js").read_text()),
        )
    )


def publish(found: StudyPage, page: Path) -> list[str]:
    """Attach the page in MLflow to the parent run of each suite that launched some of the runs. The
    parent also gets the table, as a description and as metrics.

    Returns:
        The ids of the parent runs; empty if no suite launched a run.

    Raises:
        ReportError: the value that a suite's own report returned has no JSON form.
        TrackingError: MLflow could not be reached, or refused the page. The message is one line.
    """
    study = found.study
    own = SuiteResult(claims=study.claims, sweeps=study.sweeps).to_json() | {
        "printed": study.printed
    }
    try:
        text = json.dumps(finite(own), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ReportError(
            f"report: the own report of {study.title} must return JSON values; {error}"
        ) from error
    return log_report(
        page,
        found.folders,
        name=found.place.name,
        data=text,
        note="\n\n".join(tables.in_markdown(each) for each in study.groups if each.finished),
        metrics=dict(_metrics(study)),
        uri=tracking_uri(found.folders[0].parent),
    )


def _metrics(study: Study) -> Iterator[tuple[str, float]]:
    """The means of each rule and its ratios to the baseline, by names that sort by metric.

    MLflow has one value for a name, so they are those of the largest group.
    """
    group = study.groups[0]
    for each in tables.columns_of_costs(group):
        for rule in group.finished_rules:
            for kind, spread in (
                ("mean", group.spread(rule, each.name)),
                (f"ratio to {group.against}", group.ratios(rule, each.name)),
            ):
                if spread is not None:
                    yield f"{kind}/{each.name}/{rule}", spread.mean


WEB = Path(__file__).parent / "web"
FIGURES = {
    "costs": (
        ratios,
        *(partial(trade_off, name=name) for name in ("wall_s", "peak_saved_bytes", ENERGY)),
    ),
    "time": (time_parts,),
    "learning": (learning_curves,),
    "gradients": (gradient_fidelity, temporal_share, firing_rates),
}


class Section(NamedTuple):
    key: str
    title: str
    group: Group
    figures: list[Figure]
    missing: list[Missing]

    @property
    def reasons(self) -> list[tuple[str, str]]:
        return [(each.title, f"{self.title}: {each.why}") for each in self.missing]


def section_of(
    group: Group, key: str, views: Sequence[str] = (*FIGURES,), *, among: Sequence[Group] = ()
) -> Section:
    """The figures of some views of a group; `among`: all groups of the page."""
    makers = [make for view in views for make in FIGURES.get(view, ())]
    # Without a baseline, a note replaces the figure of ratios.
    figures = [make(group) for make in makers if make is not ratios or group.has_baseline]
    return Section(
        key,
        tables.named(group, among=among),
        group,
        [each for each in figures if isinstance(each, Figure)],
        [each for each in figures if isinstance(each, Missing)],
    )


def drawn(figure: Figure) -> Mapping[str, Any]:
    """The drawing in both themes. A page shows the reader's theme, and prints the light theme."""
    return {theme: figure.draw(theme) for theme in THEMES}


def shown(cell: Cell) -> str:
    """The text of a cell. Floats have four significant digits, or all integer digits."""
    if cell is None:
        return NOT_MEASURED
    return rounded(cell) if isinstance(cell, float) else str(cell)


@cache
def plotly_script() -> str:
    """The whole plotly.js, which contains no text that would end a script element."""
    from plotly.offline import get_plotlyjs

    script = get_plotlyjs()
    assert "</script" not in script.lower(), "plotly.js 4.1.1 has no such text"
    return script


@cache
def environment() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    templates.globals |= {"tables": tables}
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    templates.filters |= {
        "shown": shown,
        "csv": _csv_address,
        "slug": slug,
        "described": describe_state,
        "standings": standings,
        "swept": lambda sweeps: list(swept(sweeps)),
    }
    return templates


def _csv_address(table: Table) -> str:
    return f"data:text/csv;charset=utf-8,{quote(table.to_csv())}"
