"""The frame of results: the same from each source, and a quantity that is declared in one line."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.report import page, results
from pipeline.report.compare import csv_of
from pipeline.report.history import History
from pipeline.report.results import METRICS, Metric, ReportError, Run, expanded, frame, read_run
from pipeline.report.stores import ServerStore, runs_of_store
from pipeline.report.study import Study
from pipeline.report.suite import read_study
from pipeline.report.tables import provenance
from pipeline.track.events import OF_NONE
from pipeline.track.journal import Record
from pipeline.track.mlflow import sync
from tests.helpers.events import RawJournal, event
from tests.helpers.fake_store import FakeStore
from tests.helpers.hand_made import KEY, LAYERS, MACHINE, events, fidelity, made, recipe, run
from tests.report.conftest import STUDY, compare, make_all
from tests.report.test_compare import text_of
from tests.report.test_dashboard import Asking


def test_a_metric_is_one_line(make_run: Callable, runs_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        results,
        "METRICS",
        [*METRICS, Metric("sparsity", "share of zeros", "share", "less", "weights.zeros")],
    )
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
    assert "share of zeros" in shown and "25.00% (×0.50)" in shown


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
    names = [each.name for each in expanded(runs) if each.name.startswith("operations")]
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
    for name, rule in (("bptt", "BPTT"), ("sltt", "SLTT")):
        folder = make_run(
            name,
            rule=rule,
            inference={"energy_j": 4e-6},
            end="failed" if name == "bptt" else "finish",
        )
        lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
        about = {"run_id": name * 8, "micro_batch": 32}
        told = [{**event, **about} if event["event"] == "start" else event for event in lines]
        (folder / "journal.jsonl").write_text(
            "".join(json.dumps(event) + "\n" for event in told[:-1])
        )
        with RawJournal(folder / "journal.jsonl", attempt=0) as journal:
            summary = folder / "summary.json"
            whole = json.loads(summary.read_text()) if summary.exists() else {}
            journal.write(
                event(
                    told[-1]["event"],
                    **{key: value for key, value in whole.items() if key not in ("run",)},
                )
            )
        sync(folder, uri=f"sqlite:///{runs_dir / 'mlflow.db'}")
    here = pipeline.results(runs_dir).set_index("run")
    uri = f"sqlite:///{runs_dir / 'mlflow.db'}"
    for there in (
        pipeline.results(uri),
        pipeline.results(runs_dir / "mlflow.db"),
        frame(runs_of_store(ServerStore(uri))),
    ):
        there = there.set_index("run").loc[here.index]
        for name in (
            "rule",
            "seed",
            "study",
            "state",
            "workers",
            "top1",
            "wall_s",
            "inference.energy_j",
            "images_per_s",
        ):
            assert there[name].fillna(-1).tolist() == here[name].fillna(-1).tolist(), name
    assert here.loc["sltt", ["state", "top1", "inference.energy_j", "study"]].tolist() == [
        "finished",
        0.9,
        4e-6,
        STUDY,
    ]


def test_a_damaged_run_is_named(make_run: Callable, runs_dir: Path):
    make_run("bptt")
    (make_run("sltt", rule="SLTT", study="f" * 16) / "summary.json").write_text("{")
    with pytest.raises(ReportError, match=r"sltt/summary\.json is not JSON"):
        pipeline.results(runs_dir)
    assert [run.name for run in compare(runs_dir, ["bptt"]).group.finished] == [
        "bptt"
    ]  # of another study


def test_where_nothing_is(tmp_path: Path):
    with pytest.raises(
        ValueError, match="results: source must be a folder of runs or a store; got "
    ):
        pipeline.results(tmp_path / "nothing")
    assert pipeline.results(tmp_path).empty and "top1" in pipeline.results(tmp_path)


def test_results_wait_for_no_torch(make_run: Callable, runs_dir: Path):
    make_run("bptt")
    code = (
        "import sys, pipeline; print(len(pipeline.results(sys.argv[1]))); assert 'torch' not in"
        " sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs_dir)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_what_a_finished_run_has_written():
    one = run("SLTT", seed=3, top1=0.75)
    assert (one.name, one.rule, one.seed, one.study, one.state) == (
        "sltt-3",
        "SLTT",
        3,
        KEY,
        "finished",
    )
    assert (one.history.step, one.total_steps, one.steps_per_epoch, one.workers) == (
        100,
        100,
        50,
        1,
    )
    assert one.hardware == MACHINE and one.commits == ("abc",) and one.recipe["time_steps"] == 2
    assert one.value("top1") == 0.75 and one.value("inference.energy_j") == 3e-6
    assert one.value("inference.joules") is None and one.value("top1.x") is None
    assert [layer["rates"] for layer in one.activity] == [[0.5, 0.25], [0.25, 0.0]]
    assert one.parts == pytest.approx(
        {"forward": 0.04, "backward": 0.08, "rest": 0.005, "evaluation": 0.02}
    )


def test_seconds_are_those_of_its_attempts_alone():
    plain, restarted = run(), run(restart=True)
    assert [(point.step, point.seconds) for point in plain.history.curve] == [
        (25, 5),
        (50, 8),
        (75, 13),
        (100, 16),
    ]
    # The first attempt took 10 s, the second began a second before its first event; the 999 s
    # between them are nobody's.
    assert [(point.step, point.seconds) for point in restarted.history.curve] == [
        (25, 5),
        (50, 8),
        (75, 14),
        (100, 17),
    ]
    assert [(each.step, each.seconds) for each in restarted.history.restarts] == [(50, 11)]
    assert [(each.epoch, each.top1, each.seconds) for each in restarted.history.evaluations] == [
        (0, 0.8, 9),
        (1, 0.9, 18),
    ]
    assert restarted.commits == ("abc", "def") and plain.history.restarts == ()


def test_waiting_for_places_between_attempts_costs_nothing():
    told = events(restart=True)
    again = next(at for at, event in enumerate(told) if event["event"] == "start" and at)
    before = float(told[again - 1]["time"])
    waiting = [
        {"event": "waiting", "time": before + later, "attempt": OF_NONE, "most_s": 3600.0}
        for later in (1.0, 86_401.0)
    ]
    late = [
        {**event, **{name: event[name] + 90_000 for name in ("time", "began") if name in event}}
        for event in told[again:]
    ]

    def seconds(*events: Record) -> list[float]:
        one = made("r", events, state="running")
        return [
            each.seconds
            for each in (*one.history.curve, *one.history.restarts, *one.history.evaluations)
        ]

    assert seconds(*told[:again], *waiting, *late) == pytest.approx(seconds(*told))
    assert seconds(*waiting, *told) == pytest.approx(seconds(*told))


def test_a_run_that_goes_on_has_no_summary_and_the_parts_so_far():
    one = made(
        "r",
        events()[:4],
        state="running",
        summary={"top1": 0.5},
        recipe={"version": 1, "recipe": recipe()},
    )
    assert one.summary is None and not one.is_finished and one.value("top1") is None
    assert (one.history.step, one.rule, one.hardware) == (50, "BPTT", MACHINE)
    assert one.parts == pytest.approx({"forward": 0.04, "backward": 0.08})
    assert one.recipe["optimizer"]["kwargs"] == {"lr": 0.1}


def test_parts_so_far_leave_out_the_point_in_which_compilation_is():
    told = events()[:4]
    first = next(event for event in told if event["event"] == "step")
    first["metrics"] = {**first["metrics"], "data_wait_s": 1.0, "forward_s": 2.0}
    one = made("r", told, state="running")
    assert one.parts == pytest.approx({"forward": 0.04, "backward": 0.08})


def test_batches_that_a_restart_did_again_are_divided_by_as_well():
    """60 were done, then the last 50; of 40 + 80 ms each, the first point of either start left
    out.
    """
    one = made("r", events(restart=True)[:-1], state="stopped")
    assert one.history.step == 100 and one.parts == pytest.approx(
        {"forward": 0.04, "backward": 0.08}
    )


def test_what_a_restart_does_again_is_kept_until_it_is_told_again():
    """As MLflow tells of a run, which takes no second value of a step."""
    told = events(restart=True)  # a start, 25, 50, its evaluation, 60, a start from 50, 75, ...

    def at(*more: dict) -> History:
        return made("r", [*told[:6], *more], state="running", redone="kept").history

    assert [(point.step, point.seconds) for point in at().curve] == [(25, 5), (50, 8), (60, 10)]
    assert (at().step, at().again_from) == (60, 50) and [each.step for each in at().restarts] == [
        50
    ]
    anew = {**told[4], "time": told[5]["time"] + 2, "attempt": 1, "metrics": {"top1": 0.75}}
    assert [(point.step, point.top1) for point in at(anew).curve][1:] == [(50, 0.4), (60, 0.75)]
    half = {**anew, "step": 55}
    assert [point.step for point in at(half).curve] == [25, 50, 55, 60] and (
        at(half).step,
        at(half).again_from,
    ) == (60, 55)
    passed = at(told[6])
    assert [point.step for point in passed.curve] == [25, 50, 60, 75] and (
        passed.step,
        passed.again_from,
    ) == (75, None)
    twice = at({**told[5], "attempt": 2})
    assert [point.step for point in twice.curve] == [25, 50, 60] and (
        twice.step,
        twice.again_from,
    ) == (60, 50)
    run = made("r", told[:6], state="running", redone="kept")
    assert provenance(Study(title="t", runs=(run,))).rows[0][5] == "60/100, done again from 50 on"
    dropped = made("r", told[:6], state="running").history
    assert [point.step for point in dropped.curve] == [25, 50] and (
        dropped.step,
        dropped.again_from,
    ) == (50, None)


def test_a_checkpoint_that_is_told_of_late_is_no_step_back():
    """Threads write them."""
    told = events()[:3]  # a start, 25, 50
    late = {"event": "checkpoint", "step": 25, "time": told[-1]["time"], "attempt": 0}
    for redone in ("kept", "dropped"):
        found = made("r", [*told, late], state="running", redone=redone)
        assert (found.history.step, found.history.again_from) == (50, None)


def test_an_evaluation_that_is_done_again_counts_as_it_was_done_last():
    """The first was of weights that were given up: saving found that the workers' differed."""
    told = events()  # a start, 25, 50, its evaluation, ...
    back = {**told[0], "time": told[3]["time"] + 1, "attempt": 1, "step": 0}
    again = {**told[3], "time": back["time"] + 5, "attempt": 1, "metrics": {"top1": 0.25}}

    def top1(*more: dict, **how: Any) -> list[float | None]:
        return [
            each.top1
            for each in made(
                "r", [*told[:4], back, *more], state="running", **how
            ).history.evaluations
        ]

    assert top1() == [] and top1(redone="kept") == [0.8]
    assert top1(again) == top1(again, redone="kept") == [0.25]


def test_nothing_yet():
    one = made("new", [], state="new")
    assert (one.rule, one.parts, one.hardware) == ("unknown rule", {}, {})
    assert (one.history.curve, one.history.evaluations, one.history.step) == ((), (), 0)


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
