import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from pipeline.report.dashboard.live import Live
from pipeline.report.stores import ServerStore, open_store
from pipeline.track.mlflow import log_report, register, sync
from pipeline.track.mlflow_store import TrackingError, connect
from tests.track.conftest import write_suite
from tests.track.test_mlflow import artifacts, find, free_port

DATA = '{"claims": []}'
NOTE = "mlflow.note.content"
ABOUT: dict[str, Any] = {
    "note": "**SLTT used 25 %**",
    "metrics": {"mean/top-1/SLTT": 0.9, "ratio to BPTT/saved bytes/SLTT (k=1)": 0.25},
}


FINISH = ("finish", {"step": 1})


def test_a_checkpoint_is_registered_once_and_the_alias_moves(
    fake_run: Callable, sqlite_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    run, name = fake_run(), uuid.uuid4().hex
    best, last = run.checkpoint(4, score=0.9), run.checkpoint(8, score=0.5)
    run.attempt(FINISH)
    client = connect(sqlite_store)
    for checkpoint, alias, number in (
        (best, "best", "1"),
        (best, "best", "1"),
        (last, "last", "2"),
        (last, "best", "2"),
    ):
        made = register(run.folder, checkpoint, name=name, alias=alias, uri=sqlite_store)
        version = client.get_model_version_by_alias(name, alias)
        assert (made, str(version.version), version.run_id, version.tags["uri"]) == (
            number,
            number,
            find(sqlite_store, run).info.run_id,
            checkpoint.as_uri(),
        )
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "mlruns").exists()


def test_what_cannot_be_registered_is_told_in_a_line(fake_run: Callable, sqlite_store: str):
    run = fake_run()
    checkpoint = run.checkpoint(4, score=0.9)

    def refused(name: str, uri: str) -> str:
        with pytest.raises(TrackingError) as caught:
            register(run.folder, checkpoint, name=name, alias="best", uri=uri)
        [line] = str(caught.value).splitlines()
        return line

    assert "must have a start event to be delivered" in refused("x", sqlite_store)
    run.attempt(FINISH)
    assert "cannot be used (MlflowException: Invalid model name 'a/b'" in refused(
        "a/b", sqlite_store
    )
    assert "cannot be used" in refused("x", f"http://127.0.0.1:{free_port()}")


def test_a_report_is_an_artifact_of_the_parent_of_each_run(
    fake_run: Callable, sqlite_store: str, tmp_path: Path
):
    family, about = uuid.uuid4().hex, {"study_parent": uuid.uuid4().hex, "suite": "a-suite"}
    one, two, other, alone = (
        fake_run(name, family=family) for name in ("one", "two", "other", "alone")
    )
    page, folders = tmp_path / "anything.html", [run.folder for run in (one, two, other, alone)]

    def log(text: str, uri: str = sqlite_store, name: str = "report.html") -> list[str]:
        page.write_text(text)
        return log_report(page, folders, name=name, data=DATA, uri=uri, **ABOUT)

    alone.attempt(FINISH)
    assert log("<html>é</html>") == []  # no run of a suite began
    two.attempt(FINISH, **about)
    [parent] = log("<html>é</html>")  # before anything else was delivered
    assert log("<html>newer</html>") == [parent]
    other.attempt(FINISH, study_parent=uuid.uuid4().hex, suite="a-suite")
    first, second = log("another", name="report-study-x.html")
    assert first == parent != second
    client = connect(sqlite_store)
    kept = {"report.html": "<html>newer</html>", "report.json": DATA}
    assert [{file.path for file in client.list_artifacts(each)} for each in (parent, second)] == [
        {*kept, "report-study-x.html"},
        {"report-study-x.html"},
    ]
    for name, text in kept.items():
        assert (artifacts(client.get_run(parent)) / name).read_text() == text
    resume = f"Resume: `spiketrain resume a-suite --runs {tmp_path / 'runs'}`"
    one_of, of_another = (client.get_run(each).data for each in (parent, second))
    assert one_of.tags[NOTE] == f"**SLTT used 25 %**\n\n{resume}"
    assert of_another.tags[NOTE] == resume and of_another.metrics == {}
    ratio = "ratio to BPTT/saved bytes/SLTT _k_1_"
    assert one_of.metrics == {"mean/top-1/SLTT": 0.9, ratio: 0.25}
    assert len(client.get_metric_history(parent, ratio)) == 1  # it was logged twice
    client.set_tag(parent, NOTE, "what the user wrote")
    log(kept["report.html"])
    assert client.get_run(parent).data.tags[NOTE] == "what the user wrote"
    for run, above in ((two, parent), (other, second)):
        sync(run.folder, uri=sqlite_store)
        assert find(sqlite_store, run).data.tags["mlflow.parentRunId"] == above
    with pytest.raises(TrackingError, match="cannot be used"):
        log("", uri=f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("how", ["sync", "report", "died"])
def test_a_parent_that_was_deleted_comes_back_with_its_runs(
    fake_run: Callable, sqlite_store: str, tmp_path: Path, how: str
):
    family, about = uuid.uuid4().hex, {"study_parent": uuid.uuid4().hex, "suite": f"deleted-{how}"}
    runs = [fake_run(name, family=family) for name in ("one", "two")]
    folders, page = [run.folder for run in runs], tmp_path / "anything.html"
    page.write_text("<html></html>")
    write_suite(tmp_path / "runs" / about["suite"], *folders)
    for run in runs:
        run.attempt(FINISH, **about)
        sync(run.folder, uri=sqlite_store)

    def report() -> str:
        [parent] = log_report(
            page, folders, name="report.html", data=DATA, uri=sqlite_store, **ABOUT
        )
        return parent

    client, store, first = connect(sqlite_store), open_store(sqlite_store), report()
    assert store.text(first, "report.json") == DATA
    client.delete_run(first)
    for each in (store, ServerStore(sqlite_store)):
        assert each.text(first, "report.json") is None
    if how == "died":
        with (
            patch.object(type(client), "set_tag", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            sync(folders[0], uri=sqlite_store)
    for folder in {"sync": folders[:1], "report": [], "died": folders}[how]:
        sync(folder, uri=sqlite_store)
    again = report()
    assert again != first and client.get_run(again).info.status == "FINISHED"
    assert {find(sqlite_store, run).data.tags["mlflow.parentRunId"] for run in runs} == {again}
    members = [run for run in store.runs() if run.study == runs[0].study]
    shown = [read.key for read in Live(store).reports(members)]
    assert (shown, store.text(again, "report.json")) == ([again[:8]], DATA)
