"""Reading a store: what is there, and what is wrong with it in one sentence, within seconds and
without touching it.
"""

import errno
import hashlib
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.report.stores import (
    ArtifactError,
    Point,
    Sent,
    ServerStore,
    StoredRun,
    StoreError,
    open_store,
    studies,
)
from pipeline.track.connect import connect
from pipeline.track.mlflow import sync
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
        with RawJournal(folder / "journal.jsonl", attempt=0) as journal:
            journal.write(
                event(
                    "start",
                    run=name,
                    rule=rule,
                    study=study,
                    family=family,
                    seed=seed,
                    params={"lr": "1"},
                    run_id=name * 8,
                    study_parent="f" * 32,
                    suite="a-suite",
                )
            )
            for step in range(5):
                journal.write(
                    event(
                        "step",
                        step=step,
                        metrics={"loss": float("nan") if step == 3 else 1.0 / (step + 1)},
                    )
                )
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
    return next(run for run in open_store(str(store)).listed() if run.name == name)


def test_studies_are_the_runs_of_one_key_in_one_family(store: Path):
    listed = open_store(f"sqlite:///{store}").listed()
    assert sorted(run.name for run in listed) == ["a", "b", "c", "d"]
    found = {(study.experiment, study.study[0]): study for study in studies(listed)}
    assert list(found) == [("cifar", "1"), ("fashion", "2"), ("fashion", "1")]  # the newest first
    study = found["fashion", "1"]
    assert (study.rules, study.seeds, study.states) == (
        ("BPTT", "SLTT"),
        ("0", "1"),
        {"failed": 1, "finished": 1},
    )
    assert time.time() - 600 < study.newest < time.time()


def test_a_run_has_its_newest_metrics_tags_and_times(store: Path):
    second, first = open_store(str(store)).runs("2" * 16) + [
        run for run in open_store(str(store)).runs("1" * 16) if run.name == "a"
    ]
    assert (second.name, first.name) == ("c", "a")
    assert first.metrics["train/loss"] == 0.2 and first.metrics["summary/top1"] == 0.5
    assert (first.status, first.rule, first.seed, first.experiment) == (
        "FINISHED",
        "BPTT",
        "0",
        "fashion",
    )
    assert (
        first.tags["spiketrain.suite"] == "a-suite"
        and first.started <= first.newest <= second.newest
    )
    assert first.newest == run_named(store, "a").newest
    assert open_store(str(store)).runs("none") == []


def test_a_history_since_a_step(store: Path):
    run = run_named(store, "a")
    points = open_store(str(store)).history(run.id, "train/loss")
    assert [point.step for point in points] == list(range(5)) and points[3].value != points[3].value
    assert (
        points[4] == Point(4, points[4].time, 0.2)
        and run.started <= points[4].time <= run.newest + 1
    )
    assert [
        point.step for point in open_store(str(store)).history(run.id, "train/loss", since=3)
    ] == [4]
    assert open_store(str(store)).history("none", "train/loss") == []


def test_known_artifacts_alone_and_none_through_a_link(store: Path, tmp_path: Path):
    run = run_named(store, "d")
    opened = open_store(str(store))
    assert opened.text(run.id, "recipe.json") == '{"é": 1}'
    assert (opened.text(run.id, "journal.jsonl") or "").count("\n") == 7
    assert (
        opened.text(run.id, "summary.json") is None and opened.text("none", "recipe.json") is None
    )
    for name in ("../../../mlflow.db", "/etc/passwd", "answers.npz", "..", ""):
        with pytest.raises(
            StoreError, match=r"an artifact must be recipe\.json, .*report\.html; got"
        ):
            opened.text(run.id, name)
    [place] = store.parent.glob(f"mlartifacts/cifar/{run.id}/artifacts")
    (tmp_path / "secret").write_text("secret")
    (place / "report.html").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="is a link that leads out of"):
        opened.text(run.id, "report.html")
    (place / "report.html").unlink()
    (place / "report.html").symlink_to("report.html")
    with pytest.raises(
        ArtifactError,
        match=r"cannot be read \(Too many levels of symbolic links\); look at it by hand",
    ):
        opened.text(run.id, "report.html")
    (place / "report.html").unlink()
    (place / "report.html").mkdir()
    with pytest.raises(
        ArtifactError, match=r"report\.html cannot be read \(Is a directory\); look at it by hand"
    ):
        opened.text(run.id, "report.html")


def test_a_long_journal_is_thinned_and_any_other_long_artifact_is_not_read(
    store: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_named(store, "a")
    whole = open_store(str(store)).journal(run.id)
    assert whole.every == 1 and [event.kind for event in whole.events] == [
        "start",
        *5 * ["step"],
        "finish",
    ]
    monkeypatch.setattr("pipeline.report.stores.MOST_BYTES", 100)
    [file] = store.parent.glob(f"mlartifacts/fashion/{run.id}/artifacts/journal.jsonl")
    monkeypatch.setattr("pipeline.report.stores._THINNED_BYTES", math.ceil(file.stat().st_size / 2))
    for opened in (open_store(str(store)), ServerStore(f"sqlite:///{store}")):
        told = opened.journal(run.id)
        assert told.every == 2 and [getattr(event, "step", None) for event in told.events] == [
            0,
            1,
            3,
            4,
            4,
        ]
        assert opened.journal("none") == Sent()
    monkeypatch.setattr("pipeline.report.stores.MOST_BYTES", 4)
    with pytest.raises(ArtifactError, match=r"recipe\.json has over 0 MiB; look at it by hand"):
        open_store(str(store)).text(run.id, "recipe.json")


def test_an_artifact_of_a_run_that_was_found_costs_no_question_about_the_run(
    store: Path, monkeypatch: pytest.MonkeyPatch
):
    opened, run = ServerStore(f"sqlite:///{store}"), run_named(store, "c")
    asked: list[str] = []
    client = type(connect(opened.uri))
    monkeypatch.setattr(
        client,
        "get_run",
        lambda self, run_id, get=client.get_run: (asked.append(run_id), get(self, run_id))[1],
    )
    assert (
        opened.text(run.id, "summary.json") is None and asked == []
    )  # MLflow itself asks where it downloads one
    assert opened.text(run.id, "report.json") is None and asked == [run.id]


def test_one_artifact_that_mlflow_cannot_hand_out_is_not_the_stores_trouble(store: Path):
    """Asked through MLflow's client, as a server is."""
    opened, run = ServerStore(f"sqlite:///{store}"), run_named(store, "c")
    assert opened.text(run.id, "recipe.json") == '{"é": 1}'
    assert (
        opened.text(run.id, "summary.json") is None and opened.text("none", "recipe.json") is None
    )
    [place] = store.parent.glob(f"mlartifacts/fashion/{run.id}/artifacts")
    (place / "activity.json").mkdir()
    said = (
        rf"activity\.json of run {run.id} cannot be read \(IsADirectoryError: .*; look at it by"
        r" hand"
    )
    with pytest.raises(ArtifactError, match=said):
        opened.text(run.id, "activity.json")


def told(uri: str | Path, seconds: float = 4.0) -> str:
    """The one sentence, in time."""
    began = time.monotonic()
    with pytest.raises(StoreError) as caught:
        open_store(str(uri)).listed()
    assert time.monotonic() - began < seconds
    assert len(str(caught.value).splitlines()) == 1 and str(uri).removeprefix("sqlite:///") in str(
        caught.value
    )
    return str(caught.value)


def test_a_store_that_is_missing_or_empty_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert "does not exist; launch a run" in told("sqlite:///runs/mlflow.db")
    assert "does not exist" in told(tmp_path)  # a folder
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mlflow.db").touch()
    assert "is empty, nothing was delivered yet; `spiketrain sync RUN`" in told(
        tmp_path / "mlflow.db"
    )
    assert (tmp_path / "mlflow.db").stat().st_size == 0


def test_a_store_that_may_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "circle").symlink_to("circle")
    for file, why in (
        ("circle", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
    ):
        assert f"cannot be read ({why}); are the file and its folder readable to you?" in told(
            tmp_path / file
        )
    look = Path.stat

    def refused(path: Path, **how: bool) -> os.stat_result:
        if (
            path.name == "mlflow.db"
        ):  # a folder of somebody else's; tests may run as root, whom nothing is refused
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, **how)

    monkeypatch.setattr(Path, "stat", refused)
    assert "cannot be read (Permission denied)" in told(tmp_path / "mlflow.db")


@pytest.mark.parametrize("size", [1, 60, 4096, 100_000])
def test_a_store_of_which_a_part_was_written(store: Path, tmp_path: Path, size: int):
    part = tmp_path / "mlflow.db"
    part.write_bytes(store.read_bytes()[:size])
    assert ("is no MLflow store, or is being made" if size == 1 else "is damaged") in told(part)
    assert part.stat().st_size == size and list(tmp_path.iterdir()) == [part]


def test_a_store_that_is_being_made(tmp_path: Path):
    """Its first tables are there, and the one by which it is known is not."""
    file = tmp_path / "mlflow.db"
    with sqlite3.connect(file) as made:
        made.execute("create table runs (run_uuid text)")
    assert (
        "is no MLflow store, or is being made; look again, name another, or move it away"
        in told(file)
    )


def test_what_is_no_store_of_this_version(store: Path, tmp_path: Path):
    file = tmp_path / "mlflow.db"
    file.write_text("never a database\n" * 100)
    assert "is damaged (file is not a database)" in told(file)
    file.unlink()
    with sqlite3.connect(file) as other:
        other.execute("create table alembic_version (version_num text)")
        other.execute("create table runs (run_uuid text)")
    before = hashlib.sha256(file.read_bytes()).digest()
    version = "is of another version of MLflow (no such table: latest_metrics)"
    assert told(file).endswith(
        f"is being made, or {version}; look again, then mlflow db upgrade sqlite:///FILE"
    )
    assert hashlib.sha256(file.read_bytes()).digest() == before
    assert "must be sqlite:///FILE or the address of a server" in told(
        "mysql://somebody@host/mlflow".replace("somebody@", "")
    )


def test_a_store_that_somebody_locks(store: Path, tmp_path: Path):
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(store.read_bytes())
    holder = sqlite3.connect(copy)
    holder.execute("begin exclusive")
    assert "is locked by another process for over 2 s" in told(copy)
    holder.close()
    assert len(open_store(str(copy)).listed()) == 4


def test_a_store_whose_writer_was_killed_in_the_middle(store: Path, tmp_path: Path):
    """SQLite finds its rollback journal, and undoes what was half done."""
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(store.read_bytes())
    code = (
        "import os, signal, sqlite3, sys\nc = sqlite3.connect(sys.argv[1]); c.execute('pragma"
        ' cache_size = 5\')\nc.execute("update tags set value = value || hex(zeroblob(4000))");'
        " os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, str(copy)], check=False).returncode
        == -signal.SIGKILL
    )
    assert (tmp_path / "mlflow.db-journal").stat().st_size > 0
    assert len(open_store(str(copy)).listed()) == 4


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
    command = [
        sys.executable,
        "-m",
        "http.server",
        "0",
        "--bind",
        "127.0.0.1",
        "--directory",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().split("port ")[1].split()[0]
            assert "does not answer as an MLflow server" in told(
                f"http://127.0.0.1:{port}", seconds=20
            )
        finally:
            server.kill()


def test_looking_imports_neither_mlflow_nor_torch(store: Path):
    code = (
        "import sys; from pipeline.report.stores import open_store, studies\n"
        "print(len(studies(open_store(sys.argv[1]).listed())))\n"
        "assert not {'mlflow', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
