import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.recipe.suite import Suite, SuiteFile
from pipeline.report.claims import Claim, returned
from pipeline.report.page import publish
from pipeline.report.results import ReportError
from pipeline.report.suite import own_report, print_protocols, print_suite, read_study
from tests.helpers.small import command, small_recipe
from tests.report.conftest import STUDY, make_all
from tests.report.test_figures import SWEEP


def make_suite(runs_dir: Path, *runs: str, told: object = None) -> Path:
    folder = runs_dir / "suite"
    folder.mkdir()
    recipes = tuple(replace(small_recipe(), name=f"recipe-{run}") for run in runs)
    SuiteFile(suite=Suite(recipes), runs=runs, parent="0" * 32, cluster={}).write(folder)
    return folder


def test_as_compare_takes_them(make_run: Callable, runs_dir: Path):
    make_all(
        make_run,
        {"bptt": {}, "sltt": {"rule": "SLTT"}, "other": {"study": "f" * 16, "rule": "SLTT"}},
    )
    study, out, _ = read_study(runs_dir, [STUDY[:6]])
    assert [run.name for run in study.runs] == ["bptt", "sltt"]
    assert (study.title, out) == (f"Study {STUDY[:8]}", runs_dir / f"report-study-{STUDY[:8]}.html")
    assert {run.name for run in read_study(runs_dir, ["sltt"])[0].runs} == {
        "bptt",
        "sltt",
    }  # with its baseline
    assert read_study(runs_dir, ["other"])[0].groups[0].has_baseline is False
    assert len(read_study(runs_dir, ["sltt", "other"])[0].groups) == 2


def test_named_runs_of_several_studies_have_each_their_baseline_or_a_note_that_says_why_not(
    make_run: Callable, runs_dir: Path
):
    for name, rule, about in (
        ("bptt", "BPTT", {}),
        ("sltt", "SLTT", {}),
        ("other-bptt", "BPTT", {"study": "e" * 16}),
        ("other-sltt", "SLTT", {"study": "e" * 16}),
        ("far-sltt", "SLTT", {"hardware": {"cpu": "another", "cores": 2, "gpu": "none"}}),
    ):
        make_run(name, rule=rule, **about)
    study = read_study(runs_dir, ["sltt", "other-sltt", "far-sltt"]).study
    assert {run.name for run in study.runs} == {
        "bptt",
        "sltt",
        "other-bptt",
        "other-sltt",
        "far-sltt",
    }
    [note] = study.notes
    assert note.startswith("no baseline, no ratios: bptt does not stand comparison: hardware.cpu")


def test_a_suite(make_run: Callable, runs_dir: Path):
    make_run("bptt")
    folder = make_suite(runs_dir, "bptt", "not-begun")
    study, out, folders = read_study(runs_dir, ["suite"])
    assert folders == (runs_dir / "bptt",)
    assert ([run.name for run in study.runs], study.title, out) == (
        ["bptt"],
        "suite",
        folder / "report.html",
    )
    value = json.loads((folder / "suite.json").read_text())
    (folder / "suite.json").write_text(
        json.dumps({**value, "report": "recipes.compare.claims_fashion.report"})
    )
    assert "waits for all runs: 1 of 2 have finished" in read_study(runs_dir, ["suite"])[0].notes[0]
    for about in ({"within": 2.0}, {"against": "SLTT"}):
        with pytest.raises(
            ReportError,
            match="report: suite has a report of its own, so --against and --within have no effect",
        ):
            read_study(runs_dir, ["suite"], **about)


def test_a_suite_without_a_report_as_json_and_csv(
    make_run: Callable, runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """Its runs as if they were named by their study, what is missing beside them; trials are no
    runs to compare.
    """
    folder = make_suite(runs_dir, "bptt", "sltt", "trial", "failed", "not-begun")
    print_suite(folder, format="json")
    assert json.loads(capsys.readouterr().out) == []
    make_all(
        make_run,
        {
            "bptt": {},
            "sltt": {"rule": "SLTT", "wall_s": 100.0},
            "trial": {
                "study": "f" * 16,
                "recipe": {"protocol": "trial", "tuned": ["optimizer.lr"]},
            },
            "failed": {"study": "e" * 16, "end": "failed"},
        },
    )
    print_suite(folder, format="json")
    said = capsys.readouterr()
    [told] = json.loads(said.out)
    assert [(run["run"], run["ratios"]["wall_s"]) for run in told["runs"]] == [
        ("bptt", 1.0),
        ("sltt", 0.5),
    ]
    assert (
        "not finished: recipe-failed (failed) is failed\n" in said.err
        and "3 of 5 finished; spiketrain resume" in said.err
    )
    print_suite(folder, format="csv")
    said = capsys.readouterr()
    assert [row["run"] for row in csv.DictReader(io.StringIO(said.out))] == ["bptt", "sltt"]
    assert "not finished: recipe-not-begun (not-begun) has not begun\n" in said.err
    make_run("not-begun", rule="OTTT", end="diverged")
    print_suite(folder, format="json")
    said = capsys.readouterr()
    assert [each["run"] for each in json.loads(said.out)[0]["unfinished"]] == [
        "not-begun"
    ] and "4 of 5 finished" in said.err


def test_a_suites_study_of_which_all_diverged_is_named_and_the_others_have_their_tables(
    make_run: Callable, runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    folder = make_suite(runs_dir, "bptt", "lost")
    make_all(make_run, {"bptt": {}, "lost": {"study": "e" * 16, "end": "diverged"}})
    print_suite(folder)
    said = capsys.readouterr().out
    assert "BPTT" in said and said.endswith(
        "\nlost diverged, and so did all other ended runs of its study\n"
    )


def test_trials_are_no_seeds(make_run: Callable, runs_dir: Path):
    """Three learning rates of each rule on nine tenths of the training set: a launch with --tune,
    stopped during its trials.
    """
    make_all(make_run, {"bptt": {}, "sltt": {"rule": "SLTT"}})
    for rule in ("BPTT", "SLTT"):
        for rate in (0.03, 0.1, 0.3):
            optimizer = {"target": "timm.optim.create", "kwargs": {"lr": rate}}
            about = {"protocol": "trial", "tuned": ["optimizer.lr"], "optimizer": optimizer}
            make_run(f"{rule}-{rate}", rule=rule, study="f" * 16, top1=rate, recipe=about)
    study, out, _ = read_study(runs_dir)
    assert ([run.name for run in study.runs], out.name) == (
        ["bptt", "sltt"],
        f"report-study-{STUDY[:8]}.html",
    )
    mixed = read_study(runs_dir, ["sltt", "SLTT-0.1"]).study
    assert [run.name for run in mixed.runs] == ["bptt", "sltt"]
    assert mixed.notes == ("Left out: 1 trial on a held-out part of the training set.",)
    with pytest.raises(
        ReportError,
        match="must have a run that was trained on the whole training set; there are 6 trials",
    ):
        read_study(runs_dir, ["f" * 16])
    make_suite(runs_dir, "SLTT-0.1", "not-begun")
    with pytest.raises(
        ReportError,
        match="suite must have a run that was trained on the whole training set; there are 1 trial",
    ):
        read_study(runs_dir, ["suite"])


CLAIMED = {
    "about": "SLTT",
    "claim": "bytes",
    "published": "0.3",
    "bound": "<= 0.2",
    "ours": "0.25",
    "holds": False,
}


def test_a_claim_of_a_suite_may_say_that_it_is_within_the_noise():
    told = returned({"claims": [CLAIMED, {**CLAIMED, "within_noise": True}]}, "a-suite")
    assert [claim.verdict for claim in told.claims] == ["does not hold", "fails, within the noise"]
    with pytest.raises(
        ReportError, match="about, claim, published, bound, ours, holds; there is no ours"
    ):
        returned(
            {"claims": [{name: value for name, value in CLAIMED.items() if name != "ours"}]},
            "a-suite",
        )


def test_what_a_suites_report_prints_and_returns(
    make_run: Callable,
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    make_run("bptt")
    folder = make_suite(runs_dir, "bptt")
    value = json.loads((folder / "suite.json").read_text())
    (folder / "suite.json").write_text(
        json.dumps({**value, "report": "recipes.compare.claims_fashion.report"})
    )
    claim: dict[str, object] = {**CLAIMED}

    def report(runs: dict[str, Path], console: Console) -> dict:
        console.print(f"of {', '.join(runs)}")
        return {"claims": [claim], "sweeps": {"a": SWEEP}}

    def read(folder: Path, **_: object) -> SuiteFile:
        return SuiteFile(
            suite=Suite((small_recipe(),), report), runs=("bptt",), parent="0" * 32, cluster={}
        )

    monkeypatch.setattr(SuiteFile, "read", read)
    monkeypatch.setattr("pipeline.recipe.suite._check_report", lambda _: None)
    study = read_study(runs_dir, ["suite"]).study
    assert (study.printed, study.claims[0].holds, study.sweeps, study.notes) == (
        "of recipe-bptt\n",
        False,
        (SWEEP,),
        (),
    )
    claim["ours"] = math.nan
    print_suite(folder, format="json")
    assert json.loads(capsys.readouterr().out)["claims"][0]["ours"] is None
    claim["ours"] = folder
    with pytest.raises(
        ReportError, match=r"the report of suite must return JSON values; .*Path is not JSON"
    ):
        print_suite(folder, format="json")
    print_suite(
        folder, format="csv", against="SLTT"
    )  # runs are told, for which there are baselines
    assert capsys.readouterr().out.startswith("run,rule,seed,study,where,")
    monkeypatch.setattr(
        SuiteFile, "read", lambda *_, **__: (_ for _ in ()).throw(ValueError("no data here"))
    )
    with pytest.raises(
        ReportError,
        match=(
            "what suite reports by itself cannot be made; its runs can be named instead: no data"
            " here"
        ),
    ):
        read_study(runs_dir, ["suite"])


def test_a_report_that_ends_in_an_error_of_its_own_is_a_sentence():
    """Not the traceback of a run's last hour: what it was, and where."""

    def report(runs: dict[str, Path], console: Console) -> None:
        runs["sltt"]

    line = report.__code__.co_firstlineno + 1
    said = f"the report of mine failed in test_suite.py, line {line}: KeyError: 'sltt'"
    with pytest.raises(ReportError, match=re.escape(said)):
        own_report("mine", report, {}, Console())


def test_what_a_report_returned_that_json_cannot_tell_ends_in_a_sentence(
    make_run: Callable, runs_dir: Path
):
    """As a comparison of numpy's does: the page is there, and MLflow takes none of it."""
    make_run("bptt")
    found = read_study(runs_dir)
    claim = Claim(about="BPTT", claim="fast", published="", bound="", ours="", holds=np.bool_(True))
    with pytest.raises(
        ReportError,
        match=r"^report: what .* reports by itself must be JSON values; .*bool.* is not JSON",
    ):
        publish(found._replace(study=replace(found.study, claims=(claim,))), runs_dir / "page.html")


def test_a_sweep(make_run: Callable, runs_dir: Path, tmp_path: Path):
    make_run("bptt")
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(SWEEP))
    assert read_study(runs_dir, sweeps=[path])[0].sweeps == (SWEEP,)
    path.write_text(json.dumps({**SWEEP, "points": [{"time_steps": 1, "cost": {}}]}))
    with pytest.raises(
        ValueError,
        match=r"sweep\.json must hold what sweep --format json prints; KeyError\('peak_saved",
    ):
        read_study(runs_dir, sweeps=[path])


def test_on_the_command_line(
    make_run: Callable,
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    spiketrain = command(monkeypatch, capsys)
    make_run("bptt")
    code, out, said = spiketrain("report", "--runs", str(runs_dir))
    assert said.endswith("no artifact in MLflow: these runs were launched by themselves\n")
    assert code == 0 and Path(out.strip()).read_text().startswith("<!doctype html>")
    code, out, _ = spiketrain(
        "report", STUDY, "--runs", str(runs_dir), "--out", str(runs_dir / "x.html")
    )
    assert (code, out.strip()) == (0, str(runs_dir / "x.html"))
    point = SWEEP["points"][0]
    lost = {**SWEEP, "points": [{**point, "cost": {**point["cost"], "loading_s": math.nan}}]}
    (runs_dir / "sweep.json").write_text(json.dumps(lost))
    sent: list[str] = []
    monkeypatch.setattr(
        "pipeline.report.page.log_report", lambda *_, data, **__: [sent.append(data)]
    )
    assert (
        spiketrain("report", "--runs", str(runs_dir), "--sweep", str(runs_dir / "sweep.json"))[0]
        == 0
    )
    assert '"loading_s": null' in sent[0] and "NaN" not in sent[0]
    make_suite(runs_dir, "bptt")
    file = runs_dir / "suite" / "suite.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "report": "elsewhere.report"}))
    code, out, said = spiketrain("report", "suite", "--runs", str(runs_dir))
    assert (code, out, len(sent)) == (2, "", 1) and not (
        runs_dir / "suite" / "report.html"
    ).exists()
    assert (
        "what suite reports by itself cannot be made; its runs can be named instead: " in said
        and "elsewhere" in said
    )


@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_stores_that_cannot_be_read_end_in_a_sentence(
    make_run: Callable,
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    damage: str,
):
    spiketrain = command(monkeypatch, capsys)
    assert spiketrain("report", "--runs", str(runs_dir))[0] == 2
    assert spiketrain("report", "nothing", "--runs", str(runs_dir))[0] == 2
    (make_run("bptt") / "summary.json").write_text(damage)
    code, _, said = spiketrain("report", "bptt", "--runs", str(runs_dir))
    assert code == 2 and len(said.splitlines()) == 1 and "summary.json" in said


TRIALS, TUNED = "e" * 16, "f" * 16


def told(runs: list[Path]) -> tuple[dict[str, Any], str]:
    out = io.StringIO()
    return (
        print_protocols({run.name: run for run in runs}, Console(file=out, width=140)),
        out.getvalue(),
    )


def searched(rate: float, protocol: str = "trial", **more: Any) -> dict[str, Any]:
    optimizer = {"target": "timm.optim.create", "kwargs": {"opt": "sgd", "lr": rate}}
    return {"protocol": protocol, "tuned": ["optimizer.lr"], "optimizer": optimizer, **more}


def test_each_search_has_a_value_of_its_own_that_was_taken(make_run: Callable):
    """Two recipes of one rule that differ in what no study is told apart by."""
    trials = [
        make_run(f"{name}-{rate}", study=TRIALS, top1=top1, recipe=searched(rate, **about))
        for name, about in (
            ("plain", {}),
            ("looked-at", {"evaluation": {"fidelity_every": 1}}),
            ("other", {"family": "other"}),
        )
        for rate, top1 in {0.1: {"plain": 0.7}.get(name, 0.9), 0.3: 0.8}.items()
    ]
    found, said = told(trials)
    taken = [trial["run"] for trial in found["trials"] if trial["taken"]]
    assert taken == ["plain-0.3", "looked-at-0.1", "other-0.1"] and said.count("taken") == 3


def test_what_diverged_is_named_and_keeps_no_other_table_from_being_printed(make_run: Callable):
    runs = [
        make_run("bptt", end="diverged"),
        make_run("sltt", rule="SLTT-1", end="diverged"),
        make_run("bptt-0.1", study=TRIALS, recipe=searched(0.1)),
        make_run("bptt-0.3", study=TRIALS, recipe=searched(0.3), end="diverged"),
        make_run("bptt-tuned", study=TUNED, recipe=searched(0.1, "tuned")),
        make_run(
            "sltt-tuned", study=TUNED, rule="SLTT-1", recipe=searched(0.3, "tuned"), end="diverged"
        ),
    ]
    found, said = told(runs)
    assert "shared: only the rule differs\nbptt (BPTT) diverged\nsltt (SLTT-1) diverged\n" in said
    [shared] = found["shared"]
    assert [(run["run"], run["state"]) for run in shared["unfinished"]] == [
        ("bptt", "diverged"),
        ("sltt", "diverged"),
    ]
    [tuned] = found["tuned"]
    assert [run["run"] for run in tuned["runs"]] == ["bptt-tuned"] and tuned["unfinished"][0][
        "run"
    ] == "sltt-tuned"
    assert re.search(r"SLTT-1 +diverged +- +-", said)
    assert [trial["top1"] for trial in found["trials"]] == [0.9, None]
