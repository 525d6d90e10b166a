"""A run that never trained: its folder and journal, and one MLflow store for all tests (its schema
takes seconds).
"""

import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.events import RawJournal


@dataclass
class FakeRun:
    """Writes the events that a worker would write."""

    folder: Path
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    study: str = field(default_factory=lambda: uuid.uuid4().hex)
    family: str = field(default_factory=lambda: uuid.uuid4().hex)
    last_attempt: int = -1

    def start(self, step: int = 0, **fields: Any) -> RawJournal:
        self.last_attempt += 1
        journal = RawJournal(self.folder / "journal.jsonl", attempt=self.last_attempt)
        event = {
            "run": self.folder.name,
            "run_id": self.run_id,
            "recipe": "recipes/fashion/mlp.py",
            "rule": "SLTT",
            "study": self.study,
            "family": self.family,
            "seed": 3,
            "world_size": 2,
            "step": step,
            "commit": "0123abcd",
            "dirty": False,
            "hardware": {"cpu": "a cpu", "gpu": "none"},
            "versions": {"torch": "2.13.0"},
            "params": {"optimizer.lr": "0.05", "epochs": "2"},
        }
        journal.event("start", **(event | fields))
        return journal

    def attempt(self, *events: tuple[str, dict[str, Any]], step: int = 0, **fields: Any) -> Path:
        """An attempt with these events after its start. Returns the journal."""
        with self.start(step, **fields) as journal:
            journal.events(events)
        return journal.path

    def checkpoint(self, step: int, *, score: float | None) -> Path:
        folder = self.folder / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "trainer.json").write_text(json.dumps({"step": step, "score": score}))
        return folder


def write_suite(folder: Path, *runs: Path) -> None:
    """A suite's folder, as far as its runs are known from it."""
    folder.mkdir(exist_ok=True)
    children: list[dict[str, Any]] = [
        {"run": run.name, "recipe": {"version": 1, "recipe": {"name": run.name}}} for run in runs
    ]
    (folder / "suite.json").write_text(json.dumps({"version": 1, "children": children}))


def steps(first: int, after: int, *, scale: float = 1.0) -> list[tuple[str, dict[str, Any]]]:
    """The events of training steps."""
    about = {"epoch": 0, "memory_bytes": 1000}
    losses = {step: {"loss": scale / (step + 1), "top1": 0.5} for step in range(first, after)}
    return [("step", {"step": step, "metrics": losses[step], **about}) for step in losses]


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., FakeRun]:
    def make(name: str = "a_run", **fields: Any) -> FakeRun:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "recipe.json").write_text(json.dumps({"version": 1, "recipe": {"epochs": 2}}))
        return FakeRun(folder, **fields)

    return make


@pytest.fixture(scope="session")
def sqlite_store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> str:
    return f"sqlite:///{shutil.copy(empty_store, tmp_path_factory.mktemp('store'))}"
