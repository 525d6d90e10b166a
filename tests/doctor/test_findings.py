"""What was found of nodes is judged, and what is in the way is said with what to do about it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from pipeline.doctor.findings import Finding, of_clocks, of_mlflow, of_network, of_nodes, of_token
from pipeline.doctor.node import PACKAGES, Node
from pipeline.doctor.stranger import Stranger
from pipeline.launch.base import Silent

NODE = Node(
    name="one",
    versions={"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0")},
    gpus=(),
    sees_runs=True,
    written_bytes_per_s=2e8,
    free_bytes=10**11,
    remembers_absence=None,
    threading_layer="tbb",
    ffcv="ok",
    device="cpu",
    off={"neuron": 1e-7, "1-bit": 3e-7},
    locks={},
)
OTHER = replace(NODE, name="two")


def not_ok(*nodes: Node, needed: float = 1e9) -> list[Finding]:
    return [each for each in of_nodes(nodes, runs="/r", needed_bytes=needed) if each.state != "ok"]


def test_nodes_that_are_well_and_alike() -> None:
    assert not_ok(NODE, OTHER) == []
    assert len([*of_nodes([NODE, OTHER], runs="/r", needed_bytes=1)]) == 2 + 2 * 5


@pytest.mark.parametrize(
    ("sick", "check", "state", "told"),
    [
        (replace(OTHER, versions={**NODE.versions, "torch": "2.0"}), "versions", "bad", "torch: one has 1.0, two has 2.0"),
        (replace(OTHER, sees_runs=False), "storage", "bad", "two does not see /r"),
        (replace(OTHER, written_bytes_per_s=None), "storage", "bad", "two may not write to /r"),
        (
            replace(OTHER, gpus=("H100", "failed: RuntimeError: CUDA error")),
            "gpus",
            "bad",
            "two: a GPU failed: RuntimeError: CUDA",
        ),
        (replace(OTHER, written_bytes_per_s=1e6), "storage", "look", "two: writes 1 MB/s"),
        (replace(OTHER, free_bytes=10**8), "storage", "bad", "0.1 GB are free"),
        (replace(OTHER, remembers_absence="/r"), "storage", "look", "two: the NFS at /r may hide a new file for a minute"),
        (replace(OTHER, ffcv="failed: ImportError: libtbb"), "ffcv", "bad", "two: failed: ImportError: libtbb"),
        (replace(OTHER, threading_layer="failed: no layer"), "threads", "bad", "no layer"),
        (replace(OTHER, off={"neuron": 0.0, "1-bit": 2e-3}), "ops", "bad", "two: 1-bit on cpu is off by 2.0e-03 of what it"),
        (replace(OTHER, off={"neuron": "failed: x", "1-bit": 0.0}), "ops", "bad", "two: neuron on cpu failed: x"),
        (replace(OTHER, locks={"/x/lock": 3600.0}), "locks", "bad", "/x/lock is locked for 60 min"),
    ],
)
def test_one_that_is_not(sick: Node, check: str, state: str, told: str) -> None:
    (found,) = not_ok(NODE, sick)
    assert (found.check, found.state) == (check, state) and told in found.told and found.advice


def test_a_lock_of_just_now_is_somebody_compiling() -> None:
    assert not_ok(replace(NODE, locks={"/x/lock": 5.0})) == []


def test_cards_of_two_kinds() -> None:
    (found,) = not_ok(replace(NODE, gpus=("H100",)), replace(OTHER, gpus=("A100",)))
    assert (found.check, found.state) == ("gpus", "look")


def test_clocks() -> None:
    told = {"a": (0.2, 0.01), "b": (-3.0, 0.01), "s": Silent("s", "it does not answer in time"), "c": (3.0, 2.5)}
    near, far, silent, unsure = of_clocks(told)
    assert (near.state, far.state, silent.state, unsure.state) == ("ok", "look", "bad", "ok")
    assert "-3.000 s" in far.told and silent.told == "s: its clock cannot be read: it does not answer in time"


def test_the_network() -> None:
    assert [*of_network([], "")] == []  # one process has nobody to talk to
    (fast,), (slow,), (none,) = of_network([2e9, 3e9], ""), of_network([3e9, 5e7], ""), of_network([], "timed out")
    assert (fast.state, slow.state, none.state) == ("ok", "look", "bad")
    assert "2 processes add up with 0.05 GB/s" in slow.told and none.told.endswith("timed out") and "IFNAME" in none.advice


def test_a_cluster_that_lets_strangers_in() -> None:
    told = {state: of_token(Stranger(outcome=state, said="no route"), "h:1") for state in ("let in", "refused", "unclear")}
    assert {state: found.state for state, found in told.items()} == {"let in": "bad", "refused": "ok", "unclear": "look"}
    assert told["unclear"].told.endswith("could not be told: no route") and told["unclear"].advice


def without_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@contextmanager
def server(*, password: str | None) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if password is None or self.headers.get("Authorization") == password else 401)
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
