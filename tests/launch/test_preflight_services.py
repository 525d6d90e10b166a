"""Storage, an MLflow server and a Ray cluster are tried; no secret is shown."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.core.shared_marker import Marker
from pipeline.launch.preflight_services import (
    Finding,
    Store,
    join_without_token,
    marker_in_store,
    of_mlflow,
    of_token,
    try_store,
)
from tests.helpers.nodes import TOKEN, nodes
from tests.helpers.s3 import s3_server

# ---------------------------------------------------------------------------------------- storage


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in ("folder", "file"):
        return {"folder": "", "file": "file://"}[request.param] + str(tmp_path / "not" / "there")
    is_memory = request.param == "memory"
    base = "memory://checkpoints" if is_memory else request.getfixturevalue("bucket")
    return f"{base}/{uuid.uuid4().hex}"


def names(address: str) -> list[str]:
    fs, root = fsspec.url_to_fs(address, use_listings_cache=False, skip_instance_cache=True)
    return fs.find(root)


def test_an_object_is_written_found_read_and_deleted(address: str) -> None:
    with marker_in_store(address) as marker:
        assert isinstance(marker, Marker) and len(names(address)) == 1
        found = try_store(Store(address, marker))
        assert len(names(address)) == 1
    assert found.state == "ok" and f"an object was written to {address}" in found.text
    assert ("GB are free" in found.text) == ("not/there" in address)
    assert names(address) == []


def test_another_place_of_the_same_name(tmp_path: Path) -> None:
    """Each node may have a disk of its own there."""
    with marker_in_store(str(tmp_path / "one")) as marker:
        assert isinstance(marker, Marker)
        found = try_store(Store(str(tmp_path / "two"), marker))
    assert found.state == "bad" and f"does not see {tmp_path / 'two'} as" in found.text
    assert not (tmp_path / "two").exists()


def test_a_bucket_that_is_not_there_is_not_made(bucket: str) -> None:
    said = "s3://another/prefix cannot be written to: FileNotFoundError: The specified bucket does"
    assert said in try_store(Store("s3://another/prefix")).text
    with marker_in_store("s3://another/prefix") as found:
        assert isinstance(found, Finding) and found.text.startswith(f"this machine: {said}")
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    assert fs.ls("", detail=False) == [bucket.removeprefix("s3://")]


@pytest.mark.parametrize(
    ("name", "doing"),
    [
        ("pipe_file", "be written to"),
        ("ls", "be listed"),
        ("cat_file", "be read"),
        ("rm_file", "delete an object"),
    ],
)
def test_what_is_forbidden_is_named_and_no_secret_is(
    name: str, doing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(self: MemoryFileSystem, *args: object, **kwargs: object) -> None:
        raise PermissionError("Access Denied\nto AKIAPLANTED with planted-secret")

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("MONKEY", "to")  # a word that is no secret, for all its name
    address = f"memory://{uuid.uuid4().hex}"
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, name, denied)
        found = try_store(Store(address))
    said = "PermissionError: Access Denied to $AWS_ACCESS_KEY_ID with $AWS_SECRET_ACCESS_KEY"
    assert found.text.endswith(f"{address} cannot {doing}: {said}")
    assert names(address) == [] or name == "rm_file"


def test_a_store_that_gives_back_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *given: b"other")
    found = try_store(Store(f"memory://{uuid.uuid4().hex}"))
    assert found.state == "bad" and found.text.endswith("does not give back what was written")


def test_a_store_that_nothing_here_opens() -> None:
    said = "nosuch://x cannot be opened: ValueError: Protocol not known: nosuch"
    assert said in try_store(Store("nosuch://x")).text


# ----------------------------------------------------------------------------------------- MLflow


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@contextmanager
def server(
    *, password: str | None, refuses: int = 401, sends_to: str = ""
) -> Iterator[tuple[str, list[str | None]]]:
    """Its HOST:PORT, and the logins that were shown to it."""
    shown: list[str | None] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers.get("Authorization"))
            is_let_in = password is None or shown[-1] == password
            self.send_response(200 if is_let_in else refuses)
            if sends_to and not is_let_in:
                self.send_header("Location", sends_to)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{http.server_port}", shown
        http.shutdown()


ME = "Basic bWU6cGFzcw=="  # me:pass


def test_a_tracking_server() -> None:
    with server(password=ME) as (place, _):
        assert of_mlflow(f"http://{place}").text.endswith("refuses this user")
        found = of_mlflow(f"http://me:pass@{place}")
        assert found.state == "ok" and "pass@" not in found.text
    with server(password=None) as (place, _):
        assert of_mlflow(f"http://{place}").state == "warn"
    assert of_mlflow(f"http://{place}").text == f"http://{place} does not answer"


def test_a_store_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow makes it and its folder."""
    for file in (kept := tmp_path / "x.db", tmp_path / "not" / "there" / "x.db"):
        assert of_mlflow(f"sqlite:///{file}").state == "ok"
    kept.touch()
    assert of_mlflow(f"sqlite:///{kept}").state == "ok"
    assert [*tmp_path.iterdir()] == [kept]
    for file, why in ((kept / "x.db", "Not a directory"), (tmp_path, "Is a directory")):
        found = of_mlflow(f"sqlite:///{file}")
        assert found.text == f"the store {file} cannot be written: {why}" and found.advice

    def full(**given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert of_mlflow(f"sqlite:///{kept}").text.endswith("written: No space left on device")


@pytest.mark.parametrize(
    "uri",
    ["mlflow.example.org:5000", "htp://a", "sqlite:x.db", "sqlite://", "./mlruns", "http:example"],
)
def test_what_is_not_an_address_of_a_store(uri: str) -> None:
    found = of_mlflow(uri)
    assert found.state == "bad" and "must be http://HOST:PORT" in found.text
    assert found.text.endswith(f"; got {uri}") and found.advice


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://u:planted@nobody/x",
        "postgresql://nobody/x?password=planted",
        "me:planted@mlflow.example.org",
        "planted@a",
    ],
)
def test_a_password_in_it_is_not_shown(uri: str) -> None:
    found = of_mlflow(uri)
    assert found.state == "bad" and "planted" not in found.text + found.advice


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile"])
def test_databricks_is_not_asked(uri: str) -> None:
    assert of_mlflow(uri).state == "warn"


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_something_that_is_not_a_web_server(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        found = of_mlflow(f"http://127.0.0.1:{listening.getsockname()[1]}")
    assert found.state == "bad" and found.text.endswith("does not answer")


def test_a_login_is_shown_as_mlflow_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a name and password, in the address or not, else by a token."""
    with server(password="Basic bWU6cEBzcw==") as (place, _):  # me:p@ss
        found = of_mlflow(f"http://me:p%40ss@{place}")
        assert found.state == "ok" and "p%40ss" not in found.text
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p@ss")
        assert of_mlflow(f"http://{place}").state == "ok"
    with server(password="Bearer tok") as (place, _):
        assert of_mlflow(f"http://{place}").text.endswith("refuses this user")
        monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
        found = of_mlflow(f"http://{place}")
        assert found.state == "ok" and "tok" not in found.text
        assert of_mlflow(f"http://me:p%40ss@{place}").state == "bad"


def test_a_login_of_netrc_is_not_shown_where_none_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client logs in by it, through requests."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pass\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with server(password=ME) as (place, shown):
        assert of_mlflow(f"http://{place}").state == "ok"
    assert shown == [ME, None]


@pytest.mark.parametrize("token", ["planted-token\n", "planted\ntoken", "planted-t€ken"])
def test_a_token_that_no_header_may_hold_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
    with server(password="Bearer x") as (place, _):
        found = of_mlflow(f"http://{place}")
    assert found.state == "bad" and "_TOKEN (a newline in it?)" in found.advice
    assert "planted" not in found.text + found.advice


def test_addresses_that_lead_nowhere() -> None:
    """A password that nobody has quoted ends the host; MLflow's client finds no server either."""
    with server(password=None) as (place, _):
        found = of_mlflow(f"http://me:planted/planted@{place}")
        assert found.text == f"http://{place} does not answer"
    assert of_mlflow(f"http://{'x' * 64}.example").text.endswith("does not answer")  # a long name


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(code: int) -> None:
    """The login is meant for this server, and the other page is no answer of MLflow's."""
    with server(password=None) as (page, shown):
        to = f"http://user:planted@{page}/sign-in"
        asks = {"refuses": code, "sends_to": f"{to}?token=planted"}
        with server(password=ME, **asks) as (place, _):
            for login in ("", "you:pass@"):
                found = of_mlflow(f"http://{login}{place}")
                said = f"http://{place} sends on to http://{page}/sign-in, for example for a login"
                assert (found.state, found.text) == ("bad", said)
            assert of_mlflow(f"http://me:pass@{place}").state == "ok"
        assert shown == []


# -------------------------------------------------------------------------------- the Ray cluster


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("mode", "mark", "said"),
    [("token", "ok", "asks for its token"), ("disabled", "BAD", "lets everybody in")],
)
def test_what_doctor_says_of_a_ray(tmp_path: Path, mode: str, mark: str, said: str) -> None:
    with nodes({"RAY_AUTH_MODE": mode}) as cluster:
        # Of several clusters on this machine `auto` is the one that RAY_ADDRESS names.
        environment = {**os.environ, **TOKEN, "RAY_AUTH_MODE": mode}
        environment |= {"RAY_ADDRESS": cluster.address, "COLUMNS": "300"}
        kept = tmp_path / "kept"
        words = [sys.executable, "-m", "pipeline", "doctor", "--address", "auto"]
        words += ["--runs", str(tmp_path / "runs"), "--checkpoints", str(kept)]
        given = {"capture_output": True, "text": True, "env": environment}
        done = subprocess.run(words, timeout=200, **given)
    lines = done.stdout.splitlines()
    (line,) = [line for line in lines if "  auth " in line] or [done.stdout + done.stderr]
    assert f"the Ray at {cluster.address} {said}" in line and line.startswith(mark), line
    assert f"an object was written to {kept}, read and deleted" in done.stdout
    assert "the driver has locked" not in done.stdout and list(kept.iterdir()) == []


@pytest.mark.distributed
def test_a_cluster_that_does_not_answer_or_cannot_be_found() -> None:
    assert join_without_token("127.0.0.1:9", patience_s=4) == ("unclear", "no answer within 4 s")
    found = of_token("no such address")
    assert found.state == "warn" and "no such address asks for its token: " in found.text
