"""A client of MLflow without telemetry, which gives up on a dead server in seconds."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.secrets import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
_LOGIN = re.compile(r"//(?:[^/\s:]*:\S*|[^/\s]*)@")


class TrackingError(RuntimeError):
    """A tracking store could not be reached or read; the message is one line for a user."""


def connect(uri: str) -> MlflowClient:
    """The first client for an SQLite file makes the file and its schema, which takes seconds."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # 3.17.2 retries 7 times with 120 s each. Here the owner of the client retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # if somebody imported it before the variables were set
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger(name).level))
    return MlflowClient(tracking_uri=uri)


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite store; None for another kind."""
    return Path(uri.removeprefix(SQLITE)).absolute() if uri.startswith(SQLITE) else None


def without_password(text: str) -> str:
    """A text without the users and passwords of the addresses in it.

    A password follows a colon, may contain an unquoted /, and ends at the last @ of the word. So an
    address with a colon before its first / and an @ after it loses what lies between.
    """
    return _LOGIN.sub("//", text)


def reason(uri: str, error: Exception) -> str:
    """Kind and first line of an error of a store, without a secret."""
    login = _LOGIN.search(uri)
    if login is not None and re.search("[/?#]", login[0].removeprefix("//")):
        # MLflow's client (3.17.2) ends the host there, and its error shows parts of the password.
        said = "/ ? and # in the password of an address must be written %2F %3F and %23"
    else:  # cut last: half an address is not known for one
        said = (without_password(without_secrets(str(error))).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {said}"


def one_line(uri: str, error: Exception) -> str:
    """The error of a store in one line for a user."""
    if isinstance(error, TrackingError):
        return str(error)
    return f"MLflow at {without_password(uri)} cannot be filled ({reason(uri, error)})"


@contextmanager
def tracking_errors(uri: str) -> Iterator[None]:
    """Turn any error of MLflow, its store or its transport into a TrackingError of one line."""
    try:
        yield
    except Exception as error:
        raise TrackingError(one_line(uri, error)) from error
