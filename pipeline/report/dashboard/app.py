"""The dashboard's page and what answers it.

The address is the one state: links and controls change it, and the list and the figures are made
from it (place.py). The list is read at each look, and no journal before a study is picked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dash import ALL, Dash, Input, Output, State, ctx, dcc, html, no_update
from flask import Response, request

from pipeline.report.dashboard import blocks, parts, scripts
from pipeline.report.dashboard.place import ONLY, VIEWS, Place, short
from pipeline.report.live import Live
from pipeline.report.runs import ReportError
from pipeline.report.store import Store, studies

_WEB = Path(__file__).parent.parent / "web"
_LOOKS = {"look": "looked", "glance": "glanced"}
"""at the study and at the list: where it stands which was asked for, and which was answered"""
WOKEN_S = 30.0
"""after which looks go on whose answer has not come: it is lost with a request that is lost on its
way
"""


def make_app(store: Store, *, name: str, every: float) -> Dash:
    """`name` is what the page calls the store."""
    app = Dash(
        __name__,
        title="spiketrain dashboard",
        update_title=None,  # type: ignore[arg-type]
        include_assets_files=False,
        serve_locally=True,
        enable_mcp=False,
        use_pages=False,
        add_log_handler=False,
        index_string=_index(),
    )
    app.layout = _layout(name, every)
    _Answers(Live(store), every=every).join(app, patience_s=max(WOKEN_S, 5 * every))
    return app


def _index() -> str:
    css = "\n".join((_WEB / file).read_text() for file in ("page.css", "dashboard.css"))
    return (_WEB / "dashboard.html").read_text().replace("{css}", css)


def _layout(name: str, every: float) -> html.Div:
    return html.Div(
        [
            dcc.Location(id="url", refresh=False),
            dcc.Interval(id="tick", interval=int(every * 1000)),
            *(dcc.Store(id=name, data=0) for pair in _LOOKS.items() for name in pair),
            dcc.Store(id="scheme"),
            dcc.Store(id="drawn"),
            dcc.Store(id="pressed"),
            dcc.Store(id="applied"),
            html.A("To the study", href="#study", className="skip"),
            html.Header(
                [
                    html.P("spiketrain dashboard", className="kind"),
                    html.H1("Studies"),
                    html.P(
                        ["Of ", html.Code(name), f", looked at every {every:g} s."],
                        className="lede",
                    ),
                    html.Div(
                        html.Button(
                            "Pause",
                            id="pause",
                            type="button",
                            className="button",
                            **blocks.aria(pressed=blocks.yes(False)),
                        ),
                        className="actions",
                    ),
                ]
            ),
            html.Main(
                [
                    html.Section(
                        [
                            html.H2("All studies", id="all"),
                            html.Div(
                                [
                                    html.Label(
                                        "Filter by study, family, rule, protocol, seed or state",
                                        htmlFor="text",
                                    ),
                                    dcc.Input(
                                        id="text", type="search", debounce=0.3, autoComplete="off"
                                    ),
                                    parts.only_buttons(),
                                ],
                                className="controls",
                            ),
                            html.Div(id="list"),
                        ],
                        **blocks.aria(labelledby="all"),
                    ),
                    html.Section(
                        [
                            html.H2("No study is picked", id="study", tabIndex=-1),
                            html.Div(
                                [parts.run_boxes(), parts.view_buttons()],
                                id="choose",
                                className="controls",
                                hidden=True,
                            ),
                            html.Div(id="figures"),
                        ],
                        **blocks.aria(labelledby="study"),
                    ),
                ],
                id="main",
            ),
            html.Footer(
                html.P(
                    "Made by spiketrain. The address shows the same to whoever opens it, of the"
                    " runs there are."
                )
            ),
        ],
        className="page",
    )


class _Answers:
    """The callbacks of one app."""

    def __init__(self, live: Live, *, every: float) -> None:
        self._live, self._every = live, every

    def join(self, app: Dash, *, patience_s: float) -> None:
        app.clientside_callback(scripts.SCHEME, Output("scheme", "data"), Input("url", "pathname"))
        for asked, answered in _LOOKS.items():
            app.clientside_callback(
                scripts.NEXT.replace("PATIENCE", str(int(patience_s * 1000))),
                Output(asked, "data"),
                Input("tick", "n_intervals"),
                State(asked, "data"),
                State(answered, "data"),
                prevent_initial_call=True,
            )
        app.clientside_callback(
            scripts.PAUSED,
            Output("tick", "disabled"),
            Output("pause", "aria-pressed"),
            Input("pause", "n_clicks"),
            State("tick", "disabled"),
            prevent_initial_call=True,
        )
        app.clientside_callback(
            scripts.TITLED.replace("VIEWS", json.dumps(VIEWS)),
            Input("study", "children"),
            Input("url", "search"),
        )
        app.clientside_callback(scripts.FOCUS, Input("runs", "children"))
        app.clientside_callback(
            scripts.PRESSED,
            Output("pressed", "data"),
            Input({"change": ALL, "to": ALL}, "n_clicks"),
            State("applied", "data"),
            State("pressed", "data"),
            prevent_initial_call=True,
        )
        app.clientside_callback(
            scripts.COUNTED,
            Output("picked", "children"),
            Input({"change": "runs", "to": ALL}, "aria-checked"),
        )
        app.callback(
            Output("url", "search"),
            Output("text", "value"),
            Output("applied", "data"),
            Input("url", "search"),
            Input("text", "value"),
            Input("pressed", "data"),
            State("applied", "data"),
        )(self.steer)
        app.callback(
            *(Output({"change": "only", "to": name}, "aria-pressed") for name in ONLY),
            *(Output({"change": "view", "to": name}, "aria-pressed") for name in VIEWS),
            Input("url", "search"),
        )(self.mark)
        app.callback(
            Output({"change": "runs", "to": ALL}, "aria-checked"),
            Input("url", "search"),
            State({"change": "runs", "to": ALL}, "id"),
        )(self.check)
        app.callback(
            Output("list", "children"),
            Output("glanced", "data"),
            Input("url", "search"),
            Input("glance", "data"),
        )(self.list_studies)
        app.callback(
            Output("study", "children"),
            Output("choose", "hidden"),
            Output("runs", "children"),
            Output("figures", "children"),
            Output("drawn", "data"),
            Output("looked", "data"),
            Input("url", "search"),
            Input("look", "data"),
            Input("scheme", "data"),
            State("drawn", "data"),
        )(self.show)
        app.server.add_url_rule("/csv", "csv", self.csv)

    def steer(
        self,
        search: str | None,
        text: str | None,
        pressed: list[dict[str, Any]] | None,
        applied: float | None,
    ) -> tuple[Any, Any, Any]:
        """The address follows what is pressed and typed, and what is typed follows the address."""
        place, changed = Place.at(search), ctx.triggered_prop_ids
        is_new = "url.search" in changed
        if not is_new:
            place = place.change(text=(text or "").strip())
        due = [press for press in pressed or [] if press["at"] > (applied or 0)]
        for press in due:
            place = self._pressed(place, press["change"], press["to"])
        return (
            place.search if due or ("text.value" in changed and not is_new) else no_update,
            place.text if is_new else no_update,
            due[-1]["at"] if due else no_update,
        )

    def _pressed(self, place: Place, what: str, name: str) -> Place:
        if what in ("only", "view"):
            return place.change(**{what: name})
        try:
            members = place.members(self._live.members(place.study))
        except ReportError:
            return place  # the list says what is wrong
        ids = [short(run) for run in members]
        if what == "every":
            return place.change(runs=tuple(ids) if name == "all" else ())
        picked = {short(run) for run in place.picked(members)}
        return place.change(runs=tuple(each for each in ids if (each in picked) != (each == name)))

    def mark(self, search: str | None) -> tuple[str, ...]:
        """Which buttons are pressed."""
        place = Place.at(search)
        return (
            *(blocks.yes(name == place.only) for name in ONLY),
            *(blocks.yes(name == place.view) for name in VIEWS),
        )

    def check(self, search: str | None, boxes: list[dict[str, str]]) -> list[Any]:
        """Which boxes of runs are checked; new ones come as they are."""
        place = Place.at(search)
        try:
            picked = (
                {short(run) for run in place.picked(self._live.members(place.study))}
                if place.runs is None
                else place.runs
            )
        except ReportError:
            return [no_update] * len(boxes)  # the list says what is wrong
        return [blocks.yes(box["to"] in picked) for box in boxes]

    def list_studies(self, search: str | None, glance: float) -> tuple[list[Any], float]:
        """A look asks the store; a change of the address, as of filter or view, is answered by what
        the newest look was told.
        """
        place = Place.at(search)
        fresh_s = 0.0 if "glance.data" in ctx.triggered_prop_ids else self._every
        try:
            return parts.study_list(place, studies(self._live.listed(fresh_s=fresh_s))), glance
        except ReportError as error:
            return _trouble(error), glance

    def show(
        self, search: str | None, look: float, scheme: str | None, before: Any
    ) -> tuple[Any, ...]:
        return (*self._shown(search, scheme, before), look)

    def _shown(self, search: str | None, scheme: str | None, before: Any) -> tuple[Any, ...]:
        place = Place.at(search)
        if scheme is None:
            return (no_update,) * 5
        if not place.study:
            return (
                "No study is picked",
                True,
                [],
                [html.P("Pick one from the list above.", className="lede")],
                None,
            )
        title = f"Study {place.study[:8]}" + (f" of {place.family}" if place.family else "")
        try:
            members = place.members(self._live.members(place.study))
            runs = place.picked(members)
            news = [[[run.newest, _versions(run.tags)] for run in runs], self._live.versions(runs)]
            now = [search, scheme, [[run.id, parts.state_words(run)] for run in members], news]
            if now == before:
                return (no_update,) * 5
            if not members:
                return (
                    title,
                    True,
                    [],
                    [html.P("The store has no run of this study.", className="note")],
                    now,
                )
            boxes = no_update if before and before[2] == now[2] else parts.boxes(place, members)
            found = parts.figures(place, self._live.study(runs), self._live.reports(runs), scheme)
            return title, False, boxes, [*parts.newest_alone(place, runs, members), *found], now
        except ReportError as error:
            return title, True, [], _trouble(error), None

    def csv(self) -> Response:
        """The data of a figure as a file."""
        place, name = (
            Place.at(request.query_string.decode("ascii", "replace")),
            request.args.get("name", ""),
        )
        try:
            runs = place.picked(self._live.members(place.study)) if place.study else []
            found = (
                parts.csv_of(place, self._live.study(runs), self._live.reports(runs), name)
                if runs
                else None
            )
        except ReportError as error:
            return Response(f"{error}\n", 503, mimetype="text/plain")
        if found is None:
            return Response("dashboard: there is no such table here\n", 404, mimetype="text/plain")
        return Response(found, mimetype="text/csv")


def _versions(tags: Any) -> list[str]:
    return sorted(value for name, value in tags.items() if name.startswith("spiketrain.artifact."))


def _trouble(error: Exception) -> list[Any]:
    return [html.P(str(error)[:1].upper() + str(error)[1:] + ".", className="note", role="alert")]
