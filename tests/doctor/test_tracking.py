"""A tracking server answers, refuses, or lets everybody in; and what listens there may be no web server at all."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

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
    assert of_mlflow("sqlite:///x.db").state == "ok"


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
