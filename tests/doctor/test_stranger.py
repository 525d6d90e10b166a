"""A real Ray, open or with a token, and what `doctor --address auto` says of it; and a stranger whom nobody answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.doctor.stranger import stranger
from tests.nodes import TOKEN, nodes

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("mode", "mark", "said"), [("token", "ok", "asks for its token"), ("disabled", "BAD", "lets everybody in")]
)
def test_what_the_doctor_says_of_a_ray(tmp_path: Path, mode: str, mark: str, said: str) -> None:
    with nodes({"RAY_AUTH_MODE": mode}) as cluster:
        # Of several clusters on this machine `auto` is the one that RAY_ADDRESS names.
        environment = {**os.environ, **TOKEN, "RAY_AUTH_MODE": mode, "RAY_ADDRESS": cluster.address, "COLUMNS": "300"}
        kept = tmp_path / "kept"
        words = [sys.executable, "-m", "pipeline", "doctor", "--address", "auto", "--runs", str(tmp_path / "runs")]
        words += ["--checkpoints", str(kept)]
        told = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=False)
        (line,) = [line for line in told.stdout.splitlines() if "auth" in line] or [told.stdout + told.stderr]
        assert f"the Ray at {cluster.address} {said}" in line and line.startswith(mark), line
        assert f"what was put at {kept} was found, read and deleted" in told.stdout and list(kept.iterdir()) == []
        assert "has locked" not in told.stdout  # each node sees the lock of the driver


def test_one_whom_nobody_answers_knows_nothing_of_tokens() -> None:
    found = stranger("127.0.0.1:9", patience_s=4)
    assert (found.outcome, found.said) == ("unclear", "no answer within 4 s")


def test_one_that_cannot_look_says_why() -> None:
    found = stranger("no such address")
    assert found.outcome == "unclear" and "no such address" in found.said
