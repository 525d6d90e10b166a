"""The dashboard's server: an HTML shell, and the parts of it that `web/dashboard.js` requests.

The URL is the only state: the list and the figures are made from it (permalink.py). Each look reads
the list again. No journal is read before a study is picked.

`spiketrain dashboard`: a waitress server, on loopback unless a token guards it.
"""

import hashlib
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flask import Flask, Response, request

from pipeline.report import tables
from pipeline.report.dashboard.guard import guard, is_loopback
from pipeline.report.dashboard.live import Live, SuiteReport
from pipeline.report.dashboard.permalink import ONLY, SORTS, VIEWS, ViewState, describe_states
from pipeline.report.drawing import Figure, Table, slug
from pipeline.report.page import WEB, drawn, environment, plotly_script, section_of
from pipeline.report.results import ReportError, describe_state
from pipeline.report.stores import Store, StoredRun, open_store, studies
from pipeline.report.study import Study
from pipeline.report.sweeps import LARGEST_SAID
from pipeline.track.mlflow import tracking_uri
from pipeline.track.mlflow_store import without_password

SHOWN = 200  # the most studies in a list
_NAME = 120  # the most letters of a group or suite in a file name, which may have 255 bytes
_PICK = "<p class='lede'>Pick one from the list above.</p>"
_NO_RUN = "<p class='note'>The store has no run of this study.</p>"


def make_app(store: Store, *, name: str, every: float, patience_s: float | None = None) -> Flask:
    """Make the server.

    Args:
        name: what the page calls the store.
        every: seconds between looks of an open page.
        patience_s: seconds after which a page repeats a request that has no answer.
    """
    environment().filters |= {
        "seeds": _seeds,
        "states": describe_states,
        "moment": lambda s: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(s)),
    }
    app = Flask(__name__, static_folder=str(WEB), static_url_path="/web", template_folder=None)
    answers = _Answers(Live(store), every)
    shell = (
        environment()
        .get_template("dashboard.html")
        .render(
            name=name,
            views=VIEWS,
            only={key: words for key, (words, _) in ONLY.items()},
            every=f"{every:g}",
            patience=patience_s or max(30.0, 5 * every),
        )
    )
    app.add_url_rule("/", "shell", lambda: shell)
    app.add_url_rule(
        "/plotly.js", "plotly", lambda: Response(plotly_script(), mimetype="text/javascript")
    )
    for answer in (answers.list, answers.study, answers.csv):
        app.add_url_rule(f"/{answer.__name__}", view_func=answer)
    return app


class _Answers:
    """The answers to a page's requests, for the URL that the page shows."""

    def __init__(self, live: Live, every: float) -> None:
        self._live, self._every = live, every

    def list(self) -> str:
        """Return the list. A periodic look asks the store; other requests reuse the newest look."""
        try:
            listed = self._live.listed(fresh_s=0.0 if request.args.get("look") else self._every)
        except ReportError as error:
            return _trouble(error)
        place, known = _requested_place(), studies(listed)
        return (
            environment()
            .get_template("list.html")
            .render(
                studies=known, found=place.listed(known), place=place, columns=SORTS, most=SHOWN
            )
        )

    def study(self) -> Response | tuple[str, int]:
        """Return the study as JSON, or 204 if the page already shows this version (`seen`)."""
        place = _requested_place()
        title = f"Study {place.study[:8]}" + (f" of {place.family}" if place.family else "")
        window = f"{title}, {VIEWS[place.view]}, spiketrain dashboard"
        if not place.study:
            return _json(title="No study is picked", window="spiketrain dashboard", html=_PICK)
        try:
            members = place.members(self._live.members(place.study))
            if not members:
                return _json(title=title, window=window, html=_NO_RUN)
            runs = place.picked(members)
            reports = self._live.reports(runs)
            version = _version(place, members, runs, reports)
            if request.args.get("seen") == version:
                return "", 204
            study = self._live.study(runs)
        except ReportError as error:
            return _json(title=title, window=window, html=_trouble(error))
        shown = None if place.runs is not None or runs == members else (len(runs), len(members))
        html, drawings, _ = _render_study(place, study, reports, shown)
        macros: Any = environment().get_template("macros.html").module
        return _json(
            title=title,
            window=window,
            version=version,
            boxes=macros.boxes(members),
            picked=[run.short for run in runs],
            html=html,
            drawings=drawings,
        )

    def csv(self) -> Response:
        """Return the data of a figure or a table."""
        place, offered = _requested_place(), {}
        try:
            runs = place.picked(self._live.members(place.study)) if place.study else []
            if runs:
                *_, offered = _render_study(
                    place, self._live.study(runs), self._live.reports(runs), None
                )
        except ReportError as error:
            return Response(f"{error}\n", 503, mimetype="text/plain")
        if (table := offered.get(request.args.get("name", ""))) is None:
            return Response("dashboard: there is no such table here\n", 404, mimetype="text/plain")
        return Response(table.to_csv(), mimetype="text/csv")


def _render_study(
    place: ViewState, study: Study, reports: Sequence[SuiteReport], newest: tuple[int, int] | None
) -> tuple[str, dict[str, Any], dict[str, Table]]:
    drawings: dict[str, Any] = {}
    offered: dict[str, Table] = {}

    def offer(key: str, table: Table, figure: Figure | None = None) -> str:
        """Register a table and its figure's drawing; return the URL of the table."""
        offered[key] = table
        if figure is not None:
            drawings[key] = drawn(figure)
        return f"/csv{place.search or '?'}&name={key}"

    def file(key: str, where: str) -> str:
        """Return a file name with the group or suite: downloads land in one folder."""
        return f"{slug(where)[:_NAME] if where else place.study[:8]}-{key}"

    sections = [section_of(group, group.key, (place.view,)) for group in study.groups]
    html = (
        environment()
        .get_template("study.html")
        .render(
            place=place,
            study=study,
            sections=sections,
            missing=[reason for each in sections for reason in each.reasons],
            reports=reports,
            newest=newest,
            scaled=tables.scaling(study) if place.view == "costs" else None,
            largest_said=LARGEST_SAID,
            offer=offer,
            file=file,
        )
    )
    return html, drawings, offered


def _requested_place() -> ViewState:
    return ViewState.at(request.query_string.decode("ascii", "replace"))


def _version(
    place: ViewState,
    members: Sequence[StoredRun],
    runs: Sequence[StoredRun],
    reports: Sequence[SuiteReport],
) -> str:
    states = [[run.id, describe_state(run.state, run.newest)] for run in members]
    news = [
        [run.newest, sorted(v for k, v in run.tags.items() if k.startswith("spiketrain.artifact."))]
        for run in runs
    ]
    known = [place.search, states, news, [report.version for report in reports]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _json(**fields: Any) -> Response:
    fields = {"version": "", "boxes": "", "picked": [], "drawings": {}, **fields}
    return Response(json.dumps(fields, allow_nan=False), mimetype="application/json")


def _trouble(error: Exception) -> str:
    macros: Any = environment().get_template("macros.html").module
    return macros.trouble(str(error)[:1].upper() + str(error)[1:])


def _seeds(seeds: Sequence[str]) -> str:
    return (
        ", ".join(seeds)
        if len(seeds) <= 6
        else f"{', '.join(seeds[:3])} ... {seeds[-1]} ({len(seeds)})"
    )


_THREADS = 8


def serve(
    *, store: str | None, runs: Path, host: str, port: int, token: str | None, every: float
) -> None:
    """Serve until interrupted. The store may be missing or unreadable at the start.

    Args:
        store: an MLflow tracking URI; None: the store of the folder `runs`.
        every: seconds between reads of the store while a page is open.

    Raises:
        ValueError: the store is of an unknown kind, the host is open to other machines without a
            token, or the port is taken.
    """
    uri = store or tracking_uri(runs)
    app = make_app(open_store(uri), name=without_password(uri), every=every)
    guard(app, host=host, token=token)
    address = "127.0.0.1" if host == "localhost" else host
    from waitress.server import create_server

    try:
        server = create_server(
            app,
            host=address,
            port=port,
            threads=_THREADS,
            ident=None,
            clear_untrusted_proxy_headers=False,  # guard.py reads one of them
        )
    except OSError as error:
        raise ValueError(
            f"dashboard: cannot listen at {host}:{port} ({error.strerror or error}); name another"
            " --port"
        ) from error
    at = f"[{address}]" if ":" in address else address
    with_token = "" if token is None else "/?token=TOKEN"
    whom = "this machine alone" if is_loopback(host) and token is None else "whoever has the token"
    print(
        f"http://{at}:{getattr(server, 'effective_port', port)}{with_token} shows"
        f" {without_password(uri)} to {whom}",
        flush=True,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    server.run()
