"""`launch --checkpoints`: beneath another folder, found again by every command, and gone on with where a run's folder is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.checkpoint import step_folders
from pipeline.guards.batches import Skipped
from pipeline.job import STOP
from pipeline.run.attempt import Attempt
from pipeline.track.connect import connect
from pipeline.track.jsonl import read
from pipeline.weights import load_run
from tests.faults.test_not_finite import hit
from tests.faults.test_out_of_memory import room_for
from tests.small import Command, command, same_weights, small_recipe, train_inline

pytestmark = pytest.mark.timeout(120)

RECIPE = """
from tests.small import small_recipe

def recipe():
    return small_recipe(epochs=1)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`spiketrain launch` of the recipe as "run", with its checkpoints beneath `elsewhere`."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    words = ("launch", str(tmp_path / "recipe.py"), "--inline", "--name", "run")
    done = command(monkeypatch, capsys)
    return lambda *more, elsewhere=str(tmp_path / "elsewhere"): done(*words, "--checkpoints", elsewhere, *more)


def test_they_are_there_and_a_run_whose_folder_is_lost_goes_on_with_them(tmp_path: Path, run: Command) -> None:
    one, other, third = (("--runs", str(tmp_path / name)) for name in ("one", "other", "third"))
    code, _, said = run(*one)
    assert code == 0, said
    there = [path.name for path in step_folders(tmp_path / "elsewhere" / "run")]
    assert there[-1] == "step_00000008" and not (tmp_path / "one" / "run" / "checkpoints").exists()
    assert load_run(tmp_path / "one" / "run").state_dict()
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    [model] = client.search_logged_models([each.experiment_id for each in client.search_experiments()])
    assert model.params["uri"] == (tmp_path / "elsewhere" / "run" / "step_00000008").as_uri()

    code, _, said = run(*other)
    assert code == 2 and not (tmp_path / "other" / "run").exists()
    address = tmp_path / "elsewhere" / "run"
    assert said.strip() == (
        f"launch: {address} must hold no checkpoints yet; got step_00000008: another --name, or --or-resume to go on with them"
    )
    code, _, said = run(*other, "--or-resume", "--set", "optimizer.lr=0.05")
    assert code == 2 and said.startswith("launch: --or-resume goes on with checkpoints of the same study; got ")

    (address / "step_00000009").mkdir()  # it is moved away as damaged, and stands in no way
    (address / "step_00000009" / "trainer.json").write_text("[]")
    code, _, said = run(*third, "--or-resume")
    assert code == 0, said
    [start] = [event for event in read(tmp_path / "third" / "run" / "journal.jsonl") if event["event"] == "start"]
    assert start["step"] == 8
    assert same_weights(tmp_path / "one" / "run", tmp_path / "third" / "run")


def test_what_a_run_has_decided_outlives_its_folder(tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory ran out, and batch 5 led back to step 3; the folder is lost after step 4, among the batches to be skipped."""
    one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
    changes = ("--set", "max_skips=0", "--set", "max_rollbacks=1")
    between = Attempt._between_batches

    def stopped(self: Attempt, epoch: int, *, last: bool) -> None:
        if self.step == 4 and self.parts.skipped.rollbacks:
            (self.folder / STOP).touch()
        between(self, epoch, last=last)

    hit(monkeypatch, {5})
    with monkeypatch.context() as patch:
        room_for(patch, 4)
        patch.setattr(Attempt, "_between_batches", stopped)
        code, _, said = run("--runs", str(one.parent), *changes)
    assert code == 130, said
    assert [path.name for path in step_folders(tmp_path / "elsewhere" / "run")][-1] == "step_00000004"
    shutil.rmtree(one)
    code, _, said = run("--runs", str(other.parent), *changes, "--or-resume")
    assert code == 0, said
    events = read(other / "journal.jsonl")
    assert [(event["step"], event["micro_batch"]) for event in events if event["event"] == "start"] == [(4, 4)]
    assert [event["step"] for event in events if event["event"] == "skipped"] == [4, 5]
    assert Skipped.read(other) == Skipped(1, ((3, 6),))
    train_inline(tmp_path / "told", small_recipe(epochs=1, micro_batch=4, skip=((3, 6),)))
    assert same_weights(other, tmp_path / "told")


@pytest.mark.parametrize(
    ("elsewhere", "said"),
    [
        ("nowhere://x", "checkpoints: an address must be one that fsspec can open; got nowhere://x/run: Protocol not known"),
        (
            "s3://key:secret@bucket",
            "checkpoints: an address holds no credentials, which are the environment's; got one with some",
        ),
        (
            "simplecache::memory://user:secret@bucket",
            "checkpoints: an address must be of one store, without fsspec's '::'; got a chain of several",
        ),
    ],
)
def test_what_cannot_be_opened_is_refused_before_anything_is_left_behind(
    tmp_path: Path, run: Command, elsewhere: str, said: str
) -> None:
    code, _, told = run("--runs", str(tmp_path / "runs"), elsewhere=elsewhere)
    assert (code, len(told.strip().splitlines())) == (2, 1) and told.startswith(said)
    assert not (tmp_path / "runs" / "run").exists()
