"""Deaths of workers are counted from the last time that the run got on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from pipeline.launch.restarts import Restarts

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


@pytest.fixture
def policy(tmp_path: Path) -> Restarts:
    return Restarts(FailureConfig(max_failures=2), folder=tmp_path)


def dies(policy: Restarts) -> FailureDecision:
    return policy.make_decision(WorkerGroupError("died", {0: RuntimeError("killed")}))


def saves(policy: Restarts, step: int) -> None:
    with (policy.folder / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({"event": "checkpoint", "step": step}) + "\n")


def test_without_anything_new_the_last_of_so_many_ends_it(policy: Restarts) -> None:
    assert [dies(policy) for _ in range(3)] == [RETRY, RETRY, RAISE]


def test_each_new_checkpoint_begins_the_count_anew(policy: Restarts) -> None:
    for step in (5, 10, 15):
        assert [dies(policy), dies(policy)] == [RETRY, RETRY]
        saves(policy, step)
    assert [dies(policy) for _ in range(3)] == [RETRY, RETRY, RAISE]


def test_a_checkpoint_of_a_step_that_was_saved_before_is_nothing_new(policy: Restarts) -> None:
    """As of a run that dies each time after the same one, or went back and saves again what it had."""
    saves(policy, 10)
    assert dies(policy) == RETRY
    saves(policy, 5)
    assert dies(policy) == RETRY
    saves(policy, 10)
    assert dies(policy) == RAISE


@pytest.mark.parametrize("file", ["micro_batch.json", "damaged.json"])
def test_a_smaller_micro_batch_and_a_page_left_out_are(policy: Restarts, file: str) -> None:
    for content in ("32", "16", "8"):
        assert [dies(policy), dies(policy)] == [RETRY, RETRY]
        (policy.folder / file).write_text(content)
    assert [dies(policy) for _ in range(3)] == [RETRY, RETRY, RAISE]


def test_what_was_there_when_it_began_is_nothing_new(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text(json.dumps({"event": "checkpoint", "step": 7}) + "\n")
    policy = Restarts(FailureConfig(max_failures=0), folder=tmp_path)
    assert dies(policy) == RAISE
