"""Reading a store: what is there, and what is wrong with it in one sentence, within seconds and
without touching it.
"""

import math
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from pipeline.report.stores import (
    ArtifactError,
    Point,
    SentJournal,
    ServerStore,
    Store,
    StoredRun,
    StoreError,
    open_store,
    studies,
)
from pipeline.track.mlflow import sync
from pipeline.track.mlflow_store import connect
from tests.helpers.events import RawJournal, event


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies of one family, one of another, delivered as runs are; a run of somebody else, and
    a deleted one.
    """
    runs = tmp_path_factory.mktemp("runs with an #odd name")
    uri = f"sqlite:///{runs}/mlflow.db"
    for seed, (name, rule, study, family) in enumerate(
        [
            ("a", "BPTT", "1" * 16, "fashion"),
            ("b", "SLTT", "1" * 16, "fashion"),
            ("c", "BPTT", "2" * 16, "fashion"),
            ("d", "OTTT", "1" * 16, "cifar"),
            ("gone", "BPTT", "1" * 16, "fashion"),
        ]
    ):
        folder = runs / name
        folder.mkdir()
        (folder / "recipe.json").write_text('{"é": 1}')
        about = {"run": name, "rule": rule, "study": study, "family": family, "seed": seed}
        ids = {"run_id": name * 8, "study_parent": "f" * 32, "suite": "a-suite"}
        with RawJournal(folder / "journal.jsonl", attempt=0) as journal:
            journal.write(event("start", **about, **ids, params={"lr": "1"}))
            for step in range(5):
                loss = float("nan") if step == 3 else 1.0 / (step + 1)
                journal.write(event("step", step=step, metrics={"loss": loss}))
            journal.write(event("failed") if name == "b" else event("finish", step=4, top1=0.5))
        sync(folder, uri=uri)
    client = connect(uri)
    experiment = client.get_experiment_by_name("fashion")
    assert experiment is not None
    client.create_run(
        experiment.experiment_id, run_name="somebody else's", tags={"spiketrain.study": "1" * 16}
    )
    [gone] = client.search_runs(
        [experiment.experiment_id], "tags.`spiketrain.run_id` = 'gonegonegonegonegonegonegonegone'"
    )
    client.delete_run(gone.info.run_id)
    return runs / "mlflow.db"


def run_named(store: Path, name: str) -> StoredRun:
    return next(run for run in open_store(str(store)).runs() if run.name == name)


@pytest.fixture
def opened(store: Path) -> Store:
    return open_store(str(store))


def test_studies_are_the_runs_of_one_key_in_one_family(store: Path):
    listed = open_store(f"sqlite:///{store}").runs()
    assert sorted(run.name for run in listed) == ["a", "b", "c", "d"]
    found = {(study.experiment, study.study[0]): study for study in studies(listed)}
    assert list(found) == [("cifar", "1"), ("fashion", "2"), ("fashion", "1")]  # the newest first
    study = found["fashion", "1"]
    states = {"failed": 1, "finished": 1}
    assert (study.rules, study.seeds, study.states) == (("BPTT", "SLTT"), ("0", "1"), states)
    assert time.time() - 600 < study.newest < time.time()


def test_a_run_has_its_newest_metrics_tags_and_times(store: Path):
    run, other = run_named(store, "a"), run_named(store, "c")
    assert (run.metrics["train/loss"], run.metrics["summary/top1"]) == (0.2, 0.5)
    about = (run.status, run.rule, run.seed, run.experiment, run.tags["spiketrain.suite"])
    assert about == ("FINISHED", "BPTT", "0", "fashion", "a-suite")
    assert run.started <= run.newest <= other.newest


def test_a_history_since_a_step(store: Path, opened: Store):
    run = run_named(store, "a")
    points = opened.history(run.id, "train/loss")
    assert [point.step for point in points] == list(range(5)) and math.isnan(points[3].value)
    assert points[4] == Point(4, points[4].time, 0.2)
    assert run.started <= points[4].time <= run.newest + 1
    assert [point.step for point in opened.history(run.id, "train/loss", since=3)] == [4]
    assert opened.history("none", "train/loss") == []


@pytest.mark.parametrize("through_mlflow", [False, True])
def test_known_artifacts_alone(store: Path, through_mlflow: bool):
    opened = ServerStore(f"sqlite:///{store}") if through_mlflow else open_store(str(store))
    run = run_named(store, "d")
    assert opened.text(run.id, "recipe.json") == '{"é": 1}'
    assert (opened.text(run.id, "journal.jsonl") or "").count("\n") == 7
    assert opened.text(run.id, "summary.json") is opened.text("none", "recipe.json") is None
    for name in ("../../../mlflow.db", "/etc/passwd", "answers.npz", "..", ""):
        with pytest.raises(StoreError, match=r"must be recipe\.json, .*report\.html; got"):
            opened.text(run.id, name)


@pytest.mark.parametrize(
    ("damage", "through_mlflow", "said"),
    [
        ("link", False, "got a link to"),
        ("circle", False, r"cannot be read \(Too many levels of symbolic links\); check the"),
        ("folder", False, r"report\.html cannot be read \(Is a directory\); check the file"),
        (
            "folder",
            True,
            r"report\.html of run .* cannot be read \(IsADirectoryError: .*; check the",
        ),
    ],
)
def test_an_artifact_that_cannot_be_read_is_not_the_stores_trouble(
    store: Path, tmp_path: Path, damage: str, through_mlflow: bool, said: str
):
    opened = ServerStore(f"sqlite:///{store}") if through_mlflow else open_store(str(store))
    run = run_named(store, "d")
    [place] = store.parent.glob(f"mlartifacts/cifar/{run.id}/artifacts")
    file = place / "report.html"
    if damage == "folder":
        file.mkdir()
    else:
        file.symlink_to(tmp_path if damage == "link" else file.name)
    try:
        with pytest.raises(ArtifactError, match=said):
            opened.text(run.id, file.name)
    finally:
        if damage == "folder":
            file.rmdir()
        else:
            file.unlink()


def test_a_long_journal_is_thinned_and_any_other_long_artifact_is_not_read(
    store: Path, opened: Store, monkeypatch: pytest.MonkeyPatch
):
    run, stores = run_named(store, "a"), (opened, ServerStore(f"sqlite:///{store}"))
    whole = opened.journal(run.id)
    assert whole.every == 1
    assert [event.kind for event in whole.events] == ["start", *5 * ["step"], "finish"]
    monkeypatch.setattr("pipeline.report.stores.MAX_BYTES", 100)
    [file] = store.parent.glob(f"mlartifacts/fashion/{run.id}/artifacts/journal.jsonl")
    monkeypatch.setattr("pipeline.report.stores._THINNED_BYTES", math.ceil(file.stat().st_size / 2))
    for each in stores:
        told = each.journal(run.id)
        steps = [getattr(event, "step", None) for event in told.events]
        assert (told.every, steps) == (2, [0, 1, 3, 4, 4])
        assert each.journal("none") == SentJournal()
    monkeypatch.setattr("pipeline.report.stores.MAX_BYTES", 4)
    for each in stores:
        with pytest.raises(ArtifactError, match=r"recipe\.json must have at most 0 MiB; got"):
            each.text(run.id, "recipe.json")


def told(uri: str | Path, seconds: float = 4.0) -> str:
    """The one sentence, in time."""
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        open_store(str(uri)).runs()
    assert time.monotonic() - began < seconds
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and str(uri).removeprefix("sqlite:///") in said
    return said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/mlflow.db", "does not exist; launch a run"),
        ("", "is a folder; name the file in it"),
        ("empty.db", "is empty, because no run was sent to it; `spiketrain sync RUN`"),
        ("circle", "cannot be read (Too many levels of symbolic links); check the path and"),
        ("x" * 300, "cannot be read (File name too long); check the path and the permissions"),
    ],
)
def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, name: str, said: str):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "empty.db").touch()
    assert said in told(f"sqlite:///{tmp_path / name}")
    assert {path.name for path in tmp_path.iterdir()} == {"circle", "empty.db"}
    assert (tmp_path / "empty.db").stat().st_size == 0


ANOTHER = "is incomplete or of another version of MLflow (no such table: experiments); try again"
NO_STORE = "is not a complete MLflow store; try again, name another store, or rename the file"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (1, NO_STORE),
        (60, "is damaged"),
        (4096, "is damaged"),
        (100_000, "is damaged"),
        (b"never a database\n" * 100, "is damaged (file is not a database)"),
        # its first tables are there, and the one by which it is known is not
        ("create table runs (run_uuid text)", NO_STORE),
        ("create table alembic_version (x text); create table runs (run_uuid text)", ANOTHER),
    ],
)
def test_a_file_that_is_no_whole_store_is_refused_and_left_as_it_is(
    store: Path, tmp_path: Path, content: int | bytes | str, said: str
):
    """`content`: the first bytes of a store, other bytes, or SQL that makes tables."""
    file = tmp_path / "mlflow.db"
    if isinstance(content, str):
        with closing(sqlite3.connect(file)) as made:
            made.executescript(content)
    else:
        file.write_bytes(content if isinstance(content, bytes) else store.read_bytes()[:content])
    before = file.read_bytes()
    assert said in told(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_store_of_another_kind():
    assert "must be sqlite:///FILE or the address of a server" in told("mysql://host/mlflow")


def test_a_store_that_somebody_locks(store: Path, tmp_path: Path):
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(store.read_bytes())
    with closing(sqlite3.connect(copy)) as holder:
        holder.execute("begin exclusive")
        assert "was locked by another process for over 2 s" in told(copy)
    assert len(open_store(str(copy)).runs()) == 4


def test_a_store_whose_writer_was_killed_in_the_middle(store: Path, tmp_path: Path):
    """SQLite finds its rollback journal, and undoes what was half done."""
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(store.read_bytes())
    code = (
        "import os, signal, sqlite3, sys\nc = sqlite3.connect(sys.argv[1]); c.execute('pragma"
        ' cache_size = 5\')\nc.execute("update tags set value = value || hex(zeroblob(4000))");'
        " os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(copy)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "mlflow.db-journal").stat().st_size > 0
    assert len(open_store(str(copy)).runs()) == 4


def test_a_server_that_is_down_or_hangs_or_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "does not answer as an MLflow server" in told(address, seconds=20)
    assert "does not answer as an MLflow server" in told(address, seconds=20)
    for login in ("me:secret@", "me:12/secret@"):
        with pytest.raises(StoreError) as caught:
            open_store(address.replace("//", f"//{login}")).history("x", "y")
        assert "secret" not in str(caught.value)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert "does not answer as an MLflow server" in told(address, seconds=20)
        server.shutdown()
