"""The services that a training needs, tried by `spiketrain doctor`: storage, the MLflow server, the
Ray cluster.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pipeline.core.secrets import without_secrets
from pipeline.core.shared_marker import Marker
from pipeline.launch.ray_auth import refused_token
from pipeline.track.connect import sqlite_file, without_password
from pipeline.train.checkpoint import folder_of

MLFLOW_S = 10.0
STRANGER_S = 60.0


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    state: Literal["ok", "warn", "bad"]
    """`bad`: a training would fail."""
    text: str
    advice: str = ""


def error_line(error: Exception) -> str:
    """An error in one line, without secrets of the environment."""
    return without_secrets(f"{type(error).__name__}: {' '.join(str(error).split())}")


# ---------------------------------------------------------------------------------------- storage


@dataclass(frozen=True)
class Store:
    """A place for runs or checkpoints: a folder, or an address such as s3://bucket/prefix."""

    address: str
    marker: Marker | None = None
    """The object that the driver has put there, if it could."""


@contextmanager
def marker_in_store(address: str) -> Iterator[Marker | Finding]:
    """Keep an object at an address, for which the nodes look. Yields a finding if that fails."""
    marker, doing = _new_marker(), "be opened"
    try:
        fs, root = _open(address)
        doing = "be written to"
        _write(fs, root, marker)
    except Exception as error:  # each store has errors of its own
        yield _bad_store(address, "this machine", f"cannot {doing}: {error_line(error)}")
        return
    try:
        yield marker
    finally:
        with suppress(Exception):  # the nodes report what cannot be deleted
            fs.rm_file(f"{root}/{marker.name}")


def try_store(store: Store) -> Finding:
    """Find the driver's marker. Write, list, read and delete an object of this node."""
    name, address, mine, doing = socket.gethostname(), store.address, _new_marker(), "be opened"
    try:
        fs, root = _open(address)
        doing = "be read"
        if store.marker is not None and not _holds(fs, root, store.marker):
            text = f"{name} does not see {address} as the driver does"
            advice = "mount the same storage at the same path on every node, or name such storage"
            return Finding("storage", "bad", text, f"{advice} with --runs or --checkpoints")
        doing = "be written to"
        _write(fs, root, mine)
        try:
            doing = "be listed"
            names = {PurePosixPath(each).name for each in fs.ls(root, detail=False)}
            doing = "be read"
            is_whole = mine.name in names and _holds(fs, root, mine)
            doing = "delete an object"
        finally:
            fs.rm_file(f"{root}/{mine.name}")
        free = None if folder_of(address) is None else shutil.disk_usage(root).free
    except Exception as error:  # each store has errors of its own
        return _bad_store(address, name, f"cannot {doing}: {error_line(error)}")
    if not is_whole:
        return _bad_store(address, name, "does not give back what was written")
    text = f"{name}: an object was written to {address}, read and deleted"
    if free is None:  # not a local disk
        return Finding("storage", "ok", text)
    return Finding("storage", "ok", f"{text}; {free / 1e9:.1f} GB are free")


def _bad_store(address: str, node: str, what: str) -> Finding:
    advice = "see its owner, rights and mount, and make room if the disk or a quota is full"
    if folder_of(address) is None:
        advice = "see its rights, and the keys in the environment there (AWS_ACCESS_KEY_ID; for "
        advice += "another store than Amazon's also AWS_ENDPOINT_URL)"
    return Finding("storage", "bad", f"{node}: {address} {what}", advice)


def _new_marker() -> Marker:
    return Marker(f".doctor-{secrets.token_hex(8)}", secrets.token_hex(16))


def _open(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it."""
    import fsspec

    if (folder := folder_of(address)) is not None:
        return fsspec.filesystem("file"), str(folder)
    return fsspec.url_to_fs(address.rstrip("/"), use_listings_cache=False)


def _write(fs: Any, root: str, marker: Marker) -> None:
    if "file" in fs.protocol:  # a launch makes a missing folder, and no bucket
        fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{marker.name}", marker.content.encode())


def _holds(fs: Any, root: str, marker: Marker) -> bool:
    try:
        return fs.cat_file(f"{root}/{marker.name}") == marker.content.encode()
    except FileNotFoundError:
        return False


# ----------------------------------------------------------------------------------------- MLflow


def of_mlflow(uri: str) -> Finding:
    """A file must be writable. A server must answer, and must ask for a password."""
    if (file := sqlite_file(uri)) is not None:
        return _of_sqlite(file)
    if uri.partition(":")[0] == "databricks":
        advice = "see that `spiketrain sync` reaches it"
        return Finding("mlflow", "warn", "Databricks is not asked here", advice)
    if not uri.startswith(("http://", "https://")):
        is_plain = re.fullmatch(r"[\w.:/+-]+", uri, re.ASCII)
        text = (
            "MLFLOW_TRACKING_URI must be http://HOST:PORT, https://HOST or sqlite:///FILE; "
            f"got {uri if is_plain else 'another, not shown as it may hold a password'}"
        )
        advice = "unset it to use mlflow.db in the folder of runs"
        return Finding("mlflow", "bad", text, advice)
    shown, headers = without_password(uri).rstrip("/"), _login()
    if (answer := _ask(uri, headers, None)) != "answers 200":
        advice = (
            "see MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD, or _TOKEN "
            "(a newline in it?); a training goes on "
            "without the server, and `spiketrain sync` delivers later"
        )
        return Finding("mlflow", "bad", f"{shown} {answer}", advice)
    scheme, rest = uri.split("://", 1)
    if _ask(f"{scheme}://{rest.rpartition('@')[2]}", {}, lambda request: request) == "answers 200":
        advice = "let it ask for a password: `mlflow server --app-name basic-auth` (infra/mlflow)"
        return Finding("mlflow", "warn", f"{shown} answers without a password", advice)
    return Finding("mlflow", "ok", f"{shown} answers, and asks for a password")


def _of_sqlite(file: Path) -> Finding:
    """Whether MLflow can make the file and its folder. SQLite keeps a journal beside the file."""
    try:
        with tempfile.TemporaryFile(dir=next(each for each in file.parents if each.exists())):
            pass
        if file.exists():
            with file.open("r+b"):
                pass
    except OSError as error:
        text = f"the store {file} cannot be written: {error.strerror}"
        return Finding("mlflow", "bad", text, "see its owner and rights, or MLFLOW_TRACKING_URI")
    return Finding("mlflow", "ok", f"the store is the file {file}")


def _login() -> dict[str, str]:
    """The header with which MLflow's client (3.17) logs in: name and password, else a token.

    requests itself prefers a login in the address.
    """
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        login = b64encode(f"{user}:{password}".encode()).decode()
        return {"Authorization": f"Basic {login}"}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _ask(uri: str, headers: dict[str, str], auth: Callable[[Any], Any] | None) -> str:
    """The server's reaction, such as `answers 200`.

    Without `auth`, requests logs in by the address or ~/.netrc, as it does for MLflow's client.
    Redirects are not followed: the login is for this server only, and a login page is not MLflow.
    """
    import requests

    address = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        answer = requests.get(
            address, headers=headers, auth=auth, timeout=MLFLOW_S, allow_redirects=False
        )
    except (requests.RequestException, ValueError):  # ValueError: no address, or no header
        return "does not answer"
    if answer.is_redirect:
        to = re.split("[?#]", answer.headers["Location"])[0]
        return f"sends on to {ascii(without_password(to))[1:-1]}, for example for a login"
    refusals = {401: "refuses this user", 403: "refuses this host or user"}
    return refusals.get(answer.status_code, f"answers {answer.status_code}")


# -------------------------------------------------------------------------------- the Ray cluster


def of_token(address: str) -> Finding:
    """Whether the Ray cluster at `address` refuses a process without its token."""
    outcome, said = join_without_token(address)
    if outcome == "joined":
        advice = "start Ray with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH: now whoever reaches "
        advice += "it can run code as you"
        return Finding("auth", "bad", f"the Ray at {address} lets everybody in", advice)
    if outcome == "unclear":
        text = f"it is unclear whether the Ray at {address} asks for its token: {said}"
        advice = "see that RAY_AUTH_MODE=token is set where it is started"
        return Finding("auth", "warn", text, advice)
    return Finding("auth", "ok", f"the Ray at {address} asks for its token")


def join_without_token(
    address: str, *, patience_s: float = STRANGER_S
) -> tuple[Literal["joined", "refused", "unclear"], str]:
    """Try to join the Ray cluster at `host:port` or `ray://...` from a process without a token.

    Returns: the outcome, and the reason if it is unclear.
    """
    join = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as stderr:
        environment = kept | {"HOME": home, "RAY_AUTH_MODE": "disabled"}  # no token in that home
        streams = {"stdout": subprocess.DEVNULL, "stderr": stderr}
        command = [sys.executable, "-c", join, address]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, **streams)
        deadline, lines, code = time.monotonic() + patience_s, [], None
        try:
            # Ray would go on trying for a minute after a refusal.
            while code is None and not refused_token(lines) and time.monotonic() < deadline:
                time.sleep(0.2)
                code = process.poll()
                # pread leaves the position at which the process writes.
                text = os.pread(stderr.fileno(), 1 << 20, 0).decode(errors="replace")
                lines = [line.strip() for line in text.splitlines() if line.strip()]
        finally:
            process.kill()
            process.wait()
    if refused_token(lines):
        return "refused", ""
    if code == 0:
        return "joined", ""
    if code is None:
        return "unclear", f"no answer within {patience_s:.0f} s"
    return "unclear", lines[-1] if lines else f"it ended with {code}"
