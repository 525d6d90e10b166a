"""What a run has decided goes into its checkpoints, and from there into a folder that does not
know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.train.decisions import adopt, decided


def of(rollbacks: int, micro_batch: int) -> dict[str, Any]:
    """The decisions as a checkpoint holds them."""
    return {
        "skipped.json": {"rollbacks": rollbacks, "batches": [[0, rollbacks]]},
        "micro_batch.json": micro_batch,
    }


def test_a_folder_takes_what_it_lacks(tmp_path: Path) -> None:
    told = of(1, 4)
    adopt(tmp_path, {**told, "../elsewhere.json": 1})
    assert decided(tmp_path) == told
    assert {path.name for path in tmp_path.iterdir()} == set(told) and not (
        tmp_path.parent / "elsewhere.json"
    ).exists()


def test_the_further_decision_stands_of_a_folder_and_a_checkpoint(tmp_path: Path) -> None:
    """The folder is ahead of its newest checkpoint, or a copy that was left behind."""
    adopt(tmp_path, of(2, 4))
    adopt(tmp_path, of(1, 8))
    assert decided(tmp_path) == of(2, 4)
    adopt(tmp_path, of(3, 2))
    assert decided(tmp_path) == of(3, 2)


def test_nothing_was_decided(tmp_path: Path) -> None:
    adopt(tmp_path, decided(tmp_path))
    assert decided(tmp_path) == {} and not list(tmp_path.iterdir())
