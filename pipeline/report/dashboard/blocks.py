"""What the dashboard's page is built of: figures, tables, and the files that their data can be
taken as.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from dash import dcc, html

from pipeline.report.dashboard.place import Place
from pipeline.report.figure import DARK, LIGHT, Figure, Table
from pipeline.report.page import slug, told

_ROWS = 40
_MOST = 120
"""letters of a group or suite in the name of a file, which may have 255 bytes"""
CONFIG: Any = {
    "displayModeBar": False,
    "responsive": True,
    "scrollZoom": False,
    "doubleClick": False,
    "showTips": False,
}


def figure(place: Place, key: str, one: Figure, theme: str, *, where: str) -> html.Figure:
    """`where` as `table` takes it."""
    graph = dcc.Graph(
        figure=one.draw(DARK if theme == "dark" else LIGHT),
        config=CONFIG,
        responsive=True,
        style={"height": f"{one.height}px"},
    )
    name = f"{key}-{one.name}"
    return html.Figure(
        [
            html.H4(one.title),
            html.Div(
                graph, className="drawing", role="img", **aria(label=f"{one.title}. {one.alt}")
            ),
            html.Figcaption([one.caption, " ", html.Span(one.alt, className="alt")]),
            html.Div(
                [_png_button(place, name, one.title, where), _csv(place, name, one.title, where)],
                className="actions",
            ),
            html.Details(
                [
                    html.Summary(["Table", html.Span(f" of {one.title}", className="unseen")]),
                    table(one.table, one.title, where=where),
                ]
            ),
        ]
    )


def _png_button(place: Place, name: str, what: str, where: str) -> html.Button:
    """app.py has what it does."""
    words = ["PNG", html.Span(f" of {what}", className="unseen")]
    file: dict[str, Any] = {"data-png": _file(place, name, where)}
    return html.Button(words, type="button", className="button", **file)


def csv_link(place: Place, name: str, what: str, *, where: str = "") -> html.Div:
    """`where` as `table` takes it."""
    return html.Div(
        _csv(place, name, f"{what}, {where}" if where else what, where), className="actions"
    )


def _csv(place: Place, name: str, what: str, where: str) -> html.A:
    asked: Mapping[str, str] = {"name": name}
    return html.A(
        ["CSV", html.Span(f" of {what}", className="unseen")],
        className="button",
        href=f"/csv{place.search or '?'}&{urlencode(asked)}",
        download=f"{_file(place, name, where)}.csv",
    )


def _file(place: Place, name: str, where: str) -> str:
    """Of a file that is taken away: in a folder of such files its name alone tells of which group
    it is.
    """
    return f"{slug(where)[:_MOST] if where else place.study[:8]}-{name}"


def table(one: Table, caption: str, *, where: str = "", shown: int = _ROWS) -> html.Div:
    """`where` tells its region from that of another group's or suite's table; `shown` rows at
    most.
    """
    head = html.Thead(html.Tr([html.Th(column, scope="col") for column in one.columns]))
    body = [
        html.Tr(
            [
                html.Th(told(row[0]), scope="row"),
                *(
                    html.Td(told(cell), className="none" if cell is None else "")
                    for cell in row[1:]
                ),
            ]
        )
        for row in one.rows[:shown]
    ]
    told_more = f"The first {shown} of {len(one.rows)} rows; the CSV has all."
    return html.Div(
        [
            scroll(
                [html.Caption(html.Span(caption)), head, html.Tbody(body)],
                f"{caption}, {where}" if where else caption,
            ),
            *([html.P(told_more, className="aside")] if len(one.rows) > shown else []),
        ]
    )


def scroll(table: list[Any], label: str) -> html.Div:
    return html.Div(
        html.Table(table), className="scroll", role="region", tabIndex=0, **aria(label=label)
    )


def printed(text: str, label: str) -> html.Div:
    """Lines as a terminal has them."""
    return html.Div(
        html.Pre(text), className="scroll", role="region", tabIndex=0, **aria(label=label)
    )


def aria(**told: str) -> dict[str, Any]:
    """`aria(label="x")` as Dash takes it."""
    return {f"aria-{name}": value for name, value in told.items()}


def yes(really: bool) -> str:
    """As ARIA says it."""
    return "true" if really else "false"
