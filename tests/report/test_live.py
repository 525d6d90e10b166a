"""A study made of what a store holds: runs that have ended by their artifacts, those that go on by their newest points too."""

from __future__ import annotations

import json

import pytest

from pipeline.report.claims import Claim
from pipeline.report.live import Live
from pipeline.report.returned import Returned
from pipeline.report.store import Point
from tests.report.fake_store import FakeStore
from tests.report.hand_made import KEY, events, run
from tests.report.test_figures import SWEEP


@pytest.fixture
def store() -> FakeStore:
    store = FakeStore()
    store.add_finished("bptt", "BPTT")
    return store


def test_a_run_that_ended_is_read_once(store: FakeStore):
    live = Live(store)
    [member] = live.members(KEY)
    found = live.study([member])
    assert found.runs == (run(name="bptt"),)
    asked = len(store.asked)
    assert live.study(live.members(KEY)).runs == found.runs and len(store.asked) == asked


def test_an_artifact_that_arrives_late_is_seen(store: FakeStore):
    summary = store.texts.pop(("bptt" * 8, "summary.json"))
    live = Live(store)
    assert not live.run(store.members[0]).is_finished
    store.texts["bptt" * 8, "summary.json"] = summary
    store.add("bptt", tags={"spiketrain.artifact.summary.json": "0" * 16})
    assert live.run(store.members[0]).is_finished


def going_on(store: FakeStore, steps: int, *, newest: dict[str, float] | None = None) -> None:
    """A run whose journal was sent at batch 50, and whose metrics tell up to `steps`, `newest` of the last batches alone."""
    tags = {"spiketrain.artifact.journal.jsonl": "evaluation 1007"}
    told = [Point(step, 1000.0 + step / 10, step / 125) for step in range(10, steps + 1, 10)]
    metrics = {"train/top1": 0.0, **(newest or {})}
    made = store.add("going", rule="SLTT", state="RUNNING", tags=tags, newest=told[-1].time, metrics=metrics)
    store.histories[made.id, "train/top1"] = told
    store.texts[made.id, "journal.jsonl"] = "".join(json.dumps(event) + "\n" for event in events("SLTT")[:4])


def test_of_a_run_that_goes_on_only_new_points_are_asked_for(store: FakeStore):
    live = Live(store)
    going_on(store, 70)
    first = live.run(store.members[0])
    assert [point.step for point in first.curve] == [25, 50, 60, 70] and first.state == "running"
    assert (first.steps_per_epoch, first.total_steps, first.hardware["cpu"]) == (50, 100, "a cpu")
    assert [each.step for each in first.evaluations] == [50]
    assert first.curve[-1].seconds == pytest.approx(2 + 7)
    going_on(store, 90)
    del store.asked[:]
    assert [point.step for point in live.run(store.members[0]).curve] == [25, 50, 60, 70, 80, 90]
    assert [what for what in store.asked if what[0] == "history"] == [("history", store.members[0].id, "train/top1", 70)]
    del store.asked[:]
    live.run(store.members[0])
    assert [what for what in store.asked if what[0] == "history" or what[2:] == ("journal.jsonl",)] == []


def test_a_run_that_goes_on_is_divided_by_the_batches_that_its_parts_are_of(store: FakeStore):
    """The journal tells of 50, each of 40 + 80 ms; of those after it metrics tell the parts of the newest ten alone."""
    live = Live(store)
    going_on(store, 90)
    assert live.run(store.members[0]).step == 90
    assert live.run(store.members[0]).parts == pytest.approx({"forward": 0.04, "backward": 0.08})
    going_on(store, 90, newest={"train/forward_s": 0.1, "train/backward_s": 0.08})
    assert live.run(store.members[0]).parts == pytest.approx({"forward": (50 * 0.04 + 10 * 0.1) / 60, "backward": 0.08})


def test_a_run_without_a_journal_is_told_by_its_tags(store: FakeStore):
    tags = {
        "spiketrain.rule": "OPZO",
        "spiketrain.study": KEY,
        "spiketrain.seed": "3",
        "spiketrain.world_size": "2",
        "hardware.cpu": "x",
    }
    store.add("new", state="RUNNING", tags=tags)
    found = Live(store).run(store.members[0])
    assert (found.rule, found.seed, found.workers, found.hardware, found.curve) == ("OPZO", 3, 2, {"cpu": "x"}, ())


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("summary.json", '{"top1": 0.', "its summary.json in MLflow is not JSON"),
        ("summary.json", "[1]", "its summary.json in MLflow must hold a dict; got a list"),
        ("activity.json", "{}", "its activity.json in MLflow must hold a list; got a dict"),
        ("activity.json", '[{"name": "a"}]', "activity.json: a layer must have name, neurons, rates, silent, saturated; got"),
    ],
)
def test_what_cannot_be_shown_is_named(store: FakeStore, file: str, text: str, said: str):
    damaged = store.add_finished("half", "SLTT")
    store.texts[damaged.id, file] = text
    trial = store.add_finished("tried", "SLTT")
    store.texts[trial.id, "recipe.json"] = '{"version": 1, "recipe": {"protocol": "trial"}}'
    study = Live(store).study(store.members)
    assert [run.name for run in study.runs] == ["bptt"]
    assert study.notes[0].startswith("tried is a trial") and f"half is left out: {said}" in study.notes[1]


@pytest.mark.parametrize("state", ["FINISHED", "RUNNING"])
def test_a_run_whose_artifacts_cannot_be_read_is_left_out_and_the_others_are_shown(store: FakeStore, state: str):
    locked = store.add_finished("locked", "SLTT", state=state, tags={"spiketrain.artifact.journal.jsonl": "finish 1015"})
    store.refused[locked.id] = "store x: journal.jsonl cannot be read (Permission denied); look at it by hand"
    study = Live(store).study(store.members)
    assert [run.name for run in study.runs] == ["bptt"]
    assert study.notes == (f"locked is left out: {store.refused[locked.id]}",)


def test_what_the_report_of_a_suite_tells_is_part_of_its_study(store: FakeStore):
    store.add_finished("sltt", "SLTT", parent="suite")
    live = Live(store)
    assert (live.study(store.members).claims, live.study(store.members).notes) == ((), ())
    claim = Claim(about="SLTT", claim="saved bytes", published="0.30", bound="<= 0.2", ours="0.25", holds=False)
    store.texts["suite", "report.json"] = json.dumps(Returned(claims=(claim,), sweeps=(SWEEP,)).to_json())
    later = Live(store)  # a look lasts half a second
    study = later.study(store.members)
    assert (study.claims, study.sweeps, study.notes) == ((claim,), (SWEEP,), ())
    assert later.versions(store.members) != live.versions(store.members) and live.versions(store.members[1:]) == []
    store.refused["suite"] = "report.json cannot be read"
    study = Live(store).study(store.members)
    assert len(study.runs) == 2 and study.notes == ("What its suite's report tells is left out: report.json cannot be read",)
