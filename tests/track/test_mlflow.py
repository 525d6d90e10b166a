import fcntl
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.stores import open_store
from pipeline.track import mlflow_store as hierarchy
from pipeline.track.mlflow import Delivery, Mirror, register, sync, tracking_uri
from pipeline.track.mlflow_store import TrackingError, connect
from tests.helpers.nodes import free_port
from tests.helpers.waiting import until
from tests.track.conftest import FakeRun, steps, write_suite


def find(uri: str, run: FakeRun) -> Any:
    """The one MLflow run of a training run."""
    client = connect(uri)
    experiment = client.get_experiment_by_name(run.family)
    assert experiment is not None
    (found,) = client.search_runs(
        [experiment.experiment_id], f"tags.`spiketrain.run_id` = '{run.run_id}'"
    )
    return client.get_run(found.info.run_id)


def artifacts(run: Any) -> Path:
    """Where a local store keeps them."""
    return Path(run.info.artifact_uri.removeprefix("file://"))


def history(uri: str, run: FakeRun, key: str) -> list[tuple[int, float]]:
    return [
        (point.step, point.value)
        for point in connect(uri).get_metric_history(find(uri, run).info.run_id, key)
    ]


def points(run: FakeRun, uri: str) -> tuple[int, int]:
    """How many a delivery sends, and how many MLflow had."""
    delivery = sync(run.folder, uri=uri)
    return delivery.delivered, delivery.translation.already_there


def test_what_a_finished_run_looks_like(fake_run: Callable, sqlite_store: str):
    run = fake_run()
    checkpoint = {"path": "checkpoints/step_00000002", "stall_s": 0.1, "write_s": 0.5, "bytes": 12}
    skipped = ("skipped", {"reason": "not finite", "samples": 8})
    summary = {"top1": 0.7, "peak_saved_bytes": 4096, "rule": "SLTT", "restarts": 0}
    journal = run.attempt(
        *steps(0, 3),
        ("evaluation", {"step": 2, "epoch": 0, "metrics": {"top1": 0.7, "loss": math.nan}}),
        ("fidelity", {"step": 2, "temporal_share": {"0": 0.5}, "cosines": {"0": 0.5}}),
        ("checkpoint", {"step": 2, **checkpoint}),
        skipped,
        skipped,
        ("finish", {"step": 3, **summary}),
        study_parent="f" * 32,
    )
    for name in ("summary.json", "activity.json", "answers.npz", "job.json"):
        (run.folder / name).write_text("{}")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    an_hour_ago = [json.dumps({**line, "time": line["time"] - 3600}) + "\n" for line in lines]
    journal.write_text("".join(an_hour_ago))
    assert points(run, sqlite_store) == (20, 0)

    found, client = find(sqlite_store, run), connect(sqlite_store)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "a_run")
    assert found.data.params == {"optimizer.lr": "0.05", "epochs": "2"}
    expected = {
        "spiketrain.rule": "SLTT",
        "spiketrain.seed": "3",
        "spiketrain.world_size": "2",
        "spiketrain.commit": "0123abcd",
        "spiketrain.study": run.study,
        "spiketrain.skipped_samples": "16",
        "hardware.cpu": "a cpu",
    }
    assert found.data.tags.items() >= expected.items()
    histories = {
        "train/loss": [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))],
        "train/memory_bytes": [(0, 1000), (1, 1000), (2, 1000)],
        "val/top1": [(2, 0.7)],
        "val/loss": [(2, pytest.approx(math.nan, nan_ok=True))],
        "checkpoint/bytes": [(2, 12)],
        "checkpoint/stall_s": [(2, 0.1)],
        "summary/peak_saved_bytes": [(3, 4096)],
    }
    assert {key: history(sqlite_store, run, key) for key in histories} == histories
    metrics = found.data._metric_objs
    assert {point.key.split("/")[0] for point in metrics} == {
        *("train", "val", "fidelity", "checkpoint", "summary")
    }
    # the time of its event, and not of its delivery
    for time_ms in (*(point.timestamp for point in metrics), found.info.end_time):
        assert time_ms == pytest.approx((time.time() - 3600) * 1000, abs=60_000)

    sent = {"recipe.json", "journal.jsonl", "summary.json", "activity.json", "answers.npz"}
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == sent
    # beside the store, and not in the working directory
    place = Path(sqlite_store.removeprefix("sqlite:///")).parent / "mlartifacts" / run.family
    artifact = place / found.info.run_id / "artifacts" / "journal.jsonl"
    assert artifact.read_bytes() == journal.read_bytes()
    parent = client.get_run(found.data.tags["mlflow.parentRunId"])
    assert (parent.info.status, parent.data.tags["spiketrain.study_parent"]) == (
        "FINISHED",
        "f" * 32,
    )

    assert points(run, sqlite_store) == (0, 20)
    assert find(sqlite_store, run).info.end_time == found.info.end_time


def test_steps_that_a_rollback_repeats_count_once(fake_run: Callable, sqlite_store: str):
    run = fake_run()
    run.attempt(*steps(0, 5))
    assert sync(run.folder, uri=sqlite_store).delivered == 15
    journal = run.attempt(
        *steps(2, 8, scale=100.0), step=2, world_size=4, params={"epochs": "3", "new": "1"}
    )
    # 2, 3, 4 again: neither delivered nor counted
    assert points(run, sqlite_store) == (9, 15)
    expected = [
        (step, pytest.approx((1.0 if step < 5 else 100.0) / (step + 1))) for step in range(8)
    ]
    assert find(sqlite_store, run).data.tags["spiketrain.world_size"] == "4"
    other = fake_run("other")  # all of it at once gives the same
    text = journal.read_text().replace(run.run_id, other.run_id).replace(run.family, other.family)
    (other.folder / "journal.jsonl").write_text(text)
    sync(other.folder, uri=sqlite_store)
    for each in (run, other):
        assert history(sqlite_store, each, "train/loss") == expected
        # a parameter is written once, MLflow says
        assert find(sqlite_store, each).data.params == {
            "optimizer.lr": "0.05",
            "epochs": "2",
            "new": "1",
        }


def test_status_follows_stop_and_resume(fake_run: Callable, sqlite_store: str):
    run = fake_run()

    def status() -> str:
        return find(sqlite_store, run).info.status

    journal = run.start()
    mirror = Mirror(run.folder, uri=sqlite_store, interval_s=0.05)
    settled(lambda: status() == "RUNNING")
    journal.event("stopped", step=3, reason="SIGTERM", resume_command="spiketrain resume a_run")
    settled(lambda: status() == "KILLED")
    assert mirror.close(20)
    mirror = Mirror(run.folder, uri=sqlite_store, interval_s=0.05)
    run.start(step=3)
    settled(lambda: status() == "RUNNING")
    # the driver leaves, and the worker said nothing of an end
    assert mirror.close(20) and status() == "KILLED"
    mirror = Mirror(run.folder, uri=sqlite_store, interval_s=0.05)
    run.start(step=3).event("finish", step=5)
    assert mirror.close(20) and status() == "FINISHED" and mirror.warning is None


@pytest.mark.parametrize("effect", ["before", "after"])
def test_a_driver_may_die_at_any_call(
    fake_run: Callable, sqlite_store: str, monkeypatch: pytest.MonkeyPatch, effect: str
):
    """Killed at the first call to MLflow, at the second, ... whether or not the call took effect;
    then another driver comes.
    """
    fatal, count = 0, list[str]()
    for fatal in itertools.count(1):
        run = fake_run(f"dies_at_{fatal}")
        run.attempt(
            *steps(0, 400),  # two batches
            ("finish", {"step": 400, "top1": 0.5}),
            study_parent=run.run_id[::-1],
        )
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            count = die_at_call(patch, fatal, effect)
            sync(run.folder, uri=sqlite_store)
            break
        sync(run.folder, uri=sqlite_store)
        assert [step for step, _ in history(sqlite_store, run, "train/loss")] == list(range(400))
        found = find(sqlite_store, run)
        # the run and its parent
        assert len(connect(sqlite_store).search_runs([found.info.experiment_id])) == 2
        assert (found.info.status, found.data.params["epochs"]) == ("FINISHED", "2")
        assert found.data.tags["spiketrain.artifact.recipe.json"]
    assert fatal - 1 == len(count) == 11


def test_the_journal_is_sent_at_a_start_and_whenever_the_weights_are_looked_at_and_at_the_end(
    fake_run: Callable, sqlite_store: str
):
    run = fake_run()
    delivery = Delivery(run.folder, uri=sqlite_store)

    def is_sent() -> bool:
        delivery.advance()
        artifact = artifacts(delivery.client.get_run(delivery.run_id)) / "journal.jsonl"
        return artifact.exists() and artifact.read_bytes() == journal.path.read_bytes()

    with run.start() as journal:
        assert is_sent()  # whoever looks on learns what the run is
        for kind in ("evaluation", "fidelity"):
            journal.events(steps(0, 2))
            assert not is_sent()
            journal.event(kind, step=1)
            assert is_sent()
        journal.events(steps(2, 4))
        assert not is_sent()
    assert sync(run.folder, uri=sqlite_store)  # nobody drives it: this is its end
    assert is_sent()
    artifact = artifacts(delivery.client.get_run(delivery.run_id)) / "journal.jsonl"
    artifact.write_text("as it is")
    # not sent without need
    assert sync(run.folder, uri=sqlite_store) and artifact.read_text() == "as it is"


def test_whoever_delivers_for_ever_is_not_waited_for(
    fake_run: Callable, sqlite_store: str, monkeypatch: pytest.MonkeyPatch
):
    """As a `sync` that was stopped with Ctrl-Z in the middle: a suite that ends would keep its
    machines.
    """
    monkeypatch.setattr(hierarchy, "LOCK_TIMEOUT_S", 0.5)
    run = fake_run()
    run.attempt()
    with (run.folder.parent / ".mlflow.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            TrackingError,
            match=(
                r"\.mlflow\.lock: the lock must be free to deliver to MLflow; another process still"
                r" holds it after 0 s: wait for that process, or end it$"
            ),
        ):
            sync(run.folder, uri=sqlite_store)
        threading.Timer(0.2, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        assert sync(run.folder, uri=sqlite_store).delivered == 0


def test_a_run_that_is_resumed_while_a_delivery_waits_its_turn_is_not_marked_killed(
    fake_run: Callable, sqlite_store: str
):
    """As that of a driver that was killed, which begins at that moment."""
    run = fake_run()
    run.attempt()
    with (
        (run.folder.parent / ".mlflow.lock").open("ab") as turn,
        (run.folder / "driver.lock").open("wb") as driver,
    ):
        fcntl.flock(turn, fcntl.LOCK_EX)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(sync, run.folder, uri=sqlite_store)
            time.sleep(0.5)
            assert not waiting.done()
            fcntl.flock(driver, fcntl.LOCK_EX)
            fcntl.flock(turn, fcntl.LOCK_UN)
            waiting.result(30)
        assert find(sqlite_store, run).info.status == "RUNNING"
    sync(run.folder, uri=sqlite_store)
    assert find(sqlite_store, run).info.status == "KILLED"


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("family", ".."),
        ("family", " . "),
        ("suite", ".."),
        ("suite", "../a-suite"),
        ("suite", "/a-suite"),
    ],
)
def test_a_journal_from_elsewhere_names_no_folder_elsewhere(
    fake_run: Callable, sqlite_store: str, field: str, name: str
):
    run = fake_run()
    run.attempt(study_parent=uuid.uuid4().hex, **{field: name})
    with pytest.raises(TrackingError, match=rf"{field} .*must be .* {re.escape(repr(name))}$"):
        sync(run.folder, uri=sqlite_store)


def test_a_parent_says_what_its_runs_say(fake_run: Callable, sqlite_store: str, tmp_path: Path):
    """`RUNNING` between two of them, too, while the suite is driven; and not finished before all of
    them are.
    """
    suite, family = tmp_path / "runs" / "a-suite", uuid.uuid4().hex
    first, second = (fake_run(name, family=family) for name in ("one", "two"))
    write_suite(suite, first.folder, second.folder)
    about = {"study_parent": uuid.uuid4().hex, "suite": "a-suite"}

    def parent_after(run: FakeRun) -> tuple[str | None, str]:
        sync(run.folder, uri=sqlite_store)
        above = find(sqlite_store, run).data.tags["mlflow.parentRunId"]
        found = connect(sqlite_store).get_run(above)
        return found.info.run_name, found.info.status

    first.attempt(("finish", {"step": 1}), **about)
    with (suite / "driver.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert parent_after(first) == ("a-suite", "RUNNING")
    assert parent_after(first) == ("a-suite", "KILLED")
    for kind, status, needed in (
        ("stopped", "KILLED", False),
        ("failed", "FAILED", False),
        ("finish", "FINISHED", False),
        ("failed", "FAILED", False),
        ("diverged", "FINISHED", False),  # beside others it is an answer
        ("diverged", "FAILED", True),  # unless they take its weights
    ):
        if needed:
            content = json.loads((suite / "suite.json").read_text())
            content["children"][0]["recipe"]["recipe"]["init"] = "@two"
            (suite / "suite.json").write_text(json.dumps(content))
        second.attempt((kind, {"error": "x"}), **about)
        assert parent_after(second) == ("a-suite", status)


def die_at_call(patch: pytest.MonkeyPatch, fatal: int, effect: str) -> list[str]:
    """Interrupts the call with this number to MLflow that changes something; returns the (growing)
    list of calls.
    """
    from mlflow import MlflowClient
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    calls: list[str] = []

    def dying(name: str, original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            is_fatal = len(calls) == fatal
            if is_fatal and effect == "before":
                raise KeyboardInterrupt
            result = original(*args, **kwargs)
            if is_fatal:
                raise KeyboardInterrupt
            return result

        return call

    changing = ("create_experiment", "create_run", "set_terminated", "log_artifact", "set_tag")
    # the client cuts a batch in several
    for owner, name in (
        *((MlflowClient, name) for name in changing),
        (SqlAlchemyStore, "log_batch"),
    ):
        patch.setattr(owner, name, dying(name, getattr(owner, name)))
    return calls


def test_many_deliverers_at_once_agree(fake_run: Callable, sqlite_store: str):
    from mlflow.entities import ViewType

    run, begin = fake_run(), threading.Barrier(6)
    with run.start(study_parent="c" * 32) as journal:
        journal.events(steps(0, 5))
        slow = Delivery(run.folder, uri=sqlite_store)
        assert slow.advance()
        journal.events(steps(5, 30))
    run.attempt(*steps(10, 60, scale=3.0), step=10)
    with ThreadPoolExecutor(6) as threads:
        deliveries = [
            threads.submit(lambda: (begin.wait(), sync(run.folder, uri=sqlite_store)))
            for _ in range(6)
        ]
    assert sum(each.result()[1].delivered for each in deliveries) == 55 * 3
    # The slower one sends what the others have sent: the same points, which the store keeps once.
    assert slow.advance() and slow.delivered == 60 * 3
    assert [step for step, _ in history(sqlite_store, run, "train/loss")] == list(range(60))
    # the run and its parent; none that had to be deleted
    experiments = [find(sqlite_store, run).info.experiment_id]
    assert len(connect(sqlite_store).search_runs(experiments, run_view_type=ViewType.ALL)) == 2


def test_a_run_deleted_in_mlflow_comes_back_whole_and_one_created_twice_is_one_again(
    fake_run: Callable, sqlite_store: str
):
    run, client = fake_run(), connect(sqlite_store)
    with run.start() as journal:
        journal.events(steps(0, 3))
        mirror = Mirror(run.folder, uri=sqlite_store, interval_s=0.05, max_interval_s=0.1)
        settled(lambda: len(history(sqlite_store, run, "train/loss")) == 3)
        client.delete_run(find(sqlite_store, run).info.run_id)
        journal.events(steps(3, 5))
    settled(lambda: len(history(sqlite_store, run, "train/loss")) == 5)
    assert mirror.close(20)
    experiment = find(sqlite_store, run).info.experiment_id
    client.create_run(experiment, tags={"spiketrain.run_id": run.run_id})
    sync(run.folder, uri=sqlite_store)
    assert len(history(sqlite_store, run, "train/loss")) == 5


def test_names_and_values_that_mlflow_refuses(fake_run: Callable, sqlite_store: str):
    run = fake_run()
    metrics = {"top1@5%": 1, "flag": True, "text": "slow", "none": None, "inf": math.inf}
    run.attempt(
        ("evaluation", {"step": 0, "metrics": metrics}),
        ("checkpoint", {"step": 0}),
        ("invented", {"step": 1, "metrics": {"x": 1}}),
        params={"augment[0].p": "x" * 9000},
        rule="HLOP(OTTT)",
        hardware={"gpu#0": "y" * 9000},
    )
    assert points(run, sqlite_store) == (2, 0)
    found = find(sqlite_store, run)
    assert set(found.data.metrics) == {"val/inf", "val/top1_5_"}
    assert len(found.data.params["augment_0_.p"]) == 6000


def test_nothing_to_deliver(fake_run: Callable, sqlite_store: str):
    run = fake_run()
    assert Mirror(run.folder, uri=sqlite_store, interval_s=0.05).close(20)
    with pytest.raises(TrackingError, match="must have a start event to be delivered"):
        sync(run.folder, uri=sqlite_store)


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for given, uri in (
        ("", f"sqlite:///{tmp_path}/runs/mlflow.db"),
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("sqlite:///other.db", f"sqlite:///{tmp_path}/other.db"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert tracking_uri("runs") == uri


# ------------------------------------------------------------------------------------- dead servers


def test_a_server_that_refuses_costs_the_run_nothing(fake_run: Callable):
    run = fake_run()
    uri = f"http://somebody:secret@127.0.0.1:{free_port()}"
    with run.start() as journal:
        mirror = Mirror(run.folder, uri=uri, interval_s=0.01, max_interval_s=0.05)
        settled(lambda: mirror.warning is not None)
        before = time.perf_counter()
        journal.events(steps(0, 200))
        assert (time.perf_counter() - before) / 200 < 1e-3
    before = time.perf_counter()
    assert mirror.close(10) is False
    assert time.perf_counter() - before < 3
    assert re.fullmatch(r"((?!secret).)*spiketrain sync((?!secret).)*", mirror.warning or "")
    with pytest.raises(TrackingError, match=r"cannot be used.*\Z"):
        sync(run.folder, uri=uri)


def test_a_server_that_hangs_does_not_hold_the_driver(fake_run: Callable):
    run = fake_run()
    run.attempt()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirror = Mirror(run.folder, uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        silent.accept()
        before = time.perf_counter()
        assert mirror.close(0.5) is False
        assert time.perf_counter() - before < 1


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_server_that_hangs_dies_and_comes_back(
    fake_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false"
    )  # their number is that of seconds
    monkeypatch.setenv(
        "MLFLOW_HTTP_REQUEST_TIMEOUT", "6"
    )  # a new server needs seconds for its first answer
    run = fake_run()
    store, port = tmp_path / "server", free_port()
    store.mkdir()
    uri = f"http://127.0.0.1:{port}"
    with run.start() as journal:
        mirror = Mirror(run.folder, uri=uri, interval_s=0.05, max_interval_s=0.5)
        journal.events(steps(0, 5))  # before there is a server
        server = start_server(store, port)
        try:
            settled(lambda: len(history(uri, run, "train/loss")) == 5)
            # Requests are taken and time out; the server carries them out later, when they have
            # been sent again.
            os.killpg(server.pid, signal.SIGSTOP)
            journal.events(steps(5, 10))
            settled(lambda: mirror.warning is not None)
            os.killpg(server.pid, signal.SIGCONT)
            settled(lambda: len(history(uri, run, "train/loss")) == 10)
            settled(lambda: mirror.warning is None)
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            journal.events(steps(10, 20))
            journal.event("finish", step=20, top1=0.25)
            assert mirror.close(10) is False
            with pytest.raises(TrackingError, match="cannot be used"):
                sync(run.folder, uri=uri)
            server = start_server(store, port)
            assert points(run, uri) == (32, 30)
            assert [step for step, _ in history(uri, run, "train/loss")] == list(range(20))
            assert [step for step, _ in history(uri, run, "train/memory_bytes")] == list(range(20))
            found = find(uri, run).info
            sent = {file.path for file in connect(uri).list_artifacts(found.run_id)}
            assert (found.status, sent) == ("FINISHED", {"recipe.json", "journal.jsonl"})
            best = run.checkpoint(20, score=0.25)
            assert register(run.folder, best, name="small", alias="best", uri=uri) == "1"
            version = connect(uri).get_model_version_by_alias("small", "best")
            assert version.tags["uri"] == best.as_uri()
            store = open_store(uri)
            [seen] = store.runs()
            assert (seen.id, seen.experiment, seen.rule, seen.status, seen.newest * 1000) == (
                *(found.run_id, run.family, "SLTT", "FINISHED", found.end_time),
            )
            assert seen.metrics["summary/top1"] == 0.25
            newest = store.history(seen.id, "train/loss", since=17)
            assert [point.step for point in newest] == [18, 19]
            texts = [store.text(seen.id, name) for name in ("journal.jsonl", "summary.json")]
            assert texts == [journal.path.read_text(), None]
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def start_server(store: Path, port: int) -> subprocess.Popen:
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{store}/mlflow.db"),
        *("--artifacts-destination", str(store / "artifacts")),
    ]
    with (store / "log").open("ab") as log:
        server = subprocess.Popen(
            command, cwd=store, stdout=log, stderr=log, start_new_session=True
        )

    def answers() -> bool:
        assert server.poll() is None, (store / "log").read_text()
        # Its first real answer takes seconds, on a busy machine many.
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
        with urllib.request.urlopen(url, timeout=30) as reply:
            return reply.status == 200

    settled(answers, 120)
    return server


def settled(condition: Callable[[], bool], seconds: float = 40.0) -> None:
    """Wait until the condition holds; an error in it counts as not yet."""

    def holds() -> bool:
        with suppress(OSError, ValueError, AssertionError):
            return condition()
        return False

    until(holds, within=seconds)


@pytest.mark.parametrize("token", ["planted-token\n", "planted\ntoken"])
def test_a_token_that_is_refused_is_not_said(
    fake_run: Callable, monkeypatch: pytest.MonkeyPatch, token: str
):
    """As of a file that ends in a newline: http.client's error, and requests', hold what they
    refuse.
    """
    run = fake_run()
    run.attempt()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
    with pytest.raises(TrackingError, match="cannot be used") as refused:
        sync(run.folder, uri="http://127.0.0.1:9")
    assert "planted" not in str(refused.value) and "$MLFLOW_TRACKING_TOKEN" in str(refused.value)
