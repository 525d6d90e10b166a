"""The state of a run, what a suite has left to do, and which trial a choice takes."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.launch.cluster import Cluster
from pipeline.launch.suite import SuiteRuns
from pipeline.recipe.suite import Choice, Suite, SuiteFile
from pipeline.track.run_state import best, done_entries, is_driven, state_of, top1_of
from tests.helpers.events import RawJournal
from tests.helpers.small import small_recipe


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "interrupted"),
        (["stopped"], "stopped"),
        (["failed"], "failed"),
        (["failed", "start"], "interrupted"),
        (["stopped", "start", "finish"], "finished"),
        (["finish", "start"], "interrupted"),  # prolonged, then killed
    ],
)
def test_state_without_a_driver(fake_run: Callable, events: list[str], state: str):
    run, summary_alone = fake_run(), fake_run("without_journal").folder
    (summary_alone / "summary.json").write_text("{}")
    assert (state_of(run.folder), state_of(summary_alone)) == ("new", "finished")
    with run.start() as journal:
        for kind in events:
            journal.event(kind)
            journal.event("step", step=1)  # a straggler says nothing of the state
    assert state_of(run.folder) == state


def test_a_driver_that_lives_and_one_that_was_killed(fake_run: Callable):
    run = fake_run()
    run.attempt()
    lock = run.folder / "driver.lock"
    assert not is_driven(run.folder)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX);"
        " print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        driver.stdout.readline()
        assert is_driven(run.folder) and state_of(run.folder) == "running"
        driver.kill()
    assert lock.exists()
    assert not is_driven(run.folder) and state_of(run.folder) == "interrupted"
    with lock.open() as file:  # asking leaves the lock free
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_finished_run_is_finished_while_its_driver_still_delivers(fake_run: Callable):
    run = fake_run()
    run.attempt(("finish", {}))
    with (run.folder / "driver.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert state_of(run.folder) == "finished"


def run(folder: Path, *, end: str) -> Path:
    folder.mkdir(parents=True)
    with RawJournal(folder / "journal.jsonl", attempt=0) as journal:
        journal.event("start")
        journal.event(end)
    (folder / "summary.json").write_text('{"top1": 0.75}') if end == "finish" else None
    return folder


def suite(folder: Path, **ends: str) -> SuiteRuns:
    """A suite's runs at the value that all share, a trial and a tuned run, of which those in `ends`
    have come to one.
    """
    names = ("shared", "trial", "tuned", "after")
    recipes = [
        small_recipe(name=name, init="@shared" if name == "after" else None) for name in names
    ]
    recipes[1:3] = [
        replace(each, protocol=each.name, tuned=("optimizer.lr",)) for each in recipes[1:3]
    ]
    choices = {"tuned": Choice("optimizer.lr", ("trial",))}
    made = SuiteFile(
        suite=Suite(tuple(recipes), None, choices), runs=names, parent="0" * 32, cluster={}
    )
    (folder / "suite").mkdir(parents=True)
    made.write(folder / "suite")
    for name, end in ends.items():
        run(folder / name, end=end)
    return SuiteRuns(folder / "suite", made, Cluster(inline=True))


@pytest.mark.parametrize("name", ["shared", "trial", "tuned"])
def test_what_diverged_is_over_like_what_finished_unless_others_take_its_weights(
    tmp_path: Path, name: str
) -> None:
    for end, over in (
        ("finish", True),
        ("diverged", name != "shared"),
        ("failed", False),
        ("stopped", False),
    ):
        folder = tmp_path / end
        children = suite(folder, **{name: end})
        assert done_entries(folder / "suite") == ({name: folder / name} if over else {})
        assert (name not in [recipe.name for recipe in children.remaining()]) is over
    search = suite(tmp_path / "search", trial="diverged", shared="diverged")
    assert [search.can_start(each) for each in search.suite_file.suite.recipes[2:]] == [True, False]


def test_the_first_of_the_best_is_taken_and_what_diverged_is_last(tmp_path: Path) -> None:
    runs = [run(tmp_path / end, end=end) for end in ("finish", "diverged")]
    assert [top1_of(folder) for folder in runs] == [0.75, None]
    for scores, name in (
        ({"a": 0.5, "b": 0.75, "c": 0.75}, "b"),
        ({"a": None, "b": 0.0}, "b"),
        ({"a": None, "b": None}, "a"),
    ):
        assert best(scores) == name


def test_a_damaged_choice_is_named(tmp_path: Path) -> None:
    suite(tmp_path)
    file = tmp_path / "suite" / "suite.json"
    told = json.loads(file.read_text())
    told["children"][2]["choice"] = ["trial"]
    file.write_text(json.dumps(told))
    with pytest.raises(
        ValueError, match=r"suite\.json: a choice: must be an object; got \['trial'\]"
    ):
        SuiteFile.read(tmp_path / "suite")
