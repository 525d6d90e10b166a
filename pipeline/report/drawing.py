"""A figure of a report: a drawing, its data as a table, and an alternative text of one sentence.

A drawing has the form that plotly.js takes: `data` and `layout`. It names its colours, and each
theme has a value for each name.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

NOT_MEASURED = "not measured"
Cell = str | int | float | None  # None: not measured


class Colour(str):
    """The name of a colour of a theme."""


PAPER, INK, MUTED, GRID, SCALE = map(Colour, ("paper", "ink", "muted", "grid", "scale"))
# The colours of `series` have a contrast of at least 4.5 : 1 to `paper`. Colour-blind readers can
# tell them apart. The baseline has the first. `scale` is the colour scale of heat maps, 0 to 1.
THEMES: dict[str, dict[str, Any]] = {
    "light": {
        "paper": "#fdfcf9",
        "ink": "#22201c",
        "muted": "#5f5a50",
        "grid": "#e4dfd4",
        "series": (
            "#22201c",
            "#0b5fa5",
            "#b3450b",
            "#00705a",
            "#8f3f80",
            "#6b5d00",
            "#3f4cb8",
            "#a12b3a",
        ),
        "scale": (
            (0.0, "#f3efe6"),
            (0.25, "#c3d3e0"),
            (0.5, "#7fa6c9"),
            (0.75, "#35709f"),
            (1.0, "#0b3c68"),
        ),
    },
    "dark": {
        "paper": "#191a1d",
        "ink": "#ece8df",
        "muted": "#b1aca0",
        "grid": "#35363b",
        "series": (
            "#ece8df",
            "#6cb4ee",
            "#f2945c",
            "#3ecfae",
            "#e29ad3",
            "#dcc84a",
            "#a3b0ff",
            "#ff9ba6",
        ),
        "scale": (
            (0.0, "#22242a"),
            (0.25, "#26435e"),
            (0.5, "#3a709d"),
            (0.75, "#73a9d3"),
            (1.0, "#d6e9f8"),
        ),
    },
}
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
    drawing: dict[str, Any]  # data and layout, with `Colour`s

    def draw(self, theme: str) -> Any:
        return _coloured(self.drawing, THEMES[theme])


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
    return {"title": {"text": text}, **fields}


def color(index: int) -> Colour:
    """The colour of a rule or of a part of the time, by its position."""
    return Colour(f"series {index % _SERIES}")


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


def _coloured(value: Any, theme: dict[str, Any]) -> Any:
    if isinstance(value, Colour):
        name, _, index = value.partition(" ")
        return theme[name][int(index)] if index else theme[name]
    if isinstance(value, dict):
        return {name: _coloured(item, theme) for name, item in value.items()}
    return [_coloured(item, theme) for item in value] if isinstance(value, (list, tuple)) else value
