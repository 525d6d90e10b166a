from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest

from pipeline.track.journal import read
from pipeline.track.mlflow import Mirror, sample_load, sync
from pipeline.track.mlflow_store import connect
from tests.track.test_mlflow import find, history, settled

CPU = "system/cpu_utilization_percentage"


def sampled(folder: Path, count: int) -> None:
    file, closing = folder / "system.jsonl", Event()
    thread = Thread(target=sample_load, args=(file, closing))
    thread.start()
    settled(lambda: len(read(file)) >= count)
    closing.set()
    thread.join()


def test_samples_go_on_after_a_resume_and_arrive_once_with_their_own_time(
    fake_run: Callable, sqlite_store: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = fake_run()
    with run.start() as journal:
        sampled(run.folder, 3)
        first = len(read(run.folder / "system.jsonl"))
        sync(run.folder, uri=sqlite_store)
        sampled(run.folder, first + 2)
        journal.event("finish", step=1)
    sync(run.folder, uri=sqlite_store)
    samples = read(run.folder / "system.jsonl")
    assert [sample["step"] for sample in samples] == list(range(len(samples)))
    found = find(sqlite_store, run)
    points = connect(sqlite_store).get_metric_history(found.info.run_id, CPU)
    assert [(point.step, point.timestamp) for point in points] == [
        (sample["step"], int(sample["time"] * 1000)) for sample in samples
    ]
    assert found.data.metrics.keys() >= {
        *(CPU, "system/system_memory_usage_megabytes", "system/disk_usage_percentage")
    }
    assert all(0 <= point.value <= 100 for point in points)


def test_it_can_be_switched_off_and_costs_a_short_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (ended := Event()).set()
    sample_load(tmp_path / "system.jsonl", ended)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    sample_load(tmp_path / "system.jsonl", Event())
    assert not (tmp_path / "system.jsonl").exists()


def test_the_mirror_samples(fake_run: Callable, sqlite_store: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = fake_run()
    with run.start() as journal:
        mirror = Mirror(run.folder, uri=sqlite_store, interval_s=0.05)
        settled(lambda: len(history(sqlite_store, run, CPU)) >= 2)
        journal.event("finish", step=1)
    assert mirror.close(20)
    assert len(history(sqlite_store, run, CPU)) == len(read(run.folder / "system.jsonl"))


@pytest.mark.parametrize(
    ("interval", "error"),
    [
        ("0.1", "FileNotFoundError"),
        ("soon", "ValueError: could not convert string to float: 'soon'"),
    ],
)
def test_what_goes_wrong_ends_the_samples_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: str, error: str
):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", interval)
    with pytest.warns(UserWarning, match=f"system metrics are no longer sampled: {error}"):
        sample_load(tmp_path / "gone" / "system.jsonl", Event())
