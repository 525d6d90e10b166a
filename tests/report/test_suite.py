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

from pipeline.recipe.suite import Measurement, Suite, SuiteFile
from pipeline.report.claims import Claim, parse_result
from pipeline.report.page import publish
from pipeline.report.results import ReportError
from pipeline.report.suite import own_report, print_protocols, print_suite, read_study
from tests.helpers.small import command, small_recipe
from tests.report.conftest import STUDY, make_all
from tests.report.test_figures import SWEEP


def make_suite(runs_dir: Path, *runs: str, name: str = "suite") -> Path:
    folder = runs_dir / name
    folder.mkdir()
    recipes = tuple(replace(small_recipe(), name=f"recipe-{run}") for run in runs)
    SuiteFile(suite=Suite(recipes), runs=runs, parent="0" * 32, cluster={}).write(folder)
    return folder


def name_report(suite: Path, report: str) -> None:
    file = suite / "suite.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "report": report}))


OWN_REPORT = "recipes.compare.claims_fashion.report"
TRIAL = {
    "study": "f" * 16,
    "recipe": {
        "protocol": "trial",
        "tuned": ["optimizer.lr"],
        "optimizer": {"target": "timm.optim.create", "kwargs": {"lr": 0.3}},
    },
}
# trials finished last: a launch with --tune that was stopped during its trials
FOLDER = {
    "bptt": {},
    "sltt": {"rule": "SLTT"},
    "far-sltt": {
        "rule": "SLTT",
        "hardware": {"cpu": "another", "cores": 2, "gpu": "none"},
        "end": "finish",
    },
    "alone": {"study": "d" * 16, "rule": "SLTT"},
    "other-bptt": {"study": "e" * 16},
    "other-sltt": {"study": "e" * 16, "rule": "SLTT"},
    "trial-bptt": TRIAL,
    "trial-sltt": {"rule": "SLTT", **TRIAL},
}
LEFT_OUT = "Excluded: 1 trial on a held-out part of the training set."
NO_BASE = "no baseline, no ratios: study dddddddd has no finished run of BPTT"
FAR = 'no baseline, no ratios: bptt is not comparable: hardware.cpu: "a cpu" and "another"'


@pytest.mark.parametrize(
    ("names", "runs", "title", "page", "notes"),
    [
        ([], {"other-bptt", "other-sltt"}, "Study eeeeeeee", "study-eeeeeeee", ()),
        (["eeee"], {"other-bptt", "other-sltt"}, "Study eeeeeeee", "study-eeeeeeee", ()),
        (["sltt"], {"bptt", "sltt"}, "Study 01234567", "study-01234567", ()),
        (["alone"], {"alone"}, "Study dddddddd", "study-dddddddd", (NO_BASE,)),
        (
            ["sltt", "other-sltt", "far-sltt"],
            {"bptt", "sltt", "other-bptt", "other-sltt", "far-sltt"},
            "sltt, other-sltt, far-sltt",
            "sltt-other-sltt-far-sltt",
            (FAR,),
        ),
        (
            ["sltt", "trial-sltt"],
            {"bptt", "sltt"},
            "Study 01234567",
            "study-01234567",
            (LEFT_OUT,),
        ),
    ],
)
def test_runs_are_named_as_compare_takes_them_and_have_each_their_baseline(
    make_run: Callable,
    runs_dir: Path,
    names: list[str],
    runs: set[str],
    title: str,
    page: str,
    notes: tuple[str, ...],
):
    make_all(make_run, FOLDER)
    study, out, _ = read_study(runs_dir, names)
    assert ({run.name for run in study.runs}, study.title, study.notes) == (runs, title, notes)
    assert out == runs_dir / f"report-{page}.html"


def test_a_suite(make_run: Callable, runs_dir: Path):
    make_run("bptt")
    folder = make_suite(runs_dir, "bptt", "not-begun")
    study, out, folders = read_study(runs_dir, ["suite"])
    assert ([run.name for run in study.runs], study.title) == (["bptt"], "suite")
    assert (out, folders) == (folder / "report.html", (runs_dir / "bptt",))
    name_report(folder, OWN_REPORT)
    assert (
        "when all runs and measurements have finished: 1 of 2 have"
        in read_study(runs_dir, ["suite"])[0].notes[0]
    )
    said = "report: --against and --within must not be set, because suite has its own report"
    for about in ({"within": 2.0}, {"against": "SLTT"}):
        with pytest.raises(ReportError, match=said):
            read_study(runs_dir, ["suite"], **about)


def test_sweeps_of_a_suite_without_a_report_are_printed_and_drawn(
    make_run: Callable, runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """Once they are made; one that was refused is neither."""
    make_run("bptt")
    folder = runs_dir / "swept"
    folder.mkdir()
    recipes = (replace(small_recipe(), name="recipe-bptt"),)
    sweeps = tuple(
        Measurement(name, "sweep", ("recipe-bptt",)) for name in ("made", "refused", "missing")
    )
    suite = Suite(recipes, measurements=sweeps)
    SuiteFile(suite=suite, runs=("bptt",), parent="0" * 32, cluster={}).write(folder)
    (folder / "measured-made.json").write_text(json.dumps(SWEEP))
    (folder / "measured-refused.json").write_text(json.dumps({"refused": "no"}))
    assert read_study(runs_dir, ["swept"])[0].sweeps == (SWEEP,)
    print_suite(folder)
    said = capsys.readouterr().out
    head, bptt, sltt = said[said.index("saved bytes, 8 samples on one worker") :].splitlines()[1:4]
    assert head.split() == ["rule", "T", "=", "1", "T", "=", "4"]
    assert bptt.split() == ["BPTT", "0.001", "MB", "0.004", "MB"]
    assert sltt.split() == ["SLTT", "0.001", "MB", "0.001", "MB"]
    assert "time of forward and backward, 8 samples on one worker" in said and "750 ms" in said


def test_a_suite_without_a_report_as_json_and_csv(
    make_run: Callable, runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """Its runs as if they were named by their study, what is missing beside them; trials are no
    runs to compare.
    """
    folder = make_suite(runs_dir, "bptt", "sltt", "trial", "failed", "not-begun")

    def told(format: Any) -> tuple[Any, str]:
        print_suite(folder, format=format)
        said = capsys.readouterr()
        rows = csv.DictReader(io.StringIO(said.out))
        return json.loads(said.out) if format == "json" else list(rows), said.err

    assert told("json")[0] == []
    runs = {"bptt": {}, "sltt": {"rule": "SLTT", "wall_s": 100.0}, "trial": TRIAL}
    make_all(make_run, {**runs, "failed": {"study": "e" * 16, "end": "failed"}})
    [found], said = told("json")
    ratios = {run["run"]: run["ratios"]["wall_s"] for run in found["runs"]}
    assert ratios == {"bptt": 1.0, "sltt": 0.5}
    assert "not finished: recipe-failed (failed) is failed\n" in said
    assert "3 of 5 finished; spiketrain resume" in said
    rows, said = told("csv")
    assert [row["run"] for row in rows] == ["bptt", "sltt"]
    assert "not finished: recipe-not-begun (not-begun) has not begun\n" in said
    make_run("not-begun", rule="OTTT", end="diverged")
    [found], said = told("json")
    assert [each["run"] for each in found["unfinished"]] == ["not-begun"]
    assert "4 of 5 finished" in said


def test_a_suites_study_of_which_all_diverged_is_named_and_the_others_have_their_tables(
    make_run: Callable, runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    make_all(make_run, {"bptt": {}, "lost": {"study": "e" * 16, "end": "diverged"}})
    print_suite(make_suite(runs_dir, "bptt", "lost"))
    said = capsys.readouterr().out
    last = "\nlost diverged, and so did all other ended runs of its study\n"
    assert "BPTT" in said and said.endswith(last)


@pytest.mark.parametrize(
    ("name", "said"),
    [("f" * 16, "got 2 trials"), ("suite", "got 1 trial"), ("empty", "got 0 trial")],
)
def test_trials_are_no_seeds(make_run: Callable, runs_dir: Path, name: str, said: str):
    make_all(make_run, FOLDER)
    make_suite(runs_dir, "trial-sltt", "not-begun")
    make_suite(runs_dir, "not-begun", name="empty")
    refusal = f"{name} must have a run that was trained on the whole training set; {said}"
    with pytest.raises(ReportError, match=refusal):
        read_study(runs_dir, [name])


CLAIMED = {
    "about": "SLTT",
    "claim": "bytes",
    "published": "0.3",
    "bound": "<= 0.2",
    "ours": "0.25",
    "holds": False,
}


def test_a_claim_of_a_suite_may_say_that_it_is_within_the_noise():
    told = parse_result({"claims": [CLAIMED, {**CLAIMED, "within_noise": True}]}, "a-suite")
    assert [claim.verdict for claim in told.claims] == ["does not hold", "fails, within the noise"]
    less = {name: value for name, value in CLAIMED.items() if name != "ours"}
    said = "about, claim, published, bound, ours, holds; it lacks ours"
    with pytest.raises(ReportError, match=said):
        parse_result({"claims": [less]}, "a-suite")


def test_what_a_suites_report_prints_and_returns(
    make_run: Callable,
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    make_run("bptt")
    folder = make_suite(runs_dir, "bptt")
    name_report(folder, OWN_REPORT)
    claim: dict[str, object] = {**CLAIMED}

    def report(runs: dict[str, Path], console: Console) -> dict:
        console.print(f"of {', '.join(runs)}")
        return {"claims": [claim], "sweeps": {"a": SWEEP}}

    monkeypatch.setattr("pipeline.recipe.suite._check_report", lambda _: None)
    suite = Suite((small_recipe(),), report)
    file = SuiteFile(suite=suite, runs=("bptt",), parent="0" * 32, cluster={})
    monkeypatch.setattr(SuiteFile, "read", lambda folder, **_: file)
    study = read_study(runs_dir, ["suite"]).study
    assert (study.printed, study.sweeps, study.notes) == ("of recipe-bptt\n", (SWEEP,), ())
    assert study.claims == (Claim(**CLAIMED),)
    claim["ours"] = math.nan
    print_suite(folder, format="json")
    assert json.loads(capsys.readouterr().out)["claims"][0]["ours"] is None
    claim["ours"] = folder
    said = r"the report of suite must return JSON values; .*Path is not JSON"
    with pytest.raises(ReportError, match=said):
        print_suite(folder, format="json")
    # runs are told, for which there are baselines
    print_suite(folder, format="csv", against="SLTT")
    assert capsys.readouterr().out.startswith("run,rule,seed,study,where,")


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
    claims = (Claim(**{**CLAIMED, "holds": np.bool_(True)}),)
    said = r"^report: the own report of .* must return JSON values; .*bool.* is not JSON"
    with pytest.raises(ReportError, match=said):
        publish(found._replace(study=replace(found.study, claims=claims)), runs_dir / "page.html")


def test_a_sweep(make_run: Callable, runs_dir: Path, tmp_path: Path):
    make_run("bptt")
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(SWEEP))
    assert read_study(runs_dir, sweeps=[path])[0].sweeps == (SWEEP,)
    path.write_text(json.dumps({**SWEEP, "points": [{"time_steps": 1, "cost": {}}]}))
    said = r"sweep\.json must be the output of sweep --format json; got KeyError\('peak_saved"
    with pytest.raises(ValueError, match=said):
        read_study(runs_dir, sweeps=[path])


def test_on_the_command_line(
    make_run: Callable,
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    def report(*words: str) -> tuple[int, str, str]:
        return command(monkeypatch, capsys)("report", *words, "--runs", str(runs_dir))

    make_run("bptt", top1=0.91, peak_saved_bytes=8_000_000)
    code, out, said = report()
    assert said.endswith("no artifact in MLflow: these runs belong to no suite\n")
    assert code == 0 and Path(out.strip()).read_text().startswith("<!doctype html>")
    elsewhere = str(runs_dir / "x.html")
    assert report(STUDY, "--out", elsewhere)[:2] == (0, f"{elsewhere}\n")
    point = SWEEP["points"][0]
    lost = {**SWEEP, "points": [{**point, "cost": {**point["cost"], "loading_s": math.nan}}]}
    (runs_dir / "sweep.json").write_text(json.dumps(lost))
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "pipeline.report.page.log_report", lambda *_, **logged: [sent.append(logged)]
    )
    make_run("sltt", rule="SLTT", top1=0.9, peak_saved_bytes=2_000_000)
    assert report("--sweep", str(runs_dir / "sweep.json"))[0] == 0
    assert '"loading_s": null' in sent[0]["data"] and "NaN" not in sent[0]["data"]
    head, line, bptt, sltt = sent[0]["note"].splitlines()
    assert head.startswith("| rule | top-1 | saved bytes |") and set(line) == set("| -")
    assert bptt.startswith("| BPTT | 91.00% (×1.00) | 8 MB (×1.00) |")
    assert sltt.startswith("| SLTT | 90.00% (×0.99) | 2 MB (×0.25) |")
    metrics = sent[0]["metrics"]
    assert metrics["mean/peak_saved_bytes/SLTT"] == 2_000_000
    assert metrics["ratio to BPTT/peak_saved_bytes/SLTT"] == 0.25
    name_report(make_suite(runs_dir, "bptt"), "elsewhere.report")
    code, out, said = report("suite")
    assert (code, out, len(sent)) == (2, "", 1)
    assert not (runs_dir / "suite" / "report.html").exists()
    hint = "the own report of suite cannot be used; name its runs instead of the suite: "
    assert re.search(f"{hint}.*elsewhere", said)


@pytest.mark.parametrize(
    ("damage", "names", "about"),
    [
        (None, (), "must have a finished run"),
        (None, ("nothing",), "no run 'nothing'"),
        ("", ("bptt",), "summary.json"),
        ("{", ("bptt",), "summary.json"),
        ("[]", ("bptt",), "summary.json"),
    ],
)
def test_runs_that_cannot_be_read_end_in_a_sentence(
    make_run: Callable,
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    damage: str | None,
    names: tuple[str, ...],
    about: str,
):
    if damage is not None:
        (make_run("bptt") / "summary.json").write_text(damage)
    code, _, said = command(monkeypatch, capsys)("report", *names, "--runs", str(runs_dir))
    assert code == 2 and len(said.splitlines()) == 1 and about in said


TRIALS, TUNED = "e" * 16, "f" * 16


def told(runs: list[Path]) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=140)
    value = print_protocols({run.name: run for run in runs}, console)
    return value, console.file.getvalue()  # type: ignore[attr-defined]


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
    assert taken == ["plain-0.3", "looked-at-0.1", "other-0.1"] and said.count("chosen") == 3


def test_what_diverged_is_named_and_keeps_no_other_table_from_being_printed(make_run: Callable):
    diverged = {"rule": "SLTT-1", "end": "diverged"}
    tuned = {"study": TUNED, "recipe": searched(0.1, "tuned")}
    runs = make_all(
        make_run,
        {
            "bptt": {"end": "diverged"},
            "sltt": diverged,
            "bptt-0.1": {"study": TRIALS, "recipe": searched(0.1)},
            "bptt-0.3": {"study": TRIALS, "recipe": searched(0.3), "end": "diverged"},
            "bptt-tuned": tuned,
            "sltt-tuned": {**tuned, **diverged, "recipe": searched(0.3, "tuned")},
        },
    )
    found, said = told(runs)
    assert "shared: only the rule differs\nbptt (BPTT) diverged\nsltt (SLTT-1) diverged\n" in said
    assert re.search(r"SLTT-1 +diverged +- +-", said)
    names = {
        protocol: [[run["run"] for run in each[part]] for part in ("runs", "unfinished")]
        for protocol in ("shared", "tuned")
        for each in found[protocol]
    }
    assert names == {"shared": [[], ["bptt", "sltt"]], "tuned": [["bptt-tuned"], ["sltt-tuned"]]}
    assert [trial["top1"] for trial in found["trials"]] == [0.9, None]
