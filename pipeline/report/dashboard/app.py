"""The server of `spiketrain dashboard`: a page, and the parts that `web/dashboard.js` requests.

The URL is the only state: it determines the list and the figures (permalink.py). Without a study,
it shows the newest one. An open page requests the list and its studies periodically. The server
reads journals only for these studies.
Without a token, the server listens only on loopback.
"""

import hashlib
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flask import Flask, Response, request
from markupsafe import Markup

from pipeline.core.printing import new_console, say
from pipeline.core.units import first_few
from pipeline.report.claims import SuiteReport
from pipeline.report.dashboard.guard import guard
from pipeline.report.dashboard.live import Live
from pipeline.report.dashboard.permalink import ViewState, describe_states
from pipeline.report.drawing import slug
from pipeline.report.page import (
    VIEWS,
    WEB,
    Offers,
    environment,
    plotly_script,
    section_of,
    what_to_show,
)
from pipeline.report.results import ReportError, describe_state
from pipeline.report.stores import Store, StoredRun, StoredStudy, open_store, studies
from pipeline.report.study import Study
from pipeline.report.titles import difference, facts_of
from pipeline.track.mlflow import tracking_uri
from pipeline.track.mlflow_store import without_password

MAX_STUDIES = 200  # in a list
_NO_RUN = "The store has no run of this study"
_WINDOW = "spiketrain dashboard"
_PLOTLY = "/plotly.js"
_FRESH_S = 0.5  # the age of the list of runs in which a study is looked up
# A browser keeps plotly.js, because the page's address of it names its content.
_KEPT = {"Content-Encoding": "gzip", "Cache-Control": "private, max-age=31536000, immutable"}


def make_app(store: Store, *, name: str, every: float) -> Flask:
    """Make the server.

    Args:
        name: the name of the store on the page.
        every: seconds between the periodic requests of an open page. A page repeats a request
            that is unanswered for 5 times as long, at least for 30 s.
    """
    environment().filters |= {
        "seeds": lambda seeds: first_few(seeds, 6),
        "states": describe_states,
        "moment": lambda s: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(s)),
    }
    app = Flask(__name__, static_folder=str(WEB), static_url_path="/web", template_folder=None)
    endpoints = _Endpoints(Live(store), every)
    shell = (
        environment()
        .get_template("dashboard.html")
        .render(
            name=name,
            plotly=f"{_PLOTLY}?{hashlib.sha256(plotly_script()).hexdigest()[:8]}",
            every=f"{every:g}",
            patience=max(30.0, 5 * every),
        )
    )
    app.add_url_rule("/", "shell", lambda: shell)
    app.add_url_rule(
        _PLOTLY,
        "plotly",
        lambda: Response(plotly_script(), mimetype="text/javascript", headers=_KEPT),
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
        view = _requested_view()
        try:
            fresh_s = 0.0 if request.args.get("look") else self._every
            all_studies = studies(self._live.listed(fresh_s=fresh_s))
        except ReportError as error:
            return _trouble(error)
        listed = [(each, _differs(each, all_studies)[1]) for each in view.listed(all_studies)]
        return (
            environment()
            .get_template("list.html")
            .render(studies=all_studies, listed=listed, view=view, max_studies=MAX_STUDIES)
        )

    def study(self) -> dict[str, Any] | tuple[str, int]:
        """Return a study as JSON, or 204 if the page already shows this version (`seen`)."""
        try:
            view, all_runs = self._opened()
            members = view.members(all_runs)
            if not members:
                return {"window": _WINDOW, "html": _trouble(_NO_RUN)}
            runs = view.picked(members)
            reports = self._live.reports(runs)
            version = _version(view, members, runs, reports)
            if request.args.get("seen") == version:
                return "", 204
            study = self._live.study(runs)
        except ReportError as error:
            return {"window": _WINDOW, "html": _trouble(error)}
        newest = None if view.runs is not None or runs == members else (len(runs), len(members))
        found = studies(members)[0]
        html, offers = _render_study(
            view,
            study,
            reports,
            is_second="second" in request.args,
            title=found.title,
            facts=facts_of(found.fields),
            differs=_differs(found, studies(all_runs), view.beside),
            hash=found.study[:8],
            members=members,
            picked=runs,
            newest=newest,
        )
        return {
            "study": found.study,
            "family": found.experiment,
            "window": f"{found.title}, {VIEWS[view.view]}, {_WINDOW}",
            "version": version,
            "html": html,
            "drawings": offers.drawings,
        }

    def csv(self) -> Response:
        name = request.args.get("name", "")
        shown: Any = {"title": "", "facts": "", "differs": (), "hash": "", "newest": None}
        try:
            view, all_runs = self._opened()
            runs = view.picked(all_runs)
            shown |= {"members": runs, "picked": runs}
            study, reports = self._live.study(runs), self._live.reports(runs)
        except ReportError as error:
            return Response(f"{error}\n", 503, mimetype="text/plain")
        table = _render_study(view, study, reports, **shown)[1].tables.get(name)
        if table is None:
            return Response(
                f"dashboard: there is no table {name[:100]!r}\n", 404, mimetype="text/plain"
            )
        return Response(table.to_csv(), mimetype="text/csv")

    def _opened(self) -> tuple[ViewState, Sequence[StoredRun]]:
        """Return the requested view, of the newest study if it names none, and all runs.

        The requests of a look, which follow one another at once, share a list of the runs.
        """
        view, all_runs = _requested_view(), self._live.listed(fresh_s=_FRESH_S)
        if not view.study and all_runs:
            view = view.at_study(studies(all_runs)[0])
        return view, all_runs


def _differs(study: StoredStudy, known: Sequence[StoredStudy], beside: str = "") -> tuple[str, str]:
    """The name of another study and the difference from it; both are empty without one.

    The other study has the key `beside`, or else it is the next older one of the family.
    """
    others = [each for each in known if each.study != study.study]
    at_side = [each for each in others if each.study == beside]
    family = [each for each in others if each.experiment == study.experiment]
    older = [each for each in family if each.newest < study.newest]
    for other in (*at_side, *older, *family):
        name = "beside it" if at_side else f"before it, {other.title.partition(':')[0]}"
        return name, difference(study.fields, other.fields)
    return "", ""


def _render_study(
    view: ViewState,
    study: Study,
    reports: Sequence[SuiteReport],
    *,
    is_second: bool = False,
    **shown: Any,
) -> tuple[str, Offers]:
    """Return the HTML of a study, with its drawings and the tables of its CSV links.

    Two studies on one page may share groups, suites and titles. Therefore the second one's ids,
    drawings and labels have a mark, which its CSV links omit.
    """
    mark, label = ("beside-", ", beside") if is_second else ("", "")
    link = f"/csv{view.search or '?'}&name="
    offers = Offers(study.title, lambda key: link + key.removeprefix(mark))
    sections = [
        section_of(group, mark + group.key, (view.view,), among=study.groups)
        for group in study.groups
    ]
    reports = [replace(report, key=mark + report.key) for report in reports]
    variables = what_to_show(study, sections, offers, [view.view], reports, mark=mark, label=label)
    place = f"{mark}{view.study[:8]}-{slug(view.family)}"
    template = environment().get_template("study.html")
    return template.render(**variables, **shown, place=place), offers


def _requested_view() -> ViewState:
    """The requested view; `second` requests that of the second study."""
    query = request.query_string.decode("ascii", "replace")
    return ViewState.at(query, second="second" in request.args)


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


def _trouble(reason: object) -> str:
    text = str(reason)
    note = "<p class='note' role='alert'>{}.</p>"
    return Markup(note).format(text[:1].upper() + text[1:])


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
    url = f"http://{url_host}:{getattr(server, 'effective_port', port)}{query}"
    shown = without_password(uri)
    say(console := new_console(), f"{url} shows {shown} to {readers}", whole=[url, shown])
    console.file.flush()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell makes background jobs ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    server.run()
