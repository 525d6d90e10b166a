"""Run folders as training leaves them, without training."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from pipeline.report.compare import Comparison, comparison_of
from pipeline.report.results import read_runs
from pipeline.report.selection import select_runs
from tests.helpers.browser import chromium
from tests.helpers.events import RawJournal, event

RECIPE = {
    "name": "a",
    "model": {
        "target": "pipeline.models.vgg.vgg",
        "kwargs": {"widths": [64, 128], "surrogate": {"value": "x.Sigmoid", "kwargs": {}}},
    },
    "rule": {"target": "pipeline.rules.bptt.BPTT", "kwargs": {}},
    "data": {"target": "pipeline.data.Fashion", "kwargs": {"path": "/data/fashion"}},
    "optimizer": {"target": "timm.optim.create", "kwargs": {"opt": "sgd", "lr": 0.1}},
    "batch_size": 64,
    "seed": 0,
    "init": None,
}
STUDY = "0123456789abcdef"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Closed, with its pages, after a module's tests."""
    with chromium() as found:
        yield found


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def make_run(runs_dir: Path) -> Callable[..., Path]:
    """A run that finished, or with `end` another one: its last event, None for none; `start` is
    told at its start, too.
    """

    def make(
        name: str,
        *,
        rule: str = "BPTT",
        seed: int = 0,
        study: str = STUDY,
        recipe: dict[str, Any] | None = None,
        end: str | None = "finish",
        start: Mapping[str, Any] | None = None,
        **summary: Any,
    ) -> Path:
        folder = runs_dir / name
        folder.mkdir()
        content = {
            **RECIPE,
            "name": name,
            "seed": seed,
            "rule": {"target": rule, "kwargs": {}},
            **(recipe or {}),
        }
        (folder / "recipe.json").write_text(json.dumps({"version": 1, "recipe": content}))
        whole = {
            "run": name,
            "rule": rule,
            "seed": seed,
            "study": study,
            "recipe": name,
            "world_size": 2,
            "steps": 100,
            "epochs": 2,
            "top1": 0.9,
            "top5": 0.99,
            "peak_saved_bytes": 8_000_000,
            "images_per_s": 100.0,
            "wall_s": 200.0,
            "startup_s": 0.0,
            "commit": "abc",
            "data_fingerprint": "d" * 8,
            "hardware": {"cpu": "a cpu", "cores": 2, "gpu": "none"},
            **summary,
        }
        begun = {
            name: whole[name] for name in ("run", "rule", "study", "seed", "world_size", "hardware")
        }
        unknown = {"micro_batch": None, "loader_threads": None}
        begun = {**begun, **unknown, "total_steps": 100, **(start or {})}
        with RawJournal(folder / "journal.jsonl", attempt=0) as journal:
            journal.write(event("start", **begun))
            journal.write(event("step", step=30, metrics={"loss": 1.0, "top1": 0.1}))
            journal.write(event("evaluation", step=30, metrics={"top1": 0.5}))
            journal.write(event("step", step=40, metrics={"loss": 1.0, "top1": 0.1}))
            if end is not None:
                has_step = end in ("finish", "stopped")
                journal.write(event(end, **({"step": 40} if has_step else {})))
        if end == "finish":
            (folder / "summary.json").write_text(json.dumps(whole))
        return folder

    return make


def make_all(make_run: Callable[..., Path], runs: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Several runs, by name, each with the arguments of `make_run`."""
    return [make_run(name, **about) for name, about in runs.items()]


def compare(
    runs_dir: Path, names: Sequence[str | Path] = (), *, against: str = "BPTT"
) -> Comparison:
    """The comparison of the named runs or, without names, of the newest study."""
    runs = read_runs(runs_dir)
    return comparison_of(runs, select_runs(runs_dir, names, runs), against, 0.7, is_whole=not names)
