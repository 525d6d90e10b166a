"""The frame of results: the same from each source, and a quantity that is declared in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pipeline
from pipeline.report import page, results
from pipeline.report.compare import compare, csv_of
from pipeline.report.results import METRICS, Metric, ReportError, Run, expanded, frame
from pipeline.report.stores import ServerStore, runs_of_store
from pipeline.report.suite import read_study
from pipeline.track.mlflow import sync
from tests.helpers.events import RawJournal, event
from tests.helpers.fake_store import FakeStore
from tests.helpers.hand_made import KEY
from tests.report.conftest import STUDY, make_all
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
    assert "sparsity" in csv_of([found]).splitlines()[0].split(",")
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
