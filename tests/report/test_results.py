"""The frame of results: the same from each source, and a quantity that is declared in one line."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import pipeline
from pipeline.report import metrics, page, results
from pipeline.report.compare import csv_of
from pipeline.report.metrics import METRICS, Metric
from pipeline.report.results import ReportError, Run, frame, metrics_of, read_run
from pipeline.report.stores import ServerStore, runs_of_store
from pipeline.report.study import Study
from pipeline.report.suite import read_study
from pipeline.report.tables import provenance
from pipeline.track.events import NO_ATTEMPT
from pipeline.track.journal import Record
from pipeline.track.mlflow import sync
from tests.helpers.fake_store import FakeStore
from tests.helpers.hand_made import KEY, LAYERS, MACHINE, events, fidelity, made, recipe, run
from tests.report.conftest import STUDY, compare, make_all
from tests.report.test_compare import text_of
from tests.report.test_dashboard import Asking


def test_a_metric_is_one_line(make_run: Callable, runs_dir: Path, monkeypatch: pytest.MonkeyPatch):
    sparsity = Metric("sparsity", "share of zeros", "share", "less", "weights.zeros")
    for module in (metrics, results):
        monkeypatch.setattr(module, "METRICS", [*METRICS, sparsity])
    make_all(
        make_run,
        {"bptt": {"weights": {"zeros": 0.5}}, "sltt": {"rule": "SLTT", "weights": {"zeros": 0.25}}},
    )
    assert pipeline.results(runs_dir)["sparsity"].tolist() == [0.5, 0.25]
    found = compare(runs_dir)
    assert "share of zeros" in text_of(found) and "25.00%  ×0.50" in text_of(found)
    told = found.to_json()["runs"][1]
    assert (told["sparsity"], told["ratios"]["sparsity"]) == (0.25, 0.5)
    assert "sparsity" in csv_of([found.to_json()]).splitlines()[0].split(",")
    html = page.render(read_study(runs_dir).study)
    assert (
        '<th scope="col">share of zeros</th>' in html and "<td>share of zeros</td>" in html
    )  # costs, and ratios
    store = FakeStore()
    for rule, value in (("BPTT", 0.5), ("SLTT", 0.25)):
        stored = store.add_finished(rule, rule)
        store.texts[stored.id, "summary.json"] = json.dumps(
            {**json.loads(store.texts[stored.id, "summary.json"]), "weights": {"zeros": value}}
        )
    shown = Asking(store).show(f"?study={KEY}")
    assert "share of zeros" in shown and "25.00% <span>(×0.50)</span>" in shown


def test_a_metric_that_is_not_compared_is_listed_beside(
    make_run: Callable, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(results, "METRICS", [*METRICS, Metric("cache.*.hits", "{} hits", "count")])
    make_run("bptt", cache={"image": {"hits": 3}, "text": {"hits": 4}})
    assert pipeline.results(runs_dir)["cache.text.hits"].tolist() == [4]
    html = page.render(read_study(runs_dir).study)
    assert '<th scope="col">image hits</th><th scope="col">text hits</th>' in html
    assert "image hits" not in text_of(compare(runs_dir))


def test_a_star_stands_for_each_key_that_a_summary_has():
    summaries = [
        {"operations": {"forward": {"additions": 1}, "text": 3}},
        {"operations": {"error": {"additions": 2}}},
        None,
        {},
    ]
    runs = [Run(name="", state="finished", summary=summary) for summary in summaries]
    names = [each.name for each in metrics_of(runs) if each.name.startswith("operations")]
    assert names == ["operations.forward.additions", "operations.error.additions"]


def test_no_two_metrics_have_one_name_or_one_title():
    assert (
        len({each.name for each in METRICS})
        == len({each.title for each in METRICS})
        == len(METRICS)
        > 25
    )


def test_a_folder_and_a_store_have_the_same_rows(
    make_run: Callable, runs_dir: Path, empty_store: Path
):
    """A store by SQL and through MLflow's client; of a summary's fields it has the numbers
    alone.
    """
    runs_dir.mkdir(exist_ok=True)
    shutil.copy(empty_store, runs_dir / "mlflow.db")
    uri = f"sqlite:///{runs_dir / 'mlflow.db'}"
    known = {"inference": {"energy_j": 4e-6}, "start": {"micro_batch": 32}}
    for name, end in (("bptt", "failed"), ("sltt", "finish")):
        folder = make_run(name, rule=name.upper(), end=end, **known)
        journal, summary = folder / "journal.jsonl", folder / "summary.json"
        *told, last = map(json.loads, journal.read_text().splitlines())
        told[0]["run_id"] = name * 8
        # the last event tells the whole summary, as that of a run does
        if summary.exists():
            last["summary"] = json.loads(summary.read_text())
        journal.write_text("".join(json.dumps(each) + "\n" for each in (*told, last)))
        sync(folder, uri=uri)
    names = ["rule", "seed", "study", "state", "workers", "top1", "wall_s", "inference.energy_j"]
    here = pipeline.results(runs_dir).set_index("run")[[*names, "images_per_s"]]
    for there in (
        pipeline.results(uri),
        pipeline.results(runs_dir / "mlflow.db"),
        frame(runs_of_store(ServerStore(uri))),
    ):
        found = there.set_index("run").loc[here.index, here.columns]
        pd.testing.assert_frame_equal(found, here, check_dtype=False, check_exact=True)
    sltt = here.loc["sltt", ["state", "top1", "inference.energy_j", "study"]]
    assert sltt.tolist() == ["finished", 0.9, 4e-6, STUDY]


def test_a_damaged_run_is_named(make_run: Callable, runs_dir: Path):
    _, sltt = make_all(make_run, {"bptt": {}, "sltt": {"rule": "SLTT", "study": "f" * 16}})
    (sltt / "summary.json").write_text("{")
    with pytest.raises(ReportError, match=r"sltt/summary\.json is not JSON"):
        pipeline.results(runs_dir)
    of_another_study = compare(runs_dir, ["bptt"])
    assert [run.name for run in of_another_study.group.finished] == ["bptt"]


def test_where_nothing_is(tmp_path: Path):
    with pytest.raises(
        ValueError, match="results: source must be a folder of runs or a store; got "
    ):
        pipeline.results(tmp_path / "nothing")
    assert pipeline.results(tmp_path).empty and "top1" in pipeline.results(tmp_path)


@pytest.mark.parametrize(
    "reading",
    [
        "import pipeline; assert len(pipeline.results(sys.argv[1])) == 1",
        "import pipeline; assert pipeline.results(sys.argv[2]).empty",
        "import pipeline.report.suite",
    ],
    ids=["folder", "store", "compare"],
)
def test_reading_waits_for_no_torch(
    reading: str, make_run: Callable, runs_dir: Path, empty_store: Path
):
    make_run("bptt")
    code = f"import sys; {reading}; assert not {{'torch', 'mlflow', 'ray'}} & {{*sys.modules}}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs_dir), str(empty_store)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_a_finished_run_has_written():
    one = run("SLTT", seed=3, top1=0.75)
    about = (one.name, one.rule, one.seed, one.study, one.state, one.commits)
    assert about == ("sltt-3", "SLTT", 3, KEY, "finished", ("abc",))
    assert (one.history.step, one.total_steps, one.steps_per_epoch) == (100, 100, 50)
    assert (one.workers, one.hardware, one.recipe["time_steps"]) == (1, MACHINE, 2)
    names = ("top1", "inference.energy_j", "inference.joules", "top1.x")
    assert [one.value(name) for name in names] == [0.75, 3e-6, None, None]
    assert [layer["rates"] for layer in one.activity] == [[0.5, 0.25], [0.25, 0.0]]


def test_seconds_are_those_of_its_attempts_alone():
    plain, restarted = run(), run(restart=True)
    seconds = [(point.step, point.seconds) for point in plain.history.curve]
    assert seconds == [(25, 5), (50, 8), (75, 13), (100, 16)]
    # The first attempt took 10 s, the second began a second before its first event; the 999 s
    # between them are nobody's.
    seconds = [(point.step, point.seconds) for point in restarted.history.curve]
    assert seconds == [(25, 5), (50, 8), (75, 14), (100, 17)]
    assert [(each.step, each.seconds) for each in restarted.history.restarts] == [(50, 11)]
    assert [(each.epoch, each.top1, each.seconds) for each in restarted.history.evaluations] == [
        (0, 0.8, 9),
        (1, 0.9, 18),
    ]
    assert restarted.commits == ("abc", "def") and plain.history.restarts == ()


def test_waiting_for_places_between_attempts_costs_nothing():
    told = events(restart=True)
    again = next(at for at, event in enumerate(told) if event["event"] == "start" and at)
    about, before = {"event": "waiting", "attempt": NO_ATTEMPT, "most_s": 3600.0}, told[again - 1]
    waiting = [{**about, "time": before["time"] + later} for later in (1.0, 86_401.0)]
    late = [
        {**event, **{name: event[name] + 90_000 for name in ("time", "began") if name in event}}
        for event in told[again:]
    ]

    def seconds(*events: Record) -> list[float]:
        past = made("r", events, state="running").history
        return [each.seconds for each in (*past.curve, *past.restarts, *past.evaluations)]

    assert seconds(*told[:again], *waiting, *late) == pytest.approx(seconds(*told))
    assert seconds(*waiting, *told) == pytest.approx(seconds(*told))


def test_a_run_that_goes_on_has_no_summary():
    files = {"summary": {"top1": 0.5}, "recipe": {"version": 1, "recipe": recipe()}}
    one = made("r", events()[:4], state="running", **files)
    assert (one.summary, one.is_finished, one.value("top1")) == (None, False, None)
    assert (one.history.step, one.rule, one.hardware) == (50, "BPTT", MACHINE)
    assert one.recipe["optimizer"]["kwargs"] == {"lr": 0.1}


TOLD = events(restart=True)  # a start, 25, 50, its evaluation, 60, a start from 50, 75, ...
COMPILING = {**TOLD[1], "metrics": {**TOLD[1]["metrics"], "data_wait_s": 1.0, "forward_s": 2.0}}
STEADY = {"forward": 0.04, "backward": 0.08}


@pytest.mark.parametrize(
    ("one", "parts"),
    [
        (run("SLTT"), {**STEADY, "rest": 0.005, "evaluation": 0.02}),
        (made("r", TOLD[:4], state="running"), STEADY),
        # the first point, in which compilation is, is left out
        (made("r", [TOLD[0], COMPILING, *TOLD[2:4]], state="running"), STEADY),
        # 60 batches were done, then the last 50; the first point of either start is left out
        (made("r", TOLD[:-1], state="stopped"), STEADY),
        (made("r", [], state="new"), {}),
    ],
)
def test_the_parts_of_a_batch(one: Run, parts: dict[str, float]):
    assert one.parts == pytest.approx(parts)


ANEW = {**TOLD[4], "time": TOLD[5]["time"] + 2, "attempt": 1, "metrics": {"top1": 0.75}}
LATE = {"event": "checkpoint", "step": 25, "time": TOLD[2]["time"], "attempt": 0}


@pytest.mark.parametrize(
    ("told", "redone", "curve", "step", "again_from"),
    [
        (TOLD[:6], "dropped", [(25, 0.2), (50, 0.4)], 50, None),
        # kept until it is told again, as MLflow takes no second value of a step
        (TOLD[:6], "kept", [(25, 0.2), (50, 0.4), (60, 0.48)], 60, 50),
        ([*TOLD[:6], ANEW], "kept", [(25, 0.2), (50, 0.4), (60, 0.75)], 60, None),
        (
            [*TOLD[:6], {**ANEW, "step": 55}],
            "kept",
            [(25, 0.2), (50, 0.4), (55, 0.75), (60, 0.48)],
            60,
            55,
        ),
        (TOLD[:7], "kept", [(25, 0.2), (50, 0.4), (60, 0.48), (75, 0.6)], 75, None),
        (
            [*TOLD[:6], {**TOLD[5], "attempt": 2}],
            "kept",
            [(25, 0.2), (50, 0.4), (60, 0.48)],
            60,
            50,
        ),
        # threads write checkpoints: one that is told of late is no step back
        ([*TOLD[:3], LATE], "kept", [(25, 0.2), (50, 0.4)], 50, None),
        ([*TOLD[:3], LATE], "dropped", [(25, 0.2), (50, 0.4)], 50, None),
        ([], "dropped", [], 0, None),
    ],
)
def test_what_a_restart_does_again(
    told: list[Record],
    redone: str,
    curve: list[tuple[int, float]],
    step: int,
    again_from: int | None,
):
    one = made("r", told, state="running", redone=redone)
    past = one.history
    assert [(point.step, point.top1) for point in past.curve] == curve
    assert (past.step, past.again_from) == (step, again_from)
    again = "" if again_from is None else f", repeating from {again_from}"
    [row] = provenance(Study(title="t", runs=(one,))).rows
    assert row[5] == f"{step}/{100 if told else '?'}{again}"


BACK = {**TOLD[0], "time": TOLD[3]["time"] + 1, "attempt": 1, "step": 0}
AGAIN = {**TOLD[3], "time": BACK["time"] + 5, "attempt": 1, "metrics": {"top1": 0.25}}


@pytest.mark.parametrize(
    ("more", "redone", "top1"),
    [
        ([], "dropped", []),
        ([], "kept", [0.8]),
        ([AGAIN], "dropped", [0.25]),
        ([AGAIN], "kept", [0.25]),
    ],
)
def test_an_evaluation_that_is_done_again_counts_as_it_was_done_last(
    more: list[Record], redone: str, top1: list[float]
):
    """The first was of weights that were given up: saving found that the workers' differed."""
    one = made("r", [*TOLD[:4], BACK, *more], state="running", redone=redone)
    assert [each.top1 for each in one.history.evaluations] == top1


def test_nothing_yet():
    one = made("new", [], state="new")
    assert (one.rule, one.hardware, one.history.evaluations) == ("unknown rule", {}, ())


def test_gradients_beside_bptts():
    one = run("SLTT", more_events=fidelity())
    assert [(each.step, each.epoch) for each in one.history.fidelity] == [(0, None), (50, 0)]
    assert one.history.fidelity[0].temporal_share == {"first": 0.5, "second": None}
    assert one.history.fidelity[1].cosines == {"SLTT": {"first": 0.75, "second": 1.0}}


def test_from_its_folder(make_run: Callable, runs_dir: Path):
    folder = make_run("bptt", top1=0.9)
    (folder / "activity.json").write_text(json.dumps(LAYERS))
    one = read_run(folder)
    assert (one.name, one.state, one.value("top1"), one.recipe["batch_size"]) == (
        "bptt",
        "finished",
        0.9,
        64,
    )
    assert [layer["name"] for layer in one.activity] == ["first", "second"]


@pytest.mark.parametrize("damage", ["{", "{}", '[{"name": "a"}]'])
def test_damaged_files_end_in_a_sentence(make_run: Callable, damage: str):
    folder = make_run("bptt")
    (folder / "activity.json").write_text(damage)
    with pytest.raises(ReportError, match=r"activity\.json"):
        _ = read_run(folder).activity


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("trained_on", 3, "trained_on must be a list of objects; got 3"),
        ("trained_on", [3], "trained_on must be a list of objects; got 3 in it"),
        ("trained_on", [{"hardware": "x"}], "hardware must be an object; got 'x'"),
        ("hardware", [1], "hardware must be an object; got [1]"),
        ("conditions", "x", "conditions must be an object; got 'x'"),
        ("commits", 3, "commits must be a list; got 3"),
        ("steps", "all", "steps must be a number; got 'all'"),
        ("images_per_s", "80", "images_per_s must be a number; got '80'"),
    ],
)
def test_a_summary_of_the_wrong_kind_is_named_with_its_field(
    make_run: Callable, field: str, value: Any, said: str
):
    folder = make_run("bptt", **{field: value})
    with pytest.raises(ReportError) as refusal:
        read_run(folder)
    assert str(refusal.value) == f"{folder / 'summary.json'}: {said}"
