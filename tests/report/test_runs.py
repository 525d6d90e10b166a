import fcntl
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.report.results import ReportError
from pipeline.report.selection import find_run, how_to_go_on, list_runs, newest_top1, print_runs
from pipeline.track.mlflow import SyncReport
from tests.helpers.small import command
from tests.report.conftest import STUDY, make_all


def test_a_run_is_found_by_name_beginning_and_path(
    make_run: Callable, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = make_run("fashion-sltt"), make_run("fashion-bptt")
    assert find_run(runs_dir, "fashion-sltt") == first
    assert (find_run(runs_dir, "fashion-b"), find_run(runs_dir, first)) == (second, first)
    monkeypatch.chdir(runs_dir.parent)
    assert find_run("runs", "runs/fashion-sltt") == find_run("runs", "fashion-s") == first
    assert find_run("elsewhere", str(first)) == first


def test_a_run_is_of_the_folder_that_its_path_or_its_link_lies_in(
    make_run: Callable, runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make_run("a")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "b").symlink_to(run)
    assert find_run(tmp_path / "linked", "b") == tmp_path / "linked" / "b"
    monkeypatch.chdir(run)
    assert find_run("elsewhere", ".") == run
    (run / "checkpoints").mkdir()
    monkeypatch.chdir("checkpoints")
    assert find_run("elsewhere", "..") == run and find_run("elsewhere", "../../a") == run


def test_store_and_baseline_of_a_run_are_beside_it_wherever_one_stands(
    make_run: Callable,
    runs_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    make_run("bptt", wall_s=200.0)
    sltt = make_run("sltt", rule="SLTT", wall_s=100.0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    spiketrain = command(monkeypatch, capsys)
    stores: list[str] = []

    def sync(folder: Path, *, uri: str) -> SyncReport:
        stores.append(uri)
        return SyncReport(delivered=1, already_there=0)

    def register(folder: Path, checkpoint: Path, *, name: str, alias: str, uri: str) -> str:
        stores.append(uri)
        return "1"

    monkeypatch.setattr("pipeline.track.mlflow.sync", sync)
    monkeypatch.setattr("pipeline.track.mlflow.register", register)
    monkeypatch.setattr("pipeline.train.checkpoint.verified", lambda place, which: place.folder)
    monkeypatch.setattr("pipeline.train.checkpoint.pin", lambda checkpoint: None)
    assert (
        spiketrain("sync", str(sltt))[0]
        == spiketrain("register", str(sltt), "--as", "model")[0]
        == 0
    )
    assert stores == [f"sqlite:///{runs_dir}/mlflow.db"] * 2

    for words in ("resume", "compare"):
        code, said, error = spiketrain(words, str(sltt))
        assert code == 0 and "BPTT" in said and "×0.50" in said, error
    pages: list[tuple[set[str], Path]] = []

    def write(study: Any, place: Path) -> Path:
        pages.append(({run.name for run in study.runs}, place.parent))
        return place

    monkeypatch.setattr("pipeline.report.page.write", write)
    assert spiketrain("report", str(sltt))[0] == 0
    assert pages == [({"bptt", "sltt"}, runs_dir)]
    assert list(Path.cwd().iterdir()) == []


def test_an_exact_name_wins_over_a_longer_one(make_run: Callable, runs_dir: Path):
    short, _ = make_run("a"), make_run("a-2")
    assert find_run(runs_dir, "a") == short


def test_a_name_that_is_wrong_or_not_enough(make_run: Callable, runs_dir: Path):
    with pytest.raises(ReportError, match=r"no run 'x' in .*runs, which has no runs"):
        find_run(runs_dir, "x")
    make_all(make_run, {"fashion-sltt": {}, "fashion-bptt": {}})
    with pytest.raises(
        ReportError, match=r"no run 'x' in .*; there are fashion-bptt, fashion-sltt"
    ):
        find_run(runs_dir, "x")
    with pytest.raises(
        ReportError, match="'fashion' begins the names of 2 runs: fashion-bptt, fashion-sltt"
    ):
        find_run(runs_dir, "fashion")
    with pytest.raises(ReportError, match="no run ''"):
        find_run(runs_dir, "")


def test_every_state_is_told_with_the_command_that_resumes(make_run: Callable, runs_dir: Path):
    make_all(
        make_run,
        {
            "done": {},
            "asked": {"end": "stopped"},
            "broken": {"end": "failed", "rule": "SLTT"},
            "killed": {"end": None},
            "held": {"end": None},
        },
    )
    (runs_dir / "prepared").mkdir()
    (runs_dir / "prepared" / "recipe.json").write_text("{}")
    (runs_dir / "no_run").mkdir()
    (runs_dir / "mlflow.db").touch()
    with (runs_dir / "held" / "driver.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {row.name: row for row in list_runs(runs_dir)}
    assert {name: row.state for name, row in rows.items()} == {
        "done": "finished",
        "asked": "stopped",
        "broken": "failed",
        "killed": "interrupted",
        "held": "running",
        "prepared": "new",
    }
    assert {name for name, row in rows.items() if how_to_go_on(row) is None} == {"done", "held"}
    assert how_to_go_on(rows["killed"]) == f"spiketrain resume killed --runs {runs_dir}"
    assert (rows["done"].step, rows["done"].total_steps, newest_top1(rows["done"])) == (
        100,
        100,
        0.9,
    )
    assert (rows["killed"].step, rows["killed"].total_steps, newest_top1(rows["killed"])) == (
        40,
        100,
        0.5,
    )
    assert (rows["broken"].rule, rows["broken"].study) == ("SLTT", STUDY)
    assert (rows["prepared"].step, newest_top1(rows["prepared"]), rows["prepared"].rule) == (
        None,
        None,
        "unknown rule",
    )


def test_the_run_started_last_comes_first(make_run: Callable, runs_dir: Path):
    for name in ("b", "c", "a"):
        make_run(name)
    assert [row.name for row in list_runs(runs_dir)] == ["a", "c", "b"]


def test_a_broken_summary_does_not_hide_the_list(make_run: Callable, runs_dir: Path):
    (make_run("done") / "summary.json").write_text("{")
    (row,) = list_runs(runs_dir)
    assert row.state == "finished"


def test_the_list_in_print(make_run: Callable, runs_dir: Path):
    out = io.StringIO()
    print_runs(runs_dir, Console(file=out, width=80))
    assert "no runs in" in out.getvalue()
    make_all(make_run, {"[red]odd name": {"end": None}, "done": {}})
    print_runs(runs_dir, Console(file=out, width=80))
    assert "done" in out.getvalue()
    assert "90.00%" in out.getvalue()
    assert (
        f"spiketrain resume '[red]odd name' --runs {runs_dir}\n" in out.getvalue()
    )  # whole, on one line
