"""recipe.json is changed while a run lies still: it is not gone on with, and with the old one back
it is, to the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.launch.cluster import Cluster
from pipeline.launch.in_process import Inline
from pipeline.launch.prepare import prepare
from pipeline.recipe.recipe import read_json, spec, write_json
from pipeline.track.journal import read
from pipeline.train.checkpoint import WEIGHTS, step_folders
from tests.helpers.interruptions import Killed, die_at
from tests.helpers.small import Command, command, same_weights, small_recipe, train_inline

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def spiketrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody is there
    return command(monkeypatch, capsys)


@pytest.mark.parametrize(
    "met", ["nothing", "a death before its first checkpoint", "damage of all of its checkpoints"]
)
def test_a_run_without_a_checkpoint_begins_as_it_was_launched_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spiketrain: Command, met: str
) -> None:
    """Else it would be known, and compared with others, as what it is not."""
    recipe, run, start = small_recipe(), tmp_path / "runs" / "it", tmp_path / "elsewhere.pt"
    job = prepare(recipe, Cluster(inline=True), run.parent, name="it")
    if met != "nothing":
        with monkeypatch.context() as patch, Inline() as launcher:
            die_at(patch, 2 if "before" in met else 4)
            with pytest.raises(Killed):
                launcher.run(job, "test")
    for checkpoint in step_folders(run / "checkpoints"):
        (checkpoint / WEIGHTS).write_bytes(b"")
    starts = len(started(run))
    words = ("resume", "it", "--inline", "--runs", str(run.parent))
    for made, said in (
        (recipe.override({"optimizer.lr": 0.25}), "optimizer.lr: 0.1 and 0.25"),
        (small_recipe(init=str(start)), f'init: null and "{start}"'),
    ):
        write_json(run / "recipe.json", made.resolved().to_json())
        code, _, error = spiketrain(*words)
        assert code == 2
        assert (
            error
            == "resume: recipe.json must be as it was when the run was launched; it differs now:"
            f" {said}\n"
        )
    assert len(started(run)) == starts
    write_json(run / "recipe.json", recipe.resolved().to_json())
    assert spiketrain(*words)[0] == 0
    assert [event["step"] for event in started(run)] == [0] * (starts + 1)


def started(run: Path) -> list[dict[str, Any]]:
    return [event for event in read(run / "journal.jsonl") if event["event"] == "start"]


def test_the_fields_that_differ_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spiketrain: Command
) -> None:
    recipe, run = small_recipe(), tmp_path / "runs" / "it"
    with monkeypatch.context() as patch:
        die_at(patch, 7)
        with Inline() as launcher, pytest.raises(Killed):
            launcher.run(prepare(recipe, Cluster(inline=True), run.parent, name="it"), "test")
    changed = recipe.override({"optimizer.lr": 0.25, "rule.k": 1, "epochs": 3})
    other = small_recipe(
        data=spec(Synthetic, samples=64, val_samples=20, shape=(1, 8, 8), noise=0.5)
    )
    words = ("resume", "it", "--inline", "--runs", str(run.parent))
    for made, said in (
        (changed, "rule.k: 2 and 1; optimizer.lr: 0.1 and 0.25; epochs: 2 and 3"),
        (other, 'data.noise: "(absent)" and 0.5'),
    ):
        write_json(run / "recipe.json", made.resolved().to_json())
        code, _, error = spiketrain(*words)
        assert code == 2
        assert (
            error == "resume: recipe.json must be as it was when step 6 was saved; it differs now:"
            f" {said}\n"
        )
    value = (
        recipe.override({"micro_batch": 4}).resolved().to_json()
    )  # how it fits into memory is not what is learnt
    write_json(run / "recipe.json", value)
    assert spiketrain(*words)[0] == 0
    assert read_json(run / "summary.json")["restarts"] == 1
    with monkeypatch.context() as patch:
        die_at(patch, 7)
        with pytest.raises(Killed):
            train_inline(tmp_path / "untouched", recipe)
    write_json(tmp_path / "untouched" / "recipe.json", value)
    train_inline(tmp_path / "untouched", recipe)
    assert same_weights(run, tmp_path / "untouched")
