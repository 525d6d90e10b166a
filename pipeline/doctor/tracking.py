"""Whether the tracking server answers, and not to everybody; of a store that is a file, whether it may be written."""

from __future__ import annotations

import os
import re
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO

from pipeline.doctor.findings import Finding
from pipeline.track.connect import sqlite_file, without_password

MLFLOW_S = 10.0


def of_mlflow(uri: str) -> Finding:
    """A store that is a file must be one that may be written; a server must answer, and not to everybody."""
    if (file := sqlite_file(uri)) is not None:
        return _of_file(file)
    if not uri.startswith(("http://", "https://")):
        return _of_another(uri)
    parts = urllib.parse.urlsplit(uri)
    shown, login = without_password(uri).rstrip("/"), _login(parts)
    server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")  # what is shown may be cut further
    if login is not None and not _fits_a_header(login):
        advice = "see MLFLOW_TRACKING_TOKEN: a newline at its end, for example"
        return Finding(check="mlflow", state="bad", told="the token holds a character that no header may", advice=advice)
    answer = _asked(server, login)
    if answer.status != 200:
        advice = (
            "see MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD, or _TOKEN; "
            "a training goes on without it, `spiketrain sync` delivers later"
        )
        return Finding(check="mlflow", state="bad", told=f"{shown} {_said(answer, login)}", advice=advice)
    if _asked(server, None).status == 200:
        advice = "put it behind a password: `mlflow server --app-name basic-auth`, as in infra/mlflow"
        return Finding(check="mlflow", state="look", told=f"{shown} answers whoever asks", advice=advice)
    return Finding(check="mlflow", state="ok", told=f"{shown} answers, and asks for a password")


def _of_file(file: Path) -> Finding:
    """MLflow (3.17) makes what is missing of its folder; SQLite keeps a journal beside the file."""
    try:
        with tempfile.TemporaryFile(dir=next(each for each in file.parents if each.exists())):
            pass
        if file.exists():
            with file.open("r+b"):
                pass
    except OSError as error:
        told = f"the store {file} may not be written: {error.strerror}"
        return Finding(check="mlflow", state="bad", told=told, advice="see its owner and rights, or MLFLOW_TRACKING_URI")
    told = "the store is a file; `spiketrain dashboard` and others on this machine see it"
    return Finding(check="mlflow", state="ok", told=told)


def _of_another(uri: str) -> Finding:
    """What MLflow may know, and nobody here asks; of what may hold a password nothing is shown."""
    if uri.partition(":")[0] == "databricks":
        advice = "nobody asks Databricks here; see that `spiketrain sync` reaches it"
        return Finding(check="mlflow", state="look", told="whether Databricks answers could not be told", advice=advice)
    got = uri if re.fullmatch(r"[\w.:/+-]+", uri, re.ASCII) else "another, not shown: it may hold a password"
    told = f"MLFLOW_TRACKING_URI must be http://HOST:PORT, https://HOST or sqlite:///FILE; got {got}"
    advice = "write it so, or unset it: the store is mlflow.db in the folder of runs then"
    return Finding(check="mlflow", state="bad", told=told, advice=advice)


def _login(parts: urllib.parse.SplitResult) -> str | None:
    """As MLflow's client shows itself (3.17): by what stands in the address, else by a name and password, else by a token."""
    user, secret = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if parts.username is not None:
        user, secret = (urllib.parse.unquote(each or "") for each in (parts.username, parts.password))
    if user and secret:
        return "Basic " + b64encode(f"{user}:{secret}".encode()).decode()
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return f"Bearer {token}" if token else None


def _fits_a_header(text: str) -> bool:
    """http.client raises ValueError for others, which holds the text."""
    return text.isprintable() and all(ord(character) < 256 for character in text)


@dataclass(frozen=True)
class _Answer:
    status: int | None
    """None: there is none"""
    sent_to: str = ""
    """where whoever asks is to ask instead"""


def _said(answer: _Answer, login: str | None) -> str:
    if answer.sent_to:
        on = f"sends on to {answer.sent_to}"
        return on if login is not None else f"asks for a login: it {on}"
    return {401: "refuses this user", 403: "refuses this host or user", None: "answers nothing"}.get(
        answer.status, f"answers {answer.status}"
    )


def _asked(server: str, login: str | None) -> _Answer:
    request = urllib.request.Request(f"{server}/api/2.0/mlflow/experiments/search?max_results=1")
    if login is not None:
        request.add_header("Authorization", login)
    try:
        with urllib.request.build_opener(_Stays).open(request, timeout=MLFLOW_S) as answer:
            return _Answer(int(answer.status))
    except urllib.error.HTTPError as error:
        place = error.headers.get("Location", "") if 300 <= error.code < 400 else ""
        return _Answer(error.code, sent_to=ascii(without_password(re.split("[?#]", place)[0]))[1:-1])
    # Where nobody is there, where it does not speak HTTP, and where no host can be called so.
    except (OSError, HTTPException, ValueError):
        return _Answer(None)


class _Stays(urllib.request.HTTPRedirectHandler):
    """Follows to no other place: the login is for this server alone, and a page that asks for one is no answer."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None
