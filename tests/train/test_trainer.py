"""What an attempt says while it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.datasets.synthetic import SyntheticLoader
from pipeline.recipe import Checkpointing
from pipeline.track.journal import read
from pipeline.train import trainer
from tests.helpers.small import small_recipe, train_inline


@pytest.mark.parametrize(("batches", "times"), [(3, 1), (50, 0)])
def test_a_worker_that_waits_for_data_much_of_the_time_says_so_once(
    batches: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has seen so many steady batches; this run has fewer than 50."""
    made = SyntheticLoader._batch

    def slow(self: SyntheticLoader, *which: Any) -> Any:
        time.sleep(0.5)
        return made(self, *which)

    monkeypatch.setattr(SyntheticLoader, "_batch", slow)
    monkeypatch.setattr(trainer, "STEADY_ENOUGH", batches)
    train_inline(tmp_path / "run", small_recipe(stop_after=7, checkpoints=Checkpointing(every=0)))
    told = [
        event for event in read(tmp_path / "run" / "journal.jsonl") if event["event"] == "data_wait"
    ]
    assert len(told) == times
    assert all(0.2 < each["share"] <= 1 and each["loader_threads"] == 1 for each in told)
