"""Joining a Ray cluster that is there already, with the token that it asks for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture
def cluster() -> Iterator[str]:
    """A head on this machine; its address. Ended by its own process, never by `ray stop`, which ends every Ray there is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as place:  # short: Ray's sockets lie in it
        words = ["start", "--head", "--num-cpus", "2", "--port", str(port), "--include-dashboard=false", "--block"]
        ray = Path(sys.executable).with_name("ray")
        head = subprocess.Popen(
            [ray, *words], env={**os.environ, "RAY_TMPDIR": place}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
                assert time.monotonic() < deadline, "the head does not answer"
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(60)


def test_two_workers_on_a_cluster_that_was_there(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "from tests.small import small_recipe\n\ndef recipe():\n    return small_recipe(backend='deepspeed')\n"
    )
    words = [
        "launch",
        str(tmp_path / "one.py"),
        "--workers",
        "2",
        "--address",
        cluster,
        "--runs",
        str(tmp_path / "runs"),
        "--device",
        "cpu",
    ]
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished: 16 steps" in done.stdout
