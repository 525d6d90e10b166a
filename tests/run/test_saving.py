"""How long a save lets training stand still, as its event tells."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import background
from pipeline.run.saving import Saving
from pipeline.track.jsonl import read
from tests.small import small_recipe, train_inline


def stalls(run: Path, **changes: Any) -> tuple[list[float], float]:
    """Of each checkpoint of a small run, and all seconds that the run has counted for checkpoints."""
    summary = train_inline(run, small_recipe(evaluate_every=2, **changes))
    assert summary is not None
    told = [event["stall_s"] for event in read(run / "journal.jsonl") if event["event"] == "checkpoint"]
    return told, summary["checkpoint_s"]


@pytest.mark.timeout(60)
def test_what_is_looked_at_before_a_copy_is_made_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(self: Saving, step: int) -> None:
        time.sleep(0.1)

    monkeypatch.setattr(Saving, "_check_finite", slowly)
    told, all_s = stalls(tmp_path / "run")
    assert len(told) == 7 and min(told) > 0.1  # of steps 3, 6, 8, 9, 12, 15 and 16
    assert sum(told) == pytest.approx(all_s, rel=0.1)


@pytest.mark.timeout(60)
def test_so_does_the_wait_for_the_one_before_and_at_the_end_for_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = background._write

    def slowly(file: Path, value: Any) -> None:
        if file.name == "trainer.json":
            time.sleep(1.0)
        write(file, value)

    monkeypatch.setattr(background, "_write", slowly)
    told, all_s = stalls(tmp_path / "run", stop_after=2, checkpoint_every=1)
    assert len(told) == 2 and told[1] > 1.0  # for its own; for the first as well, but for the time that the run has evaluated
    assert sum(told) == pytest.approx(all_s, rel=0.1)
