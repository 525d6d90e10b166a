"""What a run has decided goes into its checkpoints, and from there into a folder that does not know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.guards.damaged import Damage
from pipeline.run.decided import DAMAGED, FILES, MICRO_BATCH, SKIPPED, adopt, decided


def page(number: int) -> dict[str, Any]:
    samples = [[10 * number, 10 * number + 10]]
    return {"file": "f", "number": number, "offset": 0, "size": 1, "samples": samples, "unreadable": ""}


def of(rollbacks: int, pages: list[int], micro_batch: int) -> dict[str, Any]:
    """What is decided, as a checkpoint tells it."""
    skipped = {"rollbacks": rollbacks, "batches": [[0, rollbacks]]}
    return {SKIPPED: skipped, DAMAGED: {"pages": [page(number) for number in pages]}, MICRO_BATCH: micro_batch}


def test_a_folder_takes_what_it_lacks(tmp_path: Path) -> None:
    told = of(1, [3], 4)
    adopt(tmp_path, {**told, "../elsewhere.json": 1})
    assert decided(tmp_path) == told and set(told) == set(FILES)
    assert {path.name for path in tmp_path.iterdir()} == set(FILES) and not (tmp_path.parent / "elsewhere.json").exists()


def test_the_further_decision_stands_of_a_folder_and_a_checkpoint(tmp_path: Path) -> None:
    """The folder is ahead of its newest checkpoint, or a copy that was left behind; in pages it may be both."""
    adopt(tmp_path, of(2, [3, 5], 4))
    adopt(tmp_path, of(1, [3], 8))
    assert decided(tmp_path) == of(2, [3, 5], 4)
    moved = {**page(5), "file": "elsewhere"}
    adopt(tmp_path, of(3, [7], 2) | {DAMAGED: {"pages": [moved, page(7)]}})
    assert decided(tmp_path) == of(3, [3, 5, 7], 2)
    assert [each.number for each in Damage.read(tmp_path).pages] == [3, 5, 7]


def test_nothing_was_decided(tmp_path: Path) -> None:
    adopt(tmp_path, decided(tmp_path))
    assert decided(tmp_path) == {} and not list(tmp_path.iterdir())
