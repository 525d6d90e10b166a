"""A loss that leaps, as one batch of garbage makes it: passed over, or gone back for, to the bits
of a run that was told so.
"""

import random
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pipeline.recipe import Policy
from pipeline.rules.base import LossOf
from pipeline.track.journal import read
from pipeline.train.guards.anomaly import WINDOW
from pipeline.train.objective import CrossEntropy
from pipeline.train.recovery import Decisions
from pipeline.train.trainer import Trainer
from tests.helpers.small import same_weights, small_recipe, train_inline

pytestmark = pytest.mark.timeout(120)
SEED = 20261127  # of the step at which it leaps
STEPS = WINDOW + 12


def leaping(patch: pytest.MonkeyPatch, steps: Collection[int]) -> None:
    """The loss of these batches, and with it their gradient, is a hundred times what it should
    be.
    """
    batches, loss_for, times = Trainer._micro_batches, CrossEntropy.__call__, [1.0]

    def micro_batches(self: Trainer, source: Any) -> Any:
        times[0] = 100.0 if self.step in steps else 1.0
        return batches(self, source)

    def call(self: CrossEntropy, target_B: Tensor, teacher_BK: Tensor | None = None) -> LossOf:
        loss_of = loss_for(self, target_B, teacher_BK)
        return lambda logits_BK: times[0] * loss_of(logits_BK)

    patch.setattr(Trainer, "_micro_batches", micro_batches)
    patch.setattr(CrossEntropy, "__call__", call)


@pytest.mark.parametrize("max_skips", [1, 0])
def test_it_is_passed_over_or_gone_back_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_skips: int
) -> None:
    step = random.Random(SEED).randrange(WINDOW + 2, STEPS - 2)
    changes: dict[str, Any] = {
        "epochs": 12,
        "stop_after": STEPS,
    }
    policy = Policy(loss_spike=10.0, max_skips=max_skips)
    with monkeypatch.context() as patch:
        leaping(patch, {step})
        train_inline(tmp_path / "hit", small_recipe(**changes, policy=policy))
    events = read(tmp_path / "hit" / "journal.jsonl")
    if max_skips:
        first = step
        [reason] = [event["reason"] for event in events if event["event"] == "skipped"]
    else:
        [back] = [event for event in events if event["event"] == "rollback"]
        first, reason = back["to"], back["reason"]
        assert Decisions.read(tmp_path / "hit") == Decisions(1, ((first, step + 1),))
    assert "is more than 10 times the usual" in reason
    train_inline(
        tmp_path / "told",
        small_recipe(**changes, policy=replace(policy, skip=((first, step + 1),))),
    )
    assert same_weights(tmp_path / "hit", tmp_path / "told")
