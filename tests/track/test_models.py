from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.track.connect import connect
from pipeline.track.delivery import Delivery
from pipeline.track.mlflow import sync
from pipeline.track.models import inside
from pipeline.weights import place_of
from tests.track.conftest import FakeRun
from tests.track.test_mlflow import find

CHANGING = ("create_logged_model", "log_model_artifacts", "finalize_logged_model", "set_logged_model_tags")


def models(uri: str, run: FakeRun) -> dict[str, Any]:
    found = find(uri, run)
    listed = connect(uri).search_logged_models([found.info.experiment_id])
    assert all((str(model.status), model.source_run_id) == ("READY", found.info.run_id) for model in listed)
    assert len({model.name for model in listed}) == len(listed)
    return {model.name: model for model in listed}


def which(uri: str, run: FakeRun) -> dict[str, str]:
    return {name: model.tags["spiketrain.which"] for name, model in models(uri, run).items()}


def test_the_last_and_the_best_checkpoint_are_external_models_and_none_is_made_twice(fake_run: Callable, sqlite_store: str):
    run = fake_run()
    with run.start() as journal:
        best, last = run.checkpoint(4, score=0.9), run.checkpoint(12, score=None)
        run.checkpoint(8, score=0.5)
        (run.folder / "checkpoints" / "step_00000020").mkdir()  # damaged
        sync(run.folder, uri=sqlite_store)  # nobody drives it: this is an end
        assert which(sqlite_store, run) == {best.name: "best", last.name: "last"}
    model = models(sqlite_store, run)[best.name]
    assert model.params == {"uri": best.as_uri(), "step": "4"}
    assert model.tags["mlflow.model.isExternal"] == "true"
    sync(run.folder, uri=sqlite_store)
    with run.start(step=12) as journal:
        newest = run.checkpoint(16, score=0.95)
        shutil.rmtree(last)
        journal.event("finish", steps=16)
    sync(run.folder, uri=sqlite_store)
    expected = {best.name: "superseded", last.name: "superseded", newest.name: "last and best"}
    assert which(sqlite_store, run) == expected
    sync(run.folder, uri=sqlite_store)
    assert which(sqlite_store, run) == expected


def test_there_are_none_before_an_end_or_without_a_checkpoint(fake_run: Callable, sqlite_store: str):
    run = fake_run()
    delivery = Delivery(run.folder, uri=sqlite_store)
    with run.start() as journal:
        run.checkpoint(4, score=0.9)
        delivery.advance()
        assert models(sqlite_store, run) == {}
        shutil.rmtree(run.folder / "checkpoints")
        journal.event("finish", steps=4)
        delivery.advance()
    assert models(sqlite_store, run) == {}


def keep_at(run: FakeRun, address: str) -> None:
    (run.folder / "job.json").write_text(json.dumps({"checkpoints": address}))


def test_checkpoints_of_another_folder_are_models_by_their_address(fake_run: Callable, sqlite_store: str, tmp_path: Path):
    """Who knows no other places than the run's folder changes nothing of what they are."""
    run = fake_run()
    with run.start() as journal:
        journal.event("finish", steps=12)
    for step, score in ((4, 0.9), (12, None)):
        run.checkpoint(step, score=score)
    elsewhere = (run.folder / "checkpoints").rename(tmp_path / "elsewhere")
    keep_at(run, str(elsewhere))
    sync(run.folder, uri=sqlite_store)
    assert which(sqlite_store, run) == {}
    expected = {"step_00000004": "best", "step_00000012": "last"}
    sync(run.folder, uri=sqlite_store, kept_of=place_of)
    assert which(sqlite_store, run) == expected
    assert models(sqlite_store, run)["step_00000004"].params["uri"] == (elsewhere / "step_00000004").as_uri()
    keep_at(run, str(tmp_path / "not mounted here"))
    for kept_of in (inside, place_of):
        sync(run.folder, uri=sqlite_store, kept_of=kept_of)
        assert which(sqlite_store, run) == expected


def test_checkpoints_in_a_store_are_models_by_its_address(fake_run: Callable, sqlite_store: str):
    import fsspec

    run, address = fake_run(), f"memory://{uuid.uuid4().hex}"
    keep_at(run, address)
    with run.start() as journal:
        journal.event("finish", steps=4)
    with fsspec.open(f"{address}/step_00000004.1/trainer.json", "w") as file:
        file.write(json.dumps({"score": 0.9}))  # type: ignore[union-attr]
    with fsspec.open(f"{address}/step_00000004.1/manifest.json", "w") as file:
        file.write("{}")  # type: ignore[union-attr]
    sync(run.folder, uri=sqlite_store, kept_of=place_of)
    assert which(sqlite_store, run) == {"step_00000004": "last and best"}
    assert models(sqlite_store, run)["step_00000004"].params["uri"] == f"{address}/step_00000004.1"
    files = fsspec.filesystem("memory")
    files.mv(f"{address}/step_00000004.1", f"{address}/step_00000004.2", recursive=True)  # saved again, with its evaluation
    sync(run.folder, uri=sqlite_store, kept_of=place_of)
    listed = connect(sqlite_store).search_logged_models([find(sqlite_store, run).info.experiment_id])
    assert {model.params["uri"][-2:]: model.tags["spiketrain.which"] for model in listed} == {
        ".1": "superseded",
        ".2": "last and best",
    }

    def out_of_reach(_: Path) -> Any:
        raise RuntimeError("NoCredentialsError")  # botocore's are of no common kind

    sync(run.folder, uri=sqlite_store, kept_of=out_of_reach)
    keep_at(run, "no-such-protocol://bucket")
    sync(run.folder, uri=sqlite_store, kept_of=place_of)
    after = connect(sqlite_store).search_logged_models([find(sqlite_store, run).info.experiment_id])
    assert [model.tags for model in after] == [model.tags for model in listed]


def test_they_are_looked_for_once_an_end(fake_run: Callable, sqlite_store: str, monkeypatch: pytest.MonkeyPatch):
    run, calls = fake_run(), []
    monkeypatch.setattr("pipeline.track.delivery.note_checkpoints", lambda *given: calls.append(given))
    delivery = Delivery(run.folder, uri=sqlite_store)
    with run.start() as journal:
        journal.event("stopped", step=4)
        assert delivery.advance() and delivery.advance() and len(calls) == 1
    with run.start(step=4) as journal:
        journal.event("finish", steps=8)
        assert delivery.advance() and delivery.advance() and len(calls) == 2


def test_a_deliverer_may_die_at_any_call(fake_run: Callable, sqlite_store: str, monkeypatch: pytest.MonkeyPatch):
    """Whether or not the call took effect; the next one completes what the last one began."""
    from mlflow import MlflowClient

    run, calls = fake_run(), []
    with run.start() as journal:
        journal.event("finish", steps=4)
    for step, score in ((4, 0.9), (8, 0.5)):
        run.checkpoint(step, score=score)

    def dying(name: str, effect: str) -> Callable:
        original = getattr(MlflowClient, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if effect == "before":
                raise KeyboardInterrupt
            original(*args, **kwargs)
            raise KeyboardInterrupt

        return call

    for name in CHANGING[:3]:
        for effect in ("before", "after"):
            with monkeypatch.context() as patch:
                patch.setattr(MlflowClient, name, dying(name, effect))
                with pytest.raises(KeyboardInterrupt):
                    sync(run.folder, uri=sqlite_store)
            calls.append(name)
    sync(run.folder, uri=sqlite_store)
    assert which(sqlite_store, run) == {"step_00000004": "best", "step_00000008": "last"}
    assert len(calls) == 6
