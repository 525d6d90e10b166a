"""A tracking server answers, refuses, or lets everybody in; and what listens there may be no web server at all."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline.doctor.tracking import of_mlflow


def without_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@contextmanager
def server(*, password: str | None, refuses: int = 401, sends_to: str = "") -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_let_in = password is None or self.headers.get("Authorization") == password
            self.send_response(200 if is_let_in else refuses)
            if sends_to and not is_let_in:
                self.send_header("Location", sends_to)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{http.server_port}"
        http.shutdown()


def test_a_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    without_login(monkeypatch)
    with server(password="Basic bWU6cGFzcw==") as place:  # me:pass
        assert of_mlflow(f"http://{place}").told.endswith("refuses this user")
        found = of_mlflow(f"http://me:pass@{place}")
        assert found.state == "ok" and "pass@" not in found.told
    with server(password=None) as place:
        assert of_mlflow(f"http://{place}").state == "look"
    assert of_mlflow(f"http://{place}").state == "bad"


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    """MLflow makes it and its folder; what is none, or may not be made, is told."""
    for file in (kept := tmp_path / "x.db", tmp_path / "not" / "there" / "x.db"):
        assert of_mlflow(f"sqlite:///{file}").state == "ok"
    kept.touch()
    assert of_mlflow(f"sqlite:///{kept}").state == "ok"
    assert [*tmp_path.iterdir()] == [kept]
    for file, why in ((kept / "x.db", "Not a directory"), (tmp_path, "Is a directory")):
        found = of_mlflow(f"sqlite:///{file}")
        assert (found.state, found.told) == ("bad", f"the store {file} may not be written: {why}") and found.advice


def test_a_folder_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert of_mlflow(f"sqlite:///{tmp_path}/x.db").told.endswith("may not be written: No space left on device")


@pytest.mark.parametrize("uri", ["mlflow.example.org:5000", "htp://a", "sqlite:x.db", "sqlite://", "./mlruns", "http:example"])
def test_what_is_no_address_of_a_store_is_told(uri: str) -> None:
    found = of_mlflow(uri)
    assert found.state == "bad" and "must be http://HOST:PORT" in found.told and found.told.endswith(f"; got {uri}")
    assert found.advice


@pytest.mark.parametrize(
    "uri",
    ["postgresql://u:planted@nobody/x", "postgresql://nobody/x?password=planted", "me:planted@mlflow.example.org", "planted@a"],
)
def test_a_password_in_it_is_not_shown(uri: str) -> None:
    found = of_mlflow(uri)
    assert found.state == "bad" and "planted" not in found.told + found.advice


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile"])
def test_what_a_launch_takes_and_nobody_here_can_ask(uri: str) -> None:
    assert of_mlflow(uri).state == "look"


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_what_listens_there_is_no_web_server(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        found = of_mlflow(f"http://127.0.0.1:{listening.getsockname()[1]}")
    assert found.state == "bad" and found.told.endswith("answers nothing")


def test_a_login_is_shown_as_mlflow_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password with @ in it, quoted in the address; a token, which counts where there is no name and password."""
    without_login(monkeypatch)
    with server(password="Basic bWU6cEBzcw==") as place:  # me:p@ss
        found = of_mlflow(f"http://me:p%40ss@{place}")
        assert found.state == "ok" and "p%40ss" not in found.told
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p@ss")
        assert of_mlflow(f"http://{place}").state == "ok"
    with server(password="Bearer tok") as place:
        assert of_mlflow(f"http://{place}").told.endswith("refuses this user")
        without_login(monkeypatch)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok")
        found = of_mlflow(f"http://{place}")
        assert found.state == "ok" and "tok" not in found.told
        assert of_mlflow(f"http://me:p%40ss@{place}").state == "bad"


@pytest.mark.parametrize("token", ["planted-token\n", "planted\ntoken", "planted-t€ken"])
def test_a_token_that_no_header_may_hold_is_told_and_not_shown(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    without_login(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
    with server(password="Bearer x") as place:
        found = of_mlflow(f"http://{place}")
    assert (found.state, found.told) == ("bad", "the token holds a character that no header may")
    assert "planted" not in found.told + found.advice


def test_a_password_that_nobody_quoted_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's client finds no server there, and so nor does this, whatever answers at what is shown."""
    without_login(monkeypatch)
    with server(password=None) as place:
        assert of_mlflow(f"http://me:planted/planted@{place}").told == f"http://{place} answers nothing"


def test_an_address_that_is_none_answers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    without_login(monkeypatch)
    assert of_mlflow(f"http://{'x' * 64}.example").told.endswith("answers nothing")  # longer than a name may be


@contextmanager
def page_that_asks_for_a_login() -> Iterator[tuple[str, list[str | None]]]:
    """Its place, and what whoever came there has shown."""
    shown: list[str | None] = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"localhost:{http.server_port}", shown
        http.shutdown()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_nobody_follows_to_another_place_with_a_password(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Nor without one: the page that it leads to is no answer of MLflow's."""
    without_login(monkeypatch)
    with page_that_asks_for_a_login() as (page, shown):
        on = f"http://user:planted@{page}/sign-in"
        with server(password="Basic bWU6cGFzcw==", refuses=code, sends_to=f"{on}?token=planted") as place:
            found = of_mlflow(f"http://{place}")
            assert (found.state, found.told) == ("bad", f"http://{place} asks for a login: it sends on to http://{page}/sign-in")
            found = of_mlflow(f"http://you:pass@{place}")
            assert (found.state, found.told) == ("bad", f"http://{place} sends on to http://{page}/sign-in")
            assert of_mlflow(f"http://me:pass@{place}").told == f"http://{place} answers, and asks for a password"
        assert shown == []
