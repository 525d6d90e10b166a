"""What a figure of a report is: a drawing in a theme, the table of what it shows, and one sentence
for who cannot see it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

NOT_MEASURED = "not measured"
Cell = str | int | float | None
"""None: not measured"""


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of one scheme; those of `series` keep 4.5 : 1 to `paper`, and are told apart without
    red and green.
    """

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    """by the place of a rule in its group: the baseline's is first"""
    scale: tuple[tuple[float, str], ...]
    """of heat maps, from nothing to most"""


LIGHT = Theme(
    name="light",
    paper="#fdfcf9",
    ink="#22201c",
    muted="#5f5a50",
    grid="#e4dfd4",
    series=("#22201c", "#0b5fa5", "#b3450b", "#00705a", "#8f3f80", "#6b5d00", "#3f4cb8", "#a12b3a"),
    scale=(
        (0.0, "#f3efe6"),
        (0.25, "#c3d3e0"),
        (0.5, "#7fa6c9"),
        (0.75, "#35709f"),
        (1.0, "#0b3c68"),
    ),
)
DARK = Theme(
    name="dark",
    paper="#191a1d",
    ink="#ece8df",
    muted="#b1aca0",
    grid="#35363b",
    series=("#ece8df", "#6cb4ee", "#f2945c", "#3ecfae", "#e29ad3", "#dcc84a", "#a3b0ff", "#ff9ba6"),
    scale=(
        (0.0, "#22242a"),
        (0.25, "#26435e"),
        (0.5, "#3a709d"),
        (0.75, "#73a9d3"),
        (1.0, "#d6e9f8"),
    ),
)
SYMBOLS = ("square", "circle", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
PATTERNS = ("", "/", "\\", ".", "x", "-", "|", "+")
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one line each; numbers as they were measured, for whoever goes on with them."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def to_csv(self) -> str:
        """As read by a spreadsheet, which must not take a name that begins as a formula for one."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([harmless(cell) for cell in row] for row in self.rows)
        return text.getvalue()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of a page."""

    name: str
    """of its files"""
    title: str
    caption: str
    """how it is read"""
    alt: str
    """what it shows, in one sentence"""
    table: Table
    draw: Callable[[Theme], go.Figure]
    height: int
    """pixels"""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A figure that nothing was measured for, and what would."""

    title: str
    why: str


def base_layout(theme: Theme, *, height: int, **more: Any) -> dict[str, Any]:
    """What all drawings share: no title, which the page has; a legend above; no margins but what
    labels need.
    """
    axis = {
        "gridcolor": theme.grid,
        "linecolor": theme.muted,
        "zerolinecolor": theme.grid,
        "automargin": True,
    }
    layout = {
        "template": "none",
        "height": height,
        "paper_bgcolor": theme.paper,
        "plot_bgcolor": theme.paper,
        "font": {"family": _FONT, "size": 13, "color": theme.ink},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8, "pad": 4},
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "xanchor": "left",
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
        },
        "hoverlabel": {
            "bgcolor": theme.paper,
            "bordercolor": theme.muted,
            "font": {"color": theme.ink, "family": _FONT},
        },
        "xaxis": axis,
        "yaxis": axis,
        "dragmode": False,
    }
    for name, value in more.items():
        layout[name] = {**layout.get(name, {}), **value} if isinstance(value, dict) else value
    return layout


def color(theme: Theme, place: int) -> str:
    return theme.series[place % len(theme.series)]


def symbol(place: int) -> str:
    return _shifted(SYMBOLS, place)


def pattern(place: int) -> str:
    return _shifted(PATTERNS, place)


def _shifted(shapes: Sequence[str], place: int) -> str:
    """Another beside the same colour in each round of the colours, of which there are as many."""
    return shapes[(place + place // len(shapes)) % len(shapes)]


def harmless(cell: Cell) -> Cell:
    """A text that a spreadsheet would take for a formula is quoted; a number as a text, such as
    `-inf`, is none.
    """
    if not isinstance(cell, str) or cell[:1] not in ("=", "+", "-", "@", "\t", "\r"):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def plain(text: str) -> str:
    """For a drawing, in which plotly reads a part of HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
