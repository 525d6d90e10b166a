import fcntl
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from pipeline.core.printing import NO_WIDTH
from pipeline.report.results import ReportError
from pipeline.report.selection import find_run, list_runs, print_runs
from tests.helpers.small import command
from tests.report.conftest import STUDY, make_all


def test_a_run_is_found_by_name_beginning_and_path(
    make_run: Callable, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = make_run("fashion-sltt"), make_run("fashion-bptt")
    assert (find_run(runs_dir, "fashion-b"), find_run(runs_dir, first)) == (second, first)
    monkeypatch.chdir(runs_dir.parent)
    assert find_run("runs", "runs/fashion-sltt") == find_run("runs", "fashion-s") == first
    assert find_run("elsewhere", str(first)) == first
    make_run("fashion-sltt-2")
    assert find_run(first.parent, "fashion-sltt") == first  # an exact name wins over a longer one


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

    def sync(folder: Path, *, uri: str) -> Mock:
        stores.append(uri)
        return Mock(delivered=1, translation=Mock(already_there=0))

    def register(folder: Path, checkpoint: Path, *, name: str, alias: str, uri: str) -> str:
        stores.append(uri)
        return "1"

    monkeypatch.setattr("pipeline.track.mlflow.sync", sync)
    monkeypatch.setattr("pipeline.track.mlflow.register", register)
    monkeypatch.setattr(
        "pipeline.train.checkpoint.verified_checkpoint", lambda place, which: place.folder
    )
    monkeypatch.setattr("pipeline.train.checkpoint.pin", lambda checkpoint: None)
    for words in (("sync", str(sltt)), ("register", str(sltt), "--as", "model")):
        assert spiketrain(*words)[0] == 0
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


@pytest.mark.parametrize(
    ("names", "text", "said"),
    [
        ((), "x", r"no run 'x' in .*runs; there are none"),
        (("f-sltt", "f-bptt"), "x", r"no run 'x' in .*; there are f-bptt, f-sltt"),
        (("f-sltt", "f-bptt"), "f", "'f' begins the names of 2 runs: f-bptt, f-sltt"),
        (("f-sltt", "f-bptt"), "", "no run ''"),
    ],
)
def test_a_name_that_is_wrong_or_not_enough(
    make_run: Callable, runs_dir: Path, names: tuple[str, ...], text: str, said: str
):
    make_all(make_run, {name: {} for name in names})
    with pytest.raises(ReportError, match=said):
        find_run(runs_dir, text)


def printed(runs_dir: Path) -> list[str]:
    out = io.StringIO()
    print_runs(runs_dir, Console(file=out, width=NO_WIDTH))
    return out.getvalue().splitlines()


def test_every_state_is_told_with_the_command_that_resumes(make_run: Callable, runs_dir: Path):
    assert printed(runs_dir) == [f"no runs in {runs_dir}", "next    spiketrain new mine"]
    make_all(
        make_run,
        {
            "done": {},
            "damaged": {},
            "asked": {"end": "stopped"},
            "broken": {"end": "failed", "rule": "SLTT"},
            "[red]odd name": {"end": None},
            "held": {"end": None},
        },
    )
    (runs_dir / "damaged" / "summary.json").write_text("{")
    (runs_dir / "prepared").mkdir()
    (runs_dir / "prepared" / "recipe.json").write_text("{}")
    (runs_dir / "no_run").mkdir()
    (runs_dir / "mlflow.db").touch()
    with (runs_dir / "held" / "driver.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = printed(runs_dir)
    rows = {tuple(re.split(" {2,}", line)) for line in lines}
    assert {row for row in rows if len(row) > 1} == {
        ("run", "state", "rule", "study", "step", "top-1"),
        ("done", "finished", "BPTT", STUDY[:8], "100/100", "90.00%"),
        ("damaged", "finished", "BPTT", STUDY[:8], "40/100", "-"),
        ("asked", "stopped", "BPTT", STUDY[:8], "40/100", "50.00%"),
        ("broken", "failed", "SLTT", STUDY[:8], "40/100", "50.00%"),
        ("[red]odd name", "interrupted", "BPTT", STUDY[:8], "40/100", "50.00%"),
        ("held", "running", "BPTT", STUDY[:8], "40/100", "50.00%"),
        ("prepared", "new", "-", "-", "-", "-"),
    }
    resumed = ("asked", "broken", "'[red]odd name'", "prepared")
    commands = {f"spiketrain resume {name} --runs {runs_dir}" for name in resumed}
    assert {line for (line, *more) in rows if not more} == commands


def test_the_run_started_last_comes_first(make_run: Callable, runs_dir: Path):
    for name in ("b", "c", "a"):
        make_run(name)
    assert [row.name for row in list_runs(runs_dir)] == ["a", "c", "b"]
