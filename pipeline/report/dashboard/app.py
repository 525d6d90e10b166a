"""The server of `spiketrain dashboard`: a page, and the parts that `web/dashboard.js` requests.

The URL is the only state: it determines the list and the figures (permalink.py). An open page
requests the list and the study periodically. The server reads journals only for the picked study.
Without a token, the server listens only on loopback.
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
from pipeline.report.dashboard.guard import guard
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

MAX_STUDIES = 200  # in a list
_MAX_NAME = 120  # letters of a group or suite in a file name, which may have 255 bytes
_PICK = "<p class='lede'>Pick one from the list above.</p>"
_NO_RUN = "<p class='note'>The store has no run of this study.</p>"


def make_app(store: Store, *, name: str, every: float, patience_s: float | None = None) -> Flask:
    """Make the server.

    Args:
        name: the name of the store on the page.
        every: seconds between the periodic requests of an open page.
        patience_s: seconds after which a page repeats an unanswered request; None: 5 times
            `every`, at least 30.
    """
    environment().filters |= {
        "seeds": _seeds,
        "states": describe_states,
        "moment": lambda s: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(s)),
    }
    app = Flask(__name__, static_folder=str(WEB), static_url_path="/web", template_folder=None)
    endpoints = _Endpoints(Live(store), every)
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
    for endpoint in (endpoints.list, endpoints.study, endpoints.csv):
        app.add_url_rule(f"/{endpoint.__name__}", view_func=endpoint)
    return app


class _Endpoints:
    """The endpoints that a page requests. Each request has the query of the page's URL."""

    def __init__(self, live: Live, every: float) -> None:
        self._live, self._every = live, every

    def list(self) -> str:
        """Return the list. Periodic requests (`look`) read the store; others may use the cache."""
        try:
            runs = self._live.listed(fresh_s=0.0 if request.args.get("look") else self._every)
        except ReportError as error:
            return _trouble(error)
        view, all_studies = _requested_view(), studies(runs)
        return (
            environment()
            .get_template("list.html")
            .render(
                studies=all_studies,
                listed=view.listed(all_studies),
                view=view,
                columns=SORTS,
                max_studies=MAX_STUDIES,
            )
        )

    def study(self) -> Response | tuple[str, int]:
        """Return the study as JSON, or 204 if the page already shows this version (`seen`)."""
        view = _requested_view()
        title = f"Study {view.study[:8]}" + (f" of {view.family}" if view.family else "")
        window = f"{title}, {VIEWS[view.view]}, spiketrain dashboard"
        if not view.study:
            return _json(title="No study is picked", window="spiketrain dashboard", html=_PICK)
        try:
            members = view.members(self._live.members(view.study))
            if not members:
                return _json(title=title, window=window, html=_NO_RUN)
            runs = view.picked(members)
            reports = self._live.reports(runs)
            version = _version(view, members, runs, reports)
            if request.args.get("seen") == version:
                return "", 204
            study = self._live.study(runs)
        except ReportError as error:
            return _json(title=title, window=window, html=_trouble(error))
        newest = None if view.runs is not None or runs == members else (len(runs), len(members))
        html, drawings, _ = _render_study(view, study, reports, newest)
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
        view, downloads = _requested_view(), {}
        try:
            runs = view.picked(self._live.members(view.study)) if view.study else []
            if runs:
                *_, downloads = _render_study(
                    view, self._live.study(runs), self._live.reports(runs), None
                )
        except ReportError as error:
            return Response(f"{error}\n", 503, mimetype="text/plain")
        name = request.args.get("name", "")
        if (table := downloads.get(name)) is None:
            return Response(
                f"dashboard: there is no table {name[:100]!r}\n", 404, mimetype="text/plain"
            )
        return Response(table.to_csv(), mimetype="text/csv")


def _render_study(
    view: ViewState, study: Study, reports: Sequence[SuiteReport], newest: tuple[int, int] | None
) -> tuple[str, dict[str, Any], dict[str, Table]]:
    """Return the HTML of a study, and by key its drawings and the tables of its CSV links.

    `newest`: the numbers of shown and of all runs, if only the newest runs are shown.
    """
    drawings: dict[str, Any] = {}
    downloads: dict[str, Table] = {}

    def offer(key: str, table: Table, figure: Figure | None = None) -> str:
        """Register a table and its figure's drawing; return the URL of the table."""
        downloads[key] = table
        if figure is not None:
            drawings[key] = drawn(figure)
        return f"/csv{view.search or '?'}&name={key}"

    def file(key: str, where: str) -> str:
        """Return a file name that is unique among the downloads of all groups and suites."""
        return f"{slug(where)[:_MAX_NAME] if where else view.study[:8]}-{key}"

    sections = [section_of(group, group.key, (view.view,)) for group in study.groups]
    html = (
        environment()
        .get_template("study.html")
        .render(
            view=view,
            study=study,
            sections=sections,
            missing=[reason for each in sections for reason in each.reasons],
            reports=reports,
            newest=newest,
            scaled=tables.scaling(study) if view.view == "costs" else None,
            largest_said=LARGEST_SAID,
            offer=offer,
            file=file,
        )
    )
    return html, drawings, downloads


def _requested_view() -> ViewState:
    return ViewState.at(request.query_string.decode("ascii", "replace"))


def _version(
    view: ViewState,
    members: Sequence[StoredRun],
    runs: Sequence[StoredRun],
    reports: Sequence[SuiteReport],
) -> str:
    """A digest of all that the page of a study shows."""
    states = [[run.id, describe_state(run.state, run.newest)] for run in members]
    contents = [
        [run.newest, sorted(v for k, v in run.tags.items() if k.startswith("spiketrain.artifact."))]
        for run in runs
    ]
    shown = [view.search, states, contents, [report.version for report in reports]]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def _json(**fields: Any) -> Response:
    fields = {"version": "", "boxes": "", "picked": [], "drawings": {}, **fields}
    return Response(json.dumps(fields, allow_nan=False), mimetype="application/json")


def _trouble(error: Exception) -> str:
    macros: Any = environment().get_template("macros.html").module
    return macros.trouble(str(error)[:1].upper() + str(error)[1:])


def _seeds(seeds: Sequence[str]) -> str:
    if len(seeds) <= 6:
        return ", ".join(seeds)
    return f"{', '.join(seeds[:3])} ... {seeds[-1]} ({len(seeds)})"


_THREADS = 8


def serve(
    *, store: str | None, runs: Path, host: str, port: int, token: str | None, every: float
) -> None:
    """Serve until interrupted. The store may be missing or unreadable at the start.

    Args:
        store: an MLflow tracking URI; None: the store of the folder `runs`.
        every: seconds between reads of the store while a page is open.

    Raises:
        ValueError: the store's URI has an unknown scheme, the host is open to other machines
            without a token, the token is empty, or the server cannot listen at the address.
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
    url_host = f"[{address}]" if ":" in address else address
    query = "" if token is None else "/?token=TOKEN"
    readers = "everyone with the token" if token is not None else "this machine only"
    print(
        f"http://{url_host}:{getattr(server, 'effective_port', port)}{query} shows"
        f" {without_password(uri)} to {readers}",
        flush=True,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell makes background jobs ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    server.run()
