"""`spiketrain dashboard`: a waitress server, on loopback unless a token guards it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from pipeline.report.dashboard.guard import guard, is_loopback, refuse_open_to_others
from pipeline.report.stores import open_store
from pipeline.track.connect import without_password
from pipeline.track.mlflow import tracking_uri

_THREADS = 8


def serve(
    *, store: str | None, runs: Path, host: str, port: int, token: str | None, every: float
) -> None:
    """Serve until interrupted. The store need not exist or be readable yet.

    Args:
        store: an MLflow tracking URI; None: that of the folder `runs`.
        every: seconds between looks at the store while a page is open.

    Raises:
        ValueError: the store is of an unknown kind, the host is open to others without a token,
            or the port is taken.
    """
    refuse_open_to_others(host, token)
    uri = store or tracking_uri(runs)
    opened = open_store(uri)
    from waitress.server import create_server

    from pipeline.report.dashboard.app import make_app

    app = make_app(opened, name=without_password(uri), every=every)
    guard(app, host=host, token=token)
    address = "127.0.0.1" if host == "localhost" else host
    try:
        kept: dict[str, Any] = {
            "clear_untrusted_proxy_headers": False
        }  # guard.py reads one of them
        server = create_server(app, host=address, port=port, threads=_THREADS, ident=None, **kept)
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
    for number in (signal.SIGINT, signal.SIGTERM):  # background jobs of a shell ignore the first
        signal.signal(number, signal.default_int_handler)
    server.run()
