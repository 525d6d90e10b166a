"""Decisions of recovery are kept in the run's folder and in its checkpoints."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import Diverged, UserError
from pipeline.recipe import Policy
from pipeline.train.recovery import Decisions, Rollback
from tests.helpers.small import make_run, small_recipe, train_inline


def of(rollbacks: int, micro_batch: int | None) -> Decisions:
    return Decisions(rollbacks, ((0, rollbacks),), micro_batch)


def saved(decisions: Decisions) -> dict[str, Any]:
    """As a checkpoint holds them: JSON has no tuples."""
    return {**asdict(decisions), "skipped": [list(each) for each in decisions.skipped]}


def test_a_folder_takes_the_decisions_that_it_lacks(tmp_path: Path) -> None:
    Decisions.adopt(tmp_path, saved(of(1, 4)))
    assert Decisions.read(tmp_path) == of(1, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["decisions.json"]


def test_the_further_decision_stands_of_a_folder_and_a_checkpoint(tmp_path: Path) -> None:
    """The folder is ahead of its newest checkpoint, or an old copy that was left behind."""
    of(2, 4).write(tmp_path)
    Decisions.adopt(tmp_path, saved(of(1, 8)))
    assert Decisions.read(tmp_path) == of(2, 4)
    Decisions.adopt(tmp_path, saved(of(3, 2)))
    assert Decisions.read(tmp_path) == of(3, 2)


def test_without_a_decision_nothing_is_written(tmp_path: Path) -> None:
    Decisions.adopt(tmp_path, saved(Decisions.read(tmp_path)))
    assert Decisions.read(tmp_path) == Decisions() and not list(tmp_path.iterdir())


def test_each_rollback_leaves_out_the_batches_since_its_checkpoint() -> None:
    recipe = small_recipe(policy=Policy(max_rollbacks=3))
    decided = Decisions().after_rollback(Rollback(7, ""), recipe, to_step=4, epoch=0)
    decided = decided.after_rollback(Rollback(12, ""), recipe, to_step=10, epoch=0)
    assert decided == Decisions(2, ((4, 8), (10, 13)))
    apart = Rollback(15, "apart", skips=False)
    decided = decided.after_rollback(apart, recipe, to_step=15, epoch=0)
    assert decided == Decisions(3, ((4, 8), (10, 13)))
    for back, error in ((apart, UserError), (Rollback(15, "nan"), Diverged)):
        with pytest.raises(error, match=rf"^training: batch 15 \(epoch 3\): {back.reason}; all"):
            decided.after_rollback(back, recipe, to_step=15, epoch=2)


@pytest.mark.parametrize(
    "value",
    [
        {"rollbacks": 1},
        {"rollbacks": 0, "skipped": [], "micro_batch": 0},
        {"rollbacks": "x", "skipped": [], "micro_batch": None},
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, value: dict[str, Any]) -> None:
    recipe = small_recipe(stop_after=1)
    make_run(tmp_path / "run", recipe)
    (tmp_path / "run" / "decisions.json").write_text(json.dumps(value))
    said = f"decisions.json: must hold rollbacks, skipped and micro_batch; got {value}"
    with pytest.raises(UserError, match=re.escape(said)):
        train_inline(tmp_path / "run", recipe)
