"""The dashboard's server: waitress, which answers several readers at once, on loopback unless a
token guards it.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from pipeline.report.dashboard.guard import guard, is_loopback, refuse_open_to_others
from pipeline.report.store import open_store
from pipeline.track.connect import without_password
from pipeline.track.mlflow import tracking_uri

_THREADS = 8


def serve(
    *, store: str | None, runs: Path, host: str, port: int, token: str | None, every: float
) -> None:
    """Answer until interrupted. A store that is not there yet, or cannot be read, is waited for.

    Args:
        store: an MLflow tracking URI; None: that of the folder `runs`.
        every: seconds between looks at the store while a page is open.

    Raises:
        ValueError: the store is of a kind that cannot be read, the host is open to others without a
        token, the port is taken.
    """
    refuse_open_to_others(host, token)
    uri = store or tracking_uri(runs)
    opened = open_store(uri)
    from waitress.server import create_server

    from pipeline.report.dashboard.app import make_app

    app = make_app(opened, name=without_password(uri), every=every)
    guard(
        app.server,
        host=host,
        token=token,
        scripts=[f"'{each.strip(chr(39))}'" for each in app.csp_hashes()],
    )
    address = "127.0.0.1" if host == "localhost" else host
    try:
        kept: dict[str, Any] = {
            "clear_untrusted_proxy_headers": False
        }  # guard.py reads one of them
        server = create_server(
            app.server, host=address, port=port, threads=_THREADS, ident=None, **kept
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
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a shell's background jobs are born deaf to the first
        signal.signal(number, signal.default_int_handler)
    server.run()
