"""Whether the tracking server answers, and not to everybody."""

from __future__ import annotations

import os
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from http.client import HTTPException

from pipeline.doctor.findings import Finding
from pipeline.track.connect import without_password

MLFLOW_S = 10.0


def of_mlflow(uri: str) -> Finding:
    """A store that is a file is as good as the folder it lies in; a server must answer, and not to everybody."""
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return Finding(
            check="mlflow", state="ok", told="the store is a file; `spiketrain dashboard` and others on this machine see it"
        )
    shown = without_password(uri).rstrip("/")
    answer = _asked(shown, _login(parts))
    if answer != 200:
        what = {401: "refuses this user", 403: "refuses this host or user"}.get(answer or 0, f"answers {answer or 'nothing'}")
        advice = (
            "see MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD, or _TOKEN; "
            "a training goes on without it, `spiketrain sync` delivers later"
        )
        return Finding(check="mlflow", state="bad", told=f"{shown} {what}", advice=advice)
    if _asked(shown, None) == 200:
        advice = "put it behind a password: mlflow server --app-name basic-auth, as in infra/mlflow"
        return Finding(check="mlflow", state="look", told=f"{shown} answers whoever asks", advice=advice)
    return Finding(check="mlflow", state="ok", told=f"{shown} answers, and asks for a password")


def _login(parts: urllib.parse.SplitResult) -> str | None:
    """As MLflow's client shows itself (3.17): by what stands in the address, else by a name and password, else by a token."""
    user, secret = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if parts.username is not None:
        user, secret = (urllib.parse.unquote(each or "") for each in (parts.username, parts.password))
    if user and secret:
        return "Basic " + b64encode(f"{user}:{secret}".encode()).decode()
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return f"Bearer {token}" if token else None


def _asked(server: str, login: str | None) -> int | None:
    """The status of its answer, None where there is none."""
    request = urllib.request.Request(f"{server}/api/2.0/mlflow/experiments/search?max_results=1")
    if login is not None:
        request.add_header("Authorization", login)
    try:
        with urllib.request.urlopen(request, timeout=MLFLOW_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException):  # the one where nobody is there, the other where it does not speak HTTP
        return None
