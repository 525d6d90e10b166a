"""What the page and the dashboard share: the figures of each view, and the templates in web/."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.core.units import rounded
from pipeline.report import tables
from pipeline.report.figure import NOT_MEASURED, THEMES, Cell, Figure, Missing, Table
from pipeline.report.figures import ratios, trade_off
from pipeline.report.figures_learning import learning_curves, standings
from pipeline.report.figures_maps import firing_rates, gradient_fidelity, temporal_share
from pipeline.report.figures_time import time_parts
from pipeline.report.results import ENERGY, describe_state
from pipeline.report.study import Group
from pipeline.report.sweeps import swept

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
    """A group on a page: figures, and those that nothing was measured for."""

    key: str
    title: str
    group: Group
    figures: list[Figure]
    missing: list[Missing]

    @property
    def drawings(self) -> dict[str, Any]:
        """By the keys of their places."""
        return {f"{self.key}-{figure.name}": drawn(figure) for figure in self.figures}

    @property
    def reasons(self) -> list[tuple[str, str]]:
        """Each missing figure, and why it is missing."""
        return [(each.title, f"{self.title}: {each.why}") for each in self.missing]


def section_of(
    group: Group, key: str, views: Sequence[str] = (*FIGURES,), *, among: Sequence[Group] = ()
) -> Section:
    """The figures of some views of a group, which stands `among` others on the page."""
    makers = [make for view in views for make in FIGURES.get(view, ())]
    # Without a baseline there are no ratios, which a note says.
    found = [make(group) for make in makers if make is not ratios or group.has_baseline]
    return Section(
        key,
        tables.named(group, among=among),
        group,
        [each for each in found if isinstance(each, Figure)],
        [each for each in found if isinstance(each, Missing)],
    )


def drawn(figure: Figure) -> Mapping[str, Any]:
    """In both themes: a page takes the one of its reader's system, and the light one for paper."""
    return {theme: figure.draw(theme) for theme in THEMES}


def shown(cell: Cell) -> str:
    """A cell as pages show it; numbers to four digits."""
    if cell is None:
        return NOT_MEASURED
    return rounded(cell) if isinstance(cell, float) else str(cell)


def slug(text: str) -> str:
    """For a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "study"


@cache
def plotly_script() -> str:
    """plotly.js whole, without text that would end a script element."""
    from plotly.offline import get_plotlyjs

    script = get_plotlyjs()
    assert "</script" not in script.lower(), "plotly.js 4.1.1 has no such text"
    return script


@cache
def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    made.globals |= {"tables": tables}
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    made.filters |= {
        "shown": shown,
        "csv": _data_uri,
        "slug": slug,
        "described": describe_state,
        "standings": standings,
        "swept": lambda sweeps: list(swept(sweeps)),
    }
    return made


def _data_uri(table: Table) -> str:
    return "data:text/csv;charset=utf-8," + quote(table.to_csv())
