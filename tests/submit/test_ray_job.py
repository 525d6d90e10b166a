"""An order to a cluster that asks for a token."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.submit import ray_job


def test_the_token_of_a_file_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray job submit` shows none unless it is told to (2.60)."""
    (tmp_path / "token").write_text("t" * 32)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    monkeypatch.setattr(os, "environ", {**kept, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})
    modes = []
    monkeypatch.setattr(ray_job, "answer_of", lambda *words: modes.append(os.environ.get("RAY_AUTH_MODE")))
    assert ray_job.submit("ray job submit --submission-id a -- spiketrain launch x.py") == "a"
    assert modes == ["token"]
