"""A study made of what a store holds: runs that have ended by their artifacts, those that go on by
their newest points too.
"""

import json

import pytest

from pipeline.report.dashboard.live import Live
from pipeline.report.stores import Point
from tests.helpers.fake_store import FakeStore
from tests.helpers.hand_made import CLAIM, KEY, events, run
from tests.report.test_figures import SWEEP


@pytest.fixture
def store() -> FakeStore:
    store = FakeStore()
    store.add_finished("bptt", "BPTT")
    return store


def test_a_run_that_ended_is_read_once(store: FakeStore):
    live = Live(store)
    found = live.study(store.members)
    assert found.runs == (run(name="bptt"),) and found.runs[0].history == run().history
    asked = len(store.asked)
    assert live.study(store.members).runs == found.runs and len(store.asked) == asked


def test_an_artifact_that_arrives_late_is_seen(store: FakeStore):
    summary = store.texts.pop(("bptt" * 8, "summary.json"))
    live = Live(store)
    assert not live.run(store.members[0]).is_finished
    store.texts["bptt" * 8, "summary.json"] = summary
    store.add("bptt", tags={"spiketrain.artifact.summary.json": "0" * 16})
    assert live.run(store.members[0]).is_finished


def going_on(store: FakeStore, steps: int, *, newest: dict[str, float] | None = None) -> None:
    """A run whose journal was sent at batch 50, and whose metrics tell up to `steps`, `newest` of
    the last batches alone.
    """
    tags = {"spiketrain.artifact.journal.jsonl": "evaluation 1007"}
    told = [Point(step, 1000.0 + step / 10, step / 125) for step in range(10, steps + 1, 10)]
    metrics = {"train/top1": 0.0, **(newest or {})}
    made = store.add(
        "going", rule="SLTT", status="RUNNING", tags=tags, newest=told[-1].time, metrics=metrics
    )
    store.histories[made.id, "train/top1"] = told
    store.texts[made.id, "journal.jsonl"] = "".join(
        json.dumps(event) + "\n" for event in events("SLTT")[:4]
    )


def test_of_a_run_that_goes_on_only_the_points_after_its_sent_journal_are_asked_for(
    store: FakeStore,
):
    live = Live(store)
    going_on(store, 70)
    first = live.run(store.members[0])
    assert first.state == "running"
    assert [point.step for point in first.history.curve] == [25, 50, 60, 70]
    assert (first.steps_per_epoch, first.total_steps, first.hardware["cpu"]) == (50, 100, "a cpu")
    assert [each.step for each in first.history.evaluations] == [50]
    assert first.history.curve[-1].seconds == pytest.approx(2 + 7)
    going_on(store, 90)
    del store.asked[:]
    assert [point.step for point in live.run(store.members[0]).history.curve] == [
        25,
        50,
        60,
        70,
        80,
        90,
    ]
    assert [what for what in store.asked if what[0] == "history"] == [
        ("history", store.members[0].id, "train/top1", 50)
    ]
    del store.asked[:]
    live.run(store.members[0])
    assert store.asked == []


def test_a_resumed_run_stands_where_it_stood_until_it_has_passed_that(store: FakeStore):
    """Its journal was sent at its second start, from batch 50; of batches 51 to 60 MLflow takes no
    second value.
    """
    tags = {"spiketrain.artifact.journal.jsonl": "start 2008"}
    made = store.add(
        "resumed",
        rule="SLTT",
        status="RUNNING",
        tags=tags,
        newest=2009.0,
        metrics={"train/top1": 0.0},
    )
    store.texts[made.id, "journal.jsonl"] = "".join(
        json.dumps(event) + "\n" for event in events("SLTT", restart=True)[:6]
    )
    told = [Point(step, 1000.0 + step / 10, step / 125) for step in (25, 50, 60)]
    store.histories[made.id, "train/top1"] = told
    live = Live(store)
    found = live.run(store.members[0])
    assert [point.step for point in found.history.curve] == [25, 50, 60]
    assert (found.history.step, found.history.again_from) == (60, 50)
    store.histories[made.id, "train/top1"] = [*told, Point(70, 2011.0, 0.5)]
    store.add(
        "resumed",
        rule="SLTT",
        status="RUNNING",
        tags=tags,
        newest=2011.0,
        metrics={"train/top1": 0.5},
    )
    found = live.run(store.members[0])
    assert [point.step for point in found.history.curve] == [25, 50, 60, 70]
    assert (found.history.step, found.history.again_from) == (70, None)
    assert found.last_heard == 2011.0


def test_a_run_that_goes_on_is_divided_by_the_batches_that_its_parts_are_of(store: FakeStore):
    """The journal tells of 50, each of 40 + 80 ms, of which the point of the first 25 is left out;
    of those after it metrics tell the parts of the newest ten alone."""
    going_on(store, 90)
    found = Live(store).run(store.members[0])
    assert found.history.step == 90
    assert found.parts == pytest.approx({"forward": 0.04, "backward": 0.08})
    going_on(store, 90, newest={"train/forward_s": 0.1, "train/backward_s": 0.08})
    assert Live(store).run(store.members[0]).parts == pytest.approx(
        {"forward": (25 * 0.04 + 10 * 0.1) / 35, "backward": 0.08}
    )


def test_a_run_without_a_journal_is_told_by_its_tags(store: FakeStore):
    tags = {
        "spiketrain.rule": "OPZO",
        "spiketrain.study": KEY,
        "spiketrain.seed": "3",
        "spiketrain.world_size": "2",
        "hardware.cpu": "x",
    }
    store.add("new", status="RUNNING", tags=tags)
    found = Live(store).run(store.members[0])
    assert (found.rule, found.seed, found.workers, found.hardware, found.history.curve) == (
        "OPZO",
        3,
        2,
        {"cpu": "x"},
        (),
    )


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("summary.json", '{"top1": 0.', "its summary.json in MLflow is not JSON"),
        ("summary.json", "[1]", "its summary.json in MLflow must contain a JSON object; got list"),
        (
            "summary.json",
            '{"trained_on": 3}',
            "its summary.json in MLflow: trained_on must be a list of objects; got 3",
        ),
        (
            "summary.json",
            '{"hardware": 3}',
            "its summary.json in MLflow: hardware must be an object; got 3",
        ),
        (
            "summary.json",
            '{"conditions": "x"}',
            "its summary.json in MLflow: conditions must be an object; got 'x'",
        ),
        ("activity.json", "{}", "its activity.json in MLflow must contain a JSON list; got dict"),
        (
            "activity.json",
            '[{"name": "a"}]',
            (
                "activity.json: each layer must have name, neurons, samples, rates, silent,"
                " saturated; got"
            ),
        ),
    ],
)
def test_what_cannot_be_shown_is_named(store: FakeStore, file: str, text: str, said: str):
    store.texts[store.add_finished("half", "SLTT").id, file] = text
    trial = store.add_finished("tried", "SLTT")
    store.texts[trial.id, "recipe.json"] = '{"version": 1, "recipe": {"protocol": "trial"}}'
    study = Live(store).study(store.members)
    assert [run.name for run in study.runs] == ["bptt"]
    assert (
        study.notes[0].startswith("tried is excluded: it is a trial")
        and f"half is excluded: {said}" in study.notes[1]
    )


def test_a_run_whose_journal_was_thinned_says_so(store: FakeStore):
    going_on(store, 70)
    assert Live(store).study(store.members).notes == ()
    store.every = 12
    study = Live(store).study(store.members)
    long = "has a long journal: its curve shows one of every 12 points"
    assert study.notes == (
        f"going {long}, and its parts of time are means over these points.",
        f"bptt {long}.",
    )
    assert study.runs[0].parts and [point.step for point in study.runs[0].history.curve] == [
        25,
        50,
        60,
        70,
    ]


@pytest.mark.parametrize("status", ["FINISHED", "RUNNING"])
def test_a_run_whose_artifacts_cannot_be_read_is_left_out_and_the_others_are_shown(
    store: FakeStore, status: str
):
    locked = store.add_finished(
        "locked", "SLTT", status=status, tags={"spiketrain.artifact.journal.jsonl": "finish 1015"}
    )
    store.refused[locked.id] = (
        "store x: journal.jsonl cannot be read (Permission denied); check the file"
    )
    study = Live(store).study(store.members)
    assert [run.name for run in study.runs] == ["bptt"]
    assert study.notes == (f"locked is excluded: {store.refused[locked.id]}",)


def test_what_the_report_of_each_suite_tells_is_by_itself(store: FakeStore):
    about = {
        "spiketrain.suite": "claims-1",
        "spiketrain.commit": "abc",
        "hardware.cpu": "a cpu",
        "hardware.cores": "2",
    }
    store.add_finished("sltt", "SLTT", parent="first-launch", tags=about)
    store.add_finished(
        "bptt-again", "BPTT", parent="second-launch", tags={**about, "spiketrain.commit": "def"}
    )
    store.add_finished(
        "sltt-again", "SLTT", parent="second-launch", tags={**about, "spiketrain.commit": "def"}
    )
    live = Live(store)
    before = live.reports(store.members)
    assert [(report.claims, report.sweeps) for report in before] == 2 * [((), ())]
    store.add_report("first-launch", CLAIM, sweeps=(SWEEP,))
    second, first = live.reports(store.members)  # the newest first
    assert (first.claims, first.sweeps, first.note) == ((CLAIM,), (SWEEP,), "")
    assert (second.claims, second.sweeps) == ((), ())
    assert first.title == "claims-1 (first-la), commit abc, on a cpu, 2 cores"
    assert second.title == "claims-1 (second-l), commit def, on a cpu, 2 cores"
    assert [second.version, first.version] != [report.version for report in before]
    assert live.reports(store.members[-1:]) == []  # launched alone
    store.refused["first-launch"] = "report.json cannot be read"
    assert (
        live.reports(store.members)[1].note == "Its report is excluded: report.json cannot be read"
    )
    assert len(live.study(store.members).runs) == 4
