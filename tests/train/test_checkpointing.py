"""How long a save stops training, and when machines that will leave need a save."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline.recipe import Checkpointing, Policy
from pipeline.track.journal import NullTracker
from pipeline.train import checkpointing
from pipeline.train.checkpoint import checkpoints
from pipeline.train.checkpointing import MARGIN_S, SavingHooks
from pipeline.train.job import Notice, RankInfo
from tests.helpers.small import events, finished, small_recipe


@pytest.mark.timeout(60)
def test_all_that_a_save_stops_training_for_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at the numbers before they are copied, the wait for the save before, and at the end
    that for the last.
    """
    write = checkpoints._write

    def slowly(file: Path, value: Any) -> None:
        time.sleep(1.0 if file.name == "trainer.json" else 0.0)
        write(file, value)

    monkeypatch.setattr(checkpoints, "_write", slowly)
    monkeypatch.setattr(SavingHooks, "_check_finite", lambda self, step: time.sleep(0.2))
    recipe = small_recipe(stop_after=2, checkpoints=Checkpointing(every=1))
    summary = finished(tmp_path / "run", recipe)
    told = [event["stall_s"] for event in events(tmp_path / "run", "checkpoint")]
    # The second waits for its own end, and for that of the first but for the time of a batch.
    assert len(told) == 2 and told[0] > 0.2 and told[1] > 1.2
    assert sum(told) == pytest.approx(summary["checkpoint_s"], rel=0.1)


def saving(run: Path, decide: Callable[..., list[bool]], *, rank: int = 0) -> SavingHooks:
    """Between two batches of a run without policies, with nothing to save."""
    recipe = SimpleNamespace(
        checkpoints=Checkpointing(every=0, minutes=0.0), policy=Policy(replicas_every=0)
    )
    context: Any = SimpleNamespace(
        recipe=recipe,
        ranks=SimpleNamespace(rank=rank, decide=decide),
        job=SimpleNamespace(run=str(run)),
        rank_info=RankInfo(),
        checkpoints=SimpleNamespace(failed=lambda: False, done=lambda: None),
        tracker=NullTracker(),
    )
    return SavingHooks(context, step=0, state=dict)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("asked", ["nothing", "stop", "save"])
def test_between_batches_rank_0_alone_looks_for_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, asked: str
) -> None:
    """Each look of each rank is a question to the file server; what rank 0 has seen is told to
    all.
    """
    looked: list[str] = []
    exists = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda self, **about: (looked.append(self.name), exists(self, **about))[1]
    )
    monkeypatch.setattr(SavingHooks, "save", lambda self, step, **about: None)
    monkeypatch.setattr(SavingHooks, "_fulfil_request", lambda self, step: None)
    if asked != "nothing":
        (tmp_path / asked).write_text("somebody")
    decide = Mock(return_value=[asked == "stop", asked == "save", *[False] * 4])  # rank 0's
    made = saving(tmp_path, decide, rank=rank)
    assert made.between_batches(1, last=False) is (asked == "stop")
    assert set(looked) == ({"stop", "save"} if rank == 0 else set())
    assert decide.call_args.args[:2] == (
        (asked == "stop", asked == "save") if rank == 0 else (False, False)
    )


def test_a_notice_is_new_where_it_names_a_machine_that_none_has_named(tmp_path: Path) -> None:
    made = saving(tmp_path, lambda *mine: list(mine))
    for machines, is_new in (("a", True), ("a", False), ("ab", True), ("b", False), ("c", True)):
        notice = Notice(tuple(machines), None)
        assert made.is_new(notice) is is_new
        made.add_notice(notice, 1)
    assert made.leaving_machines == {"a", "b", "c"} and not made.is_new(None)
    assert made.deadline == math.inf  # nobody knows when


def test_a_last_save_comes_while_there_is_time_for_twice_a_batch_and_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saved = 50.0, []
    monkeypatch.setattr(
        checkpointing, "time", SimpleNamespace(monotonic=lambda: now, time=time.time)
    )
    monkeypatch.setattr(SavingHooks, "save", lambda self, step, **about: saved.append(step))
    monkeypatch.setattr(SavingHooks, "_fulfil_request", lambda self, step: None)
    made = saving(tmp_path, lambda *mine: list(mine))
    for machine, left in (("a", 100.0), ("b", 300.0)):  # the first to leave counts
        made.add_notice(Notice((machine,), time.time() + left), 0)
    latest = 50.0 + 100.0 - 2 * (3.0 + 4.0) - MARGIN_S
    for step, at in enumerate((latest - 1, latest + 1, latest + 2)):
        now, made._batch_began, made._write_s = at, at - 3.0, 4.0
        made.between_batches(step, last=False)
    assert saved == [1]  # and not again
