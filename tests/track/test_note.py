"""The note for people on where MLflow has a run: one that a power cut has torn ends nothing, and is
written anew.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.track.mlflow import read_note, sync
from pipeline.train.checkpoint import read_trainer, step_folders
from tests.helpers.small import make_run, small_recipe, train_inline


@pytest.mark.parametrize("torn", ["", '{"uri": "sqlite'])
def test_a_torn_one_is_none_for_whoever_trains(tmp_path: Path, torn: str) -> None:
    recipe = small_recipe(epochs=1)
    make_run(tmp_path / "run", recipe)
    (tmp_path / "run" / "mlflow.json").write_text(torn)
    assert train_inline(tmp_path / "run", recipe) is not None
    assert read_trainer(step_folders(tmp_path / "run" / "checkpoints")[-1])["mlflow"] is None


def test_storage_that_is_away_gives_none(tmp_path: Path) -> None:
    assert read_note(tmp_path) is None
    (tmp_path / "mlflow.json").mkdir()
    assert read_note(tmp_path) is None


def test_a_torn_one_is_written_anew_and_a_whole_one_is_left_alone(
    fake_run: Callable, sqlite_store: str
) -> None:
    run = fake_run()
    run.start().close()
    (run.folder / "mlflow.json").write_text("")
    sync(run.folder, uri=sqlite_store)
    note, stat = read_note(run.folder), (run.folder / "mlflow.json").stat()
    assert note.keys() == {"uri", "experiment_id", "run_id"} and note["uri"] == sqlite_store
    sync(run.folder, uri=sqlite_store)
    assert (run.folder / "mlflow.json").stat() == stat
