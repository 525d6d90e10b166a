import fcntl
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.report.runs import ReportError, find_run, list_runs, print_runs


def test_a_run_is_found_by_name_beginning_and_path(make_run: Callable, runs_dir: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = make_run("fashion-sltt"), make_run("fashion-bptt")
    assert find_run(runs_dir, "fashion-sltt") == first
    assert find_run(runs_dir, "fashion-b") == second
    assert find_run(runs_dir, first) == first
    monkeypatch.chdir(runs_dir.parent)
    assert find_run("runs", "runs/fashion-sltt") == Path("runs/fashion-sltt")
    assert find_run("elsewhere", str(first)) == first


def test_an_exact_name_wins_over_a_longer_one(make_run: Callable, runs_dir: Path):
    short, _ = make_run("a"), make_run("a-2")
    assert find_run(runs_dir, "a") == short


def test_a_name_that_is_wrong_or_not_enough(make_run: Callable, runs_dir: Path):
    with pytest.raises(ReportError, match=r"no run 'x' in .*runs, which has no runs"):
        find_run(runs_dir, "x")
    make_run("fashion-sltt")
    make_run("fashion-bptt")
    with pytest.raises(ReportError, match=r"no run 'x' in .*; there are fashion-bptt, fashion-sltt"):
        find_run(runs_dir, "x")
    with pytest.raises(ReportError, match="'fashion' begins the names of 2 runs: fashion-bptt, fashion-sltt"):
        find_run(runs_dir, "fashion")
    with pytest.raises(ReportError, match="no run ''"):
        find_run(runs_dir, "")


def test_every_state_is_told_with_the_command_that_resumes(make_run: Callable, runs_dir: Path):
    make_run("done")
    make_run("asked", end="stopped")
    make_run("broken", end="failed", rule="SLTT")
    make_run("killed", end=None)
    make_run("held", end=None)
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
    assert {name for name, row in rows.items() if row.resume is None} == {"done", "held"}
    assert rows["killed"].resume == f"spiketrain resume killed --runs {runs_dir}"
    assert (rows["done"].step, rows["done"].total_steps, rows["done"].top1) == (100, 100, 0.9)
    assert (rows["killed"].step, rows["killed"].total_steps, rows["killed"].top1) == (40, 100, 0.5)
    assert (rows["broken"].rule, rows["broken"].study) == ("SLTT", "01234567")
    assert (rows["prepared"].step, rows["prepared"].top1, rows["prepared"].rule) == (None, None, "-")


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
    make_run("[red]odd name", end=None)
    make_run("done")
    print_runs(runs_dir, Console(file=out, width=80))
    assert "done" in out.getvalue()
    assert "90.00%" in out.getvalue()
    assert f"spiketrain resume '[red]odd name' --runs {runs_dir}\n" in out.getvalue()  # whole, on one line
