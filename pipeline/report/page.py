"""A study as one self-contained HTML page, which makes no network requests.

    page.write(study, Path("report.html"))

The page and the dashboard share the figures of each view and the templates in web/.
"""

import base64
import gzip
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.core.files import write_whole
from pipeline.core.run_folder import RunFolder
from pipeline.core.units import rounded
from pipeline.report import overview, tables
from pipeline.report.claims import SuiteReport
from pipeline.report.compare import finite
from pipeline.report.drawing import NOT_MEASURED, Cell, Figure, Missing, Table, color, slug
from pipeline.report.figures import learning_curves, ratios, standings, time_parts, trade_off
from pipeline.report.heat_maps import confusion, firing_rates, gradient_fidelity, temporal_share
from pipeline.report.metrics import ENERGY
from pipeline.report.results import ReportError, describe_state
from pipeline.report.study import Group, Study
from pipeline.report.suite import StudyPage
from pipeline.report.sweeps import LARGEST_SAID, swept
from pipeline.report.titles import facts_of, fields_of, shared_fields
from pipeline.track.mlflow import log_report, tracking_uri

VIEWS = {
    "costs": "Costs",
    "learning": "Learning curves",
    "time": "Where the time goes",
    "gradients": "Gradients and firing rates",
    "claims": "Claims and time steps",
    "runs": "Hardware and commits",
}
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
    offers = Offers(study.title)
    sections = [
        section_of(group, f"g{index}", among=study.groups)
        for index, group in enumerate(study.groups, 1)
    ]
    report = SuiteReport(claims=study.claims, sweeps=study.sweeps, printed=study.printed)
    variables = what_to_show(study, sections, offers, [*VIEWS], [report])
    fine_tuned = [RunFolder(run.folder).mistakes for run in study.runs]
    mistakes = (
        json.loads(fine_tuned[0].read_text())
        if len(fine_tuned) == 1 and fine_tuned[0].exists()
        else None
    )
    if not variables["memory"]:
        variables["missing"].append(_NO_SWEEP)
    if variables["scaled"] is None:
        variables["missing"].append(_NO_SCALING)
    return (
        environment()
        .get_template("page.html")
        .render(
            written_at=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            title=tables.title_of_runs(study.runs),
            facts=facts_of(shared_fields(map(fields_of, study.runs))),
            mistakes=mistakes,
            confusion=mistakes and confusion(mistakes),
            plotly=Markup(base64.b64encode(plotly_script()).decode()),
            css=Markup((WEB / "page.css").read_text()),
            js=Markup((WEB / "page.js").read_text()),
            **variables,
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
    own = SuiteReport(claims=study.claims, sweeps=study.sweeps, printed=study.printed)
    try:
        text = json.dumps(finite(own.to_json()), allow_nan=False)
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
_MAX_NAME = 120  # letters of a title in a file name, which may have 255 bytes
FIGURES: dict[str, tuple[Callable[[Group], Figure | Missing], ...]] = {
    "costs": (ratios, partial(trade_off, name="wall_s"), partial(trade_off, name=ENERGY)),
    "learning": (learning_curves,),
    "time": (time_parts,),
    "gradients": (gradient_fidelity, temporal_share, firing_rates),
}


class Offers:
    """The drawings of a page, and the tables that it offers as CSV.

    Args:
        title: begins the names of the files.
        link: makes the address of a table from its key; None: the address has the table itself.
    """

    def __init__(self, title: str, link: Callable[[str], str] | None = None) -> None:
        self.drawings: dict[str, Any] = {}
        self.tables: dict[str, Table] = {}
        self.title, self._link = slug(title)[:_MAX_NAME], link

    def table(self, key: str, table: Table) -> str:
        """Offer a table. Returns its address."""
        self.tables[key] = table
        if self._link is not None:
            return self._link(key)
        return f"data:text/csv;charset=utf-8,{quote(table.to_csv())}"

    def figure(self, key: str, figure: Figure) -> str:
        """Offer a drawing and its table. Returns the address of the table."""
        self.drawings[key] = figure.drawing
        return self.table(key, figure.table)


class Section(NamedTuple):
    """A group: its overview, and the figures of each view."""

    key: str
    name: str  # no other group of the page has it
    differs: str  # from the group beside it; empty for the only group
    group: Group
    rules: Sequence[tuple[str, str, Sequence[overview.Tile]]]  # rule, colour, tiles
    main: Figure | Missing  # the large figure
    figures: Mapping[str, Sequence[Figure]]  # by view
    missing: Sequence[Missing]


def section_of(
    group: Group, key: str, views: Sequence[str] = (*FIGURES,), *, among: Sequence[Group] = ()
) -> Section:
    """The overview of a group and the figures of some views; `among`: all groups of the page.

    The large figure is accuracy against memory. Until two rules have finished, it has the learning
    curves.
    """
    is_compared = len(group.finished_rules) >= min(2, len(group.rules))
    main = trade_off(group, "peak_saved_bytes") if is_compared else learning_curves(group)
    made = {view: [make(group) for make in FIGURES.get(view, ())] for view in views}
    figures = {
        view: [
            each
            for each in some
            if isinstance(each, Figure) and each.name != getattr(main, "name", "")
        ]
        for view, some in made.items()
    }
    missing = [each for some in made.values() for each in some if isinstance(each, Missing)]
    title, differs = tables.named(group, among=among)
    first = overview.first_rule(group)
    rules = [
        (rule, color(group.place_of(rule)), overview.tiles(group, rule))
        for rule in sorted(group.rules, key=lambda rule: rule != first)
    ]
    name = ", ".join(filter(None, (title, differs)))
    return Section(key, name, differs, group, rules, main, figures, missing)


def what_to_show(
    study: Study,
    sections: Sequence[Section],
    offers: Offers,
    views: Sequence[str],
    reports: Sequence[SuiteReport],
    *,
    mark: str = "",
    label: str = "",
) -> dict[str, Any]:
    """The variables of the templates that the page and the dashboard share.

    Args:
        mark: begins the ids that no other study of the page may have. Panels have names without
            it, so that both studies follow one address.
        label: ends the names of the page's regions, which no other study of the page may have.
    """
    rules = study.groups[0].page_rules if study.groups else ()
    reported = [(each, [*swept(each.sweeps, rules)]) for each in reports]
    return {
        "study": study,
        "sections": sections,
        "offers": offers,
        "views": views,
        "mark": mark,
        "label": label,
        "titles": VIEWS,
        "reports": reported,
        "missing": [
            (each.title, f"{one.name}: {each.why}") for one in sections for each in one.missing
        ],
        "memory": [
            ("-".join(filter(None, (report.key, one.key, one.figures[0].name))), one.figures[0])
            for report, sweeps in reported
            for one in sweeps
            if one.figures
        ],
        "scaled": tables.scaling(study),
        "largest_said": LARGEST_SAID,
    }


def shown(cell: Cell) -> str:
    """The text of a cell. Floats have four significant digits, or all integer digits."""
    if cell is None:
        return NOT_MEASURED
    return rounded(cell) if isinstance(cell, float) else str(cell)


@cache
def plotly_script() -> bytes:
    """The whole plotly.js, compressed by gzip: 1.5 of 4.8 MB. Its basic form has no heat maps."""
    from plotly.offline import get_plotlyjs

    return gzip.compress(get_plotlyjs().encode(), mtime=0)


@cache
def environment() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(WEB),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals |= {"tables": tables, "standings": standings, "training": overview.training}
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    templates.filters |= {"shown": shown, "described": describe_state}
    return templates
