"""Which trial a choice takes, and when a suite has done with a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.track.jsonl import Journal
from pipeline.trials import best, is_over, top1_of


def run(folder: Path, *, protocol: str, end: str) -> Path:
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps({"version": 1, "recipe": {"protocol": protocol}}))
    with Journal(folder / "journal.jsonl", attempt=0) as journal:
        journal.event("start")
        journal.event(end)
    (folder / "summary.json").write_text('{"top1": 0.75}') if end == "finish" else None
    return folder


@pytest.mark.parametrize(
    ("protocol", "end", "over"),
    [
        ("trial", "finish", True),
        ("trial", "diverged", True),
        ("trial", "failed", False),
        ("trial", "stopped", False),
        ("tuned", "diverged", True),
        ("shared", "diverged", False),
        ("shared", "finish", True),
    ],
)
def test_a_trial_that_diverged_is_over(tmp_path: Path, protocol: str, end: str, over: bool) -> None:
    assert is_over(run(tmp_path / "run", protocol=protocol, end=end)) is over


def test_its_accuracy_is_none(tmp_path: Path) -> None:
    assert top1_of(run(tmp_path / "a", protocol="trial", end="finish")) == 0.75
    assert top1_of(run(tmp_path / "b", protocol="trial", end="diverged")) is None


def test_the_first_of_the_best_is_taken() -> None:
    assert best({"a": 0.5, "b": 0.75, "c": 0.75}) == "b"
    assert best({"a": None, "b": 0.0}) == "b"
    assert best({"a": None, "b": None}) == "a"


def test_a_damaged_recipe_is_named(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", protocol="trial", end="diverged")
    (folder / "recipe.json").write_text("[]")
    with pytest.raises(ValueError, match=r"recipe\.json: must hold a recipe; got \[\]"):
        is_over(folder)
