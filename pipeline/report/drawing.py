"""A figure of a report: a drawing, its data as a table, and an alternative text of one sentence.

A drawing has the form that plotly.js takes: `data` and `layout`, with names in place of colours.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

NOT_MEASURED = "not measured"
Cell = str | int | float | None  # None: not measured


# The names of colours, which are custom properties of page.css: page.js puts in the values of the
# reader's scheme. The baseline has the first colour of `--series`. `SCALE` is that of heat maps.
PAPER, INK, MUTED, GRID = "--paper", "--ink", "--muted", "--grid"
SCALE = [(index / 4, f"--scale-{index}") for index in range(5)]
_SERIES = 8
SYMBOLS = ("square", "circle", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
PATTERNS = ("", "/", "\\", ".", "x", "-", "|", "+")
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts and unrounded numbers. No cell has a line break."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def to_csv(self) -> str:
        """Return the table as CSV, with texts that no spreadsheet reads as a formula."""
        return (
            pd.DataFrame(self.rows, columns=list(self.columns), dtype=object)
            .map(harmless)
            .to_csv(index=False)
        )


@dataclass(frozen=True, kw_only=True)
class Figure:
    name: str  # the stem of its file names
    title: str
    caption: str  # how to read the figure
    alt: str  # the content in one sentence
    table: Table
    drawing: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A figure that has no data, with the reason."""

    title: str
    why: str


def drawing(data: Sequence[dict[str, Any]], *, height: int, **changes: Any) -> dict[str, Any]:
    """Combine traces with the layout that all drawings share, updated by `changes`.

    The layout has no title, because the page shows it.
    """
    axis = {"gridcolor": GRID, "linecolor": MUTED, "zerolinecolor": GRID, "automargin": True}
    font = {"family": _FONT, "color": INK}
    layout: dict[str, Any] = {
        "height": height,
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "font": {**font, "size": 13},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8, "pad": 4},
        "legend": {  # above the drawing
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "xanchor": "left",
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
        },
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": MUTED, "font": font},
        "xaxis": axis,
        "yaxis": axis,
        "dragmode": False,
    }
    for name, value in changes.items():
        shared = layout.get(name, axis if name.startswith(("xaxis", "yaxis")) else {})
        layout[name] = {**shared, **value} if isinstance(value, dict) else value
    return {"data": list(data), "layout": layout}


def scatter(
    name: str, x: Sequence[float], y: Sequence[float | None], **fields: Any
) -> dict[str, Any]:
    """A trace of points. `fields`: further fields by plotly's names."""
    return {"type": "scatter", "name": plain(name), "x": list(x), "y": list(y), **fields}


def titled(text: str, **fields: Any) -> dict[str, Any]:
    return {"title": {"text": text, "font": {"size": 13}}, **fields}


def color(index: int) -> str:
    """The colour of a rule or of a part of the time, by its position."""
    return f"--series-{index % _SERIES}"


def symbol(index: int) -> str:
    return _shifted(SYMBOLS, index)


def pattern(index: int) -> str:
    return _shifted(PATTERNS, index)


def _shifted(shapes: Sequence[str], index: int) -> str:
    """Choose a shape by index. When the colours repeat, the shapes are shifted by one."""
    return shapes[(index + index // len(shapes)) % len(shapes)]


def harmless(cell: Cell) -> Cell:
    """Quote a text that a spreadsheet would read as a formula. `-inf` is a number and stays."""
    if not isinstance(cell, str) or cell[:1] not in ("=", "+", "-", "@", "\t", "\r"):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def plain(text: str) -> str:
    """Escape a text for a drawing: plotly reads some HTML in its texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "study"
