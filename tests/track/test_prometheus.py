"""What Prometheus is told of a run."""

import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.track.events import KINDS, Gauge, declared
from pipeline.track.journal import read
from pipeline.track.prometheus import MetricsFile, exposition, newest
from tests.helpers.events import RawJournal
from tests.helpers.small import small_recipe, train_inline

Event = dict[str, Any]


def start(*, attempt: int = 0, step: int = 0, time: float = 100.0, **fields: Any) -> Event:
    return {
        "event": "start",
        "time": time,
        "attempt": attempt,
        "run": "a-run",
        "recipe": "sltt",
        "rule": "SLTT",
        "world_size": 2,
        "total_steps": 40,
        "step": step,
        **fields,
    }


def step(number: int, *, time: float = 110.0, **metrics: Any) -> Event:
    return {
        "event": "step",
        "time": time,
        "attempt": 0,
        "step": number,
        "metrics": {
            "loss": 1.5,
            "top1": 0.25,
            "images_per_s": 800.0,
            "lr": 0.1,
            "step_s": 0.5,
            "data_wait_s": 0.125,
            **metrics,
        },
        "memory_bytes": 2**30,
    }


def values(text: str) -> dict[str, float]:
    """Name and state to value, as Prometheus' own parser reads the text."""
    return {
        (
            f"{sample.name}.{sample.labels['state']}" if "state" in sample.labels else sample.name
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_figure_has_the_value_of_the_newest_event_that_has_it():
    metrics = {"top1": 0.75, "loss": 0.5, "firing_rate": 0.125}
    evaluation = {"event": "evaluation", "time": 130.0, "step": 20, "metrics": metrics}
    checkpoint = {"event": "checkpoint", "time": 131.0, "step": 20, "write_s": 0.5}
    steps = [step(10), step(20, time=120.0, images_per_s=900.0)]
    text = exposition([start(run='a "run"\\\nof mine'), *steps, evaluation, checkpoint])
    expected = {
        "spiketrain_images_per_second": 900.0,
        "spiketrain_loss": 1.5,
        "spiketrain_step": 20,
        "spiketrain_total_steps": 40,
        "spiketrain_data_wait_seconds": 0.125,
        "spiketrain_step_seconds": 0.5,
        "spiketrain_memory_bytes": 2**30,
        "spiketrain_restarts_total": 0,
        "spiketrain_event_timestamp_seconds": 131.0,
        "spiketrain_evaluation_top1_ratio": 0.75,
        "spiketrain_evaluation_loss": 0.5,
        "spiketrain_firing_rate": 0.125,
        "spiketrain_checkpoint_step": 20,
        "spiketrain_checkpoint_timestamp_seconds": 131.0,
        "spiketrain_checkpoint_seconds": 0.5,
    }
    assert values(text).items() >= expected.items()
    line = r"""spiketrain_loss{recipe="sltt",rule="SLTT",run="a \"run\"\\\nof mine"} 1.5"""
    assert line in text.splitlines()


def test_nothing_is_said_of_what_has_no_event_yet():
    assert exposition([]) == ""
    assert exposition([{"event": "quarantine", "time": 1.0, "attempt": 0}]) == ""
    told = values(exposition([start()]))
    assert not [name for name in told if "loss" in name or "checkpoint" in name]


def test_a_real_run_tells_every_figure_that_there_is(tmp_path: Path):
    train_inline(tmp_path / "run", small_recipe(epochs=1))

    told = values(exposition(read(tmp_path / "run" / "journal.jsonl")))
    gauges = {gauge.name for kind in KINDS.values() for _, gauge in declared(kind, Gauge)}
    assert len(gauges) >= 15 and gauges <= told.keys()


def test_a_restart_counts_and_goes_back_to_its_checkpoint():
    found = values(exposition([start(), step(20), start(attempt=1, step=15, time=140.0)]))
    names = ("restarts_total", "step", "state.running")
    assert [found[f"spiketrain_{name}"] for name in names] == [1, 15, 1]


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("finish", "finished"),
        ("stopped", "stopped"),
        ("failed", "failed"),
        ("diverged", "diverged"),
    ],
)
def test_one_state_at_a_time(kind: str, state: str):
    last = {"event": kind, "time": 150.0, "attempt": 0, "step": 20}
    for events, current in (([last], state), ([last, start(attempt=1, time=160.0)], "running")):
        found = values(exposition([start(), step(20), *events]))
        states = {name: value for name, value in found.items() if "state." in name}
        assert len(states) == 5
        assert [name for name, value in states.items() if value] == [f"spiketrain_state.{current}"]


@pytest.mark.parametrize(
    ("told", "written"),
    [
        (math.nan, "NaN"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        *((nothing, None) for nothing in (None, True, "much", [1.0])),
    ],
)
def test_numbers_that_are_not_finite_are_told_and_no_numbers_are_left_out(
    told: object, written: str | None
):
    text = exposition([start(), step(1, loss=told)])
    assert ("spiketrain_loss" in values(text)) == (written is not None)
    line = f'spiketrain_loss{{recipe="sltt",rule="SLTT",run="a-run"}} {written}'
    assert (line in text.splitlines()) == (written is not None)


def test_the_newest_events_are_enough():
    events = [
        start(),
        *(step(n) for n in range(1, 30)),
        {"event": "stopped", "time": 1.0, "step": 29},
        start(attempt=1, step=29),
    ]

    assert len(newest(events)) == 3
    assert exposition(newest(events)) == exposition(events)
    for cut in range(len(events)):
        assert newest([*newest(events[:cut]), *events[cut:]]) == newest(events)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that SPIKETRAIN_METRICS names."""
    (made := tmp_path / "metrics").mkdir()
    monkeypatch.setenv("SPIKETRAIN_METRICS", str(made))
    return made


def test_a_file_is_replaced_at_once_and_readable_for_the_collector(
    tmp_path: Path, folder: Path
) -> None:
    exposed, seen, done = (
        MetricsFile(tmp_path / "a-run", pytest.fail),
        set[str](),
        threading.Event(),
    )
    events = [[start(), *[step(n, loss=loss)]] for n, loss in ((1, 1.0), (2, 2.0))]

    def scrape() -> None:
        while not done.is_set():
            seen.update(
                path.read_text() for path in folder.iterdir() if path.name.endswith(".prom")
            )

    reader = threading.Thread(target=scrape)
    umask = os.umask(0o077)
    try:
        reader.start()
        for n in range(200):
            exposed.show(events[n % 2])
    finally:
        os.umask(umask)
        done.set()
        reader.join()
    assert seen and seen <= {exposition(each) for each in events}
    assert [path.name for path in folder.iterdir()] == ["a-run.prom"]
    assert (folder / "a-run.prom").stat().st_mode & 0o777 == 0o644


def test_a_run_that_goes_on_tells_what_its_journal_had_said(tmp_path: Path, folder: Path) -> None:
    (run := tmp_path / "a-run").mkdir()
    journal = RawJournal(run / "journal.jsonl", attempt=0)
    journal.event("start", run="a-run", total_steps=40)
    exposed = MetricsFile(run, pytest.fail)
    journal.event("step", step=3, metrics={"loss": 0.5})
    exposed.show(read(run / "journal.jsonl")[1:])
    found = values((folder / "a-run.prom").read_text())
    assert (
        found["spiketrain_total_steps"],
        found["spiketrain_loss"],
        found["spiketrain_step"],
    ) == (40, 0.5, 3)


def test_nothing_is_written_where_nobody_asked_and_a_folder_that_goes_away_is_said_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    exposed = MetricsFile(tmp_path / "a-run", said.append)
    folder.rmdir()
    for number in (1, 2):
        exposed.show([start(), step(number)])
    assert len(said) == 1 and "cannot be written (No such file or directory)" in said[0]
    with pytest.raises(ValueError, match="must be an existing folder"):
        MetricsFile(tmp_path / "a-run", said.append)
    monkeypatch.delenv("SPIKETRAIN_METRICS")
    MetricsFile(tmp_path, pytest.fail).show([start()])
    assert not list(tmp_path.iterdir())
