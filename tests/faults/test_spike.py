"""A loss that leaps, as one batch of garbage makes it: passed over, or gone back for, to the bits
of a run that was told so.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import Policy
from pipeline.train.guards import anomaly
from pipeline.train.recovery import Decisions
from tests.helpers.interruptions import change_losses
from tests.helpers.small import events, same_weights, small_recipe, train_inline

pytestmark = pytest.mark.timeout(120)
SEED = 20261127  # of the step at which it leaps
WINDOW = 12  # batches that a loss is compared with; fewer than usual, which saves time
STEPS = WINDOW + 12


@pytest.mark.parametrize("max_skips", [1, 0])
def test_it_is_passed_over_or_gone_back_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_skips: int
) -> None:
    step = random.Random(SEED).randrange(WINDOW + 2, STEPS - 2)
    monkeypatch.setattr(anomaly, "WINDOW", WINDOW)
    changes: dict[str, Any] = {"epochs": 12, "stop_after": STEPS}
    policy = Policy(loss_spike=10.0, max_skips=max_skips)
    with monkeypatch.context() as patch:
        # Its gradient is a hundred times what it should be, too.
        change_losses(patch, lambda at, loss: loss * (100.0 if at == step else 1.0))
        train_inline(tmp_path / "hit", small_recipe(**changes, policy=policy))
    [event] = events(tmp_path / "hit", "skipped" if max_skips else "rollback")
    first = step if max_skips else event["to"]
    if not max_skips:
        assert Decisions.read(tmp_path / "hit") == Decisions(1, ((first, step + 1),))
    assert "is more than 10 times the usual" in event["reason"]
    train_inline(
        tmp_path / "told",
        small_recipe(**changes, policy=replace(policy, skip=((first, step + 1),))),
    )
    assert same_weights(tmp_path / "hit", tmp_path / "told")
