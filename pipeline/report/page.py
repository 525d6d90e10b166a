"""A study as one self-contained HTML page, which asks the network for nothing.

page.write(study, Path("report.html"))
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.core.units import rounded
from pipeline.report import scaling, tables
from pipeline.report.figure import DARK, LIGHT, NOT_MEASURED, Cell, Figure, Missing, Table
from pipeline.report.figures import ratios, trade_off
from pipeline.report.figures_learning import learning_curves, standings
from pipeline.report.figures_maps import firing_rates, gradient_fidelity, temporal_share
from pipeline.report.figures_time import time_parts
from pipeline.report.study import ENERGY, Group, Study
from pipeline.report.swept import LARGEST_SAID, swept

_WEB = Path(__file__).parent / "web"
_ROWS = 40
"""of a table that the page shows; its CSV has them all"""
TRADED = ("wall_s", "peak_saved_bytes", ENERGY)
_SWEEP = (
    "spiketrain sweep RECIPE --steps 1,2,4,8,16 --format json > sweep.json, then spiketrain report"
    " STUDY --sweep sweep.json"
)
_WORKERS = (
    "no rule has finished on two numbers of workers, all else equal; spiketrain launch RECIPE"
    " --workers N with another N"
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Of one group."""

    key: str
    title: str
    group: Group
    headlines: tuple[tuple[str, str], ...]
    """a rule, and what it saves and costs"""
    standings: tuple[str, ...]
    figures: tuple[Figure, ...]
    missing: tuple[Missing, ...]


def write(study: Study, out: Path) -> Path:
    """Write the page whole or not at all; returns its path.

    Raises: OSError where it cannot be written.
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
    """The page's HTML."""
    compared = [group for group in study.groups if len(group.rules) > 1] or [
        group for group in study.groups if len(study.groups) == 1
    ]
    alone = [group for group in study.groups if group not in compared]
    sections = [
        _section(group, f"g{index}", _figures(group), among=study.groups)
        for index, group in enumerate(compared, start=1)
    ]
    lone = [
        _section(group, f"alone{index}", _of_each_rule(group), among=study.groups)
        for index, group in enumerate(alone, start=1)
    ]
    memory = list(swept(study.sweeps))
    drawings = {
        f"{section.key}-{figure.name}": _drawn(figure)
        for section in (*sections, *lone)
        for figure in section.figures
    }
    drawings |= {
        f"{each.key}-{figure.name}": _drawn(figure) for each in memory for figure in each.figures
    }
    scaled = scaling.scaling(study)
    missing = [
        (one.title, f"{section.title}: {one.why}")
        for section in sections
        for one in section.missing
    ]
    missing += (
        []
        if any(each.figures for each in memory)
        else [("Memory and time against time steps", f"this study carries no sweep; {_SWEEP}")]
    )
    missing += [] if scaled else [("Scaling over workers", _WORKERS)]
    return (
        _environment()
        .get_template("page.html")
        .render(
            study=study,
            made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            sections=sections,
            lone=lone,
            memory=memory,
            largest_said=LARGEST_SAID,
            scaled=scaled,
            scaled_said=scaling.SAID,
            missing=missing,
            drawings=script_json(drawings),
            plotly=Markup(_plotly()),
            css=Markup((_WEB / "page.css").read_text()),
            js=Markup((_WEB / "page.js").read_text()),
            tables=tables,
            rows_shown=_ROWS,
        )
    )


def script_json(value: Any) -> Markup:
    """JSON that no text in it can lead out of a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def data_uri(table: Table) -> str:
    """The table as a CSV file inside a link."""
    return "data:text/csv;charset=utf-8," + quote(table.to_csv())


def told(cell: Cell) -> str:
    """A cell as the page shows it; numbers to four digits."""
    if cell is None:
        return NOT_MEASURED
    return rounded(cell) if isinstance(cell, float) else str(cell)


def slug(text: str) -> str:
    """For a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "study"


def _section(
    group: Group, key: str, figures: Iterator[Figure | Missing], *, among: Sequence[Group]
) -> Section:
    made = list(figures)
    return Section(
        key=key,
        title=tables.named(group, among=among),
        group=group,
        headlines=tuple(tables.headlines(group)),
        standings=tuple(standings(group)),
        figures=tuple(each for each in made if isinstance(each, Figure)),
        missing=tuple(each for each in made if isinstance(each, Missing)),
    )


def _figures(group: Group) -> Iterator[Figure | Missing]:
    """Of rules side by side."""
    yield ratios(group)
    for name in TRADED:
        yield trade_off(group, name)
    yield from _of_each_rule(group)


def _of_each_rule(group: Group) -> Iterator[Figure | Missing]:
    """What one rule has to show by itself, too."""
    yield time_parts(group)
    yield learning_curves(group)
    yield gradient_fidelity(group)
    yield temporal_share(group)
    yield firing_rates(group)


def _drawn(figure: Figure) -> Mapping[str, Any]:
    """In both themes: the page takes the one that its reader's system asks for, and the light one
    for paper.
    """
    return {theme.name: json.loads(str(figure.draw(theme).to_json())) for theme in (LIGHT, DARK)}


@cache
def _plotly() -> str:
    """plotly.js whole, without what would end a script element."""
    from plotly.offline import get_plotlyjs

    script = get_plotlyjs()
    assert "</script" not in script.lower(), "plotly.js 4.1.1 has no such text"
    return script


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"told": told, "csv": data_uri, "slug": slug}
    return environment
