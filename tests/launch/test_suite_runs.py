"""Runs of a suite at the same time: on cores of their own, in an order that their needs allow,
saved when the suite dies.
"""

import errno
import fcntl
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from rich.console import Console

from pipeline.core.cpu_affinity import physical_cores
from pipeline.core.errors import UserError
from pipeline.data.write.images import write_fashion
from pipeline.launch import suite
from pipeline.launch.driver import Inline
from pipeline.launch.suite import count_parallel_runs, train_side_by_side
from pipeline.recipe.recipe import read_json
from pipeline.recipe.suite import runs_of
from pipeline.report.selection import list_suites
from pipeline.track.journal import first, last
from pipeline.track.mlflow_store import connect
from pipeline.track.run_state import is_driven, state_of
from pipeline.train.job import Job
from tests.helpers.small import (
    Command,
    Done,
    Refused,
    events,
    same_weights,
    small_recipe,
    steps_of,
)
from tests.helpers.waiting import until

RECIPES = """
from dataclasses import replace
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from tests.helpers.small import small_recipe

def recipe():
    one = small_recipe(name="one", epochs=EPOCHS)
    return [one, replace(one, name="after", init="@one"), replace(one, name="other", seed=1)]
"""

UNEVEN = """
from dataclasses import replace
from tests.helpers.small import small_recipe

def recipe():
    return [small_recipe(name="one", epochs=2000), small_recipe(name="other", epochs=1, seed=1)]
"""

SEARCHED = """
from pipeline.data.datasets.beton import Beton
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from tests.helpers.small import small_recipe

def recipe():
    data = spec(
        Beton, folder="FOLDER", classes=10, channels=1, size=8, crop="resized",
        mean=(0.5,), std=(0.5,),
    )
    recipe = small_recipe(
        name="searched", rule=spec(BPTT), data=data, epochs=1, stop_after=6
    )
    return recipe.override({"optimizer.lr": 1e38, "evaluation.samples": 100})
"""

cores = pytest.mark.skipif(
    len(physical_cores(os.sched_getaffinity(0))) < 2, reason="two runs side by side need two cores"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("side-by-side")
    for name, epochs in (("short", 1), ("long", 12)):
        (folder / f"{name}.py").write_text(RECIPES.replace("EPOCHS", str(epochs)))
    (folder / "uneven.py").write_text(UNEVEN)
    write_fashion(folder / "fashion")
    (folder / "searched.py").write_text(SEARCHED.replace("FOLDER", str(folder / "fashion")))
    with pytest.MonkeyPatch.context() as patch:
        store = shutil.copy(empty_store, folder / "mlflow.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
        yield folder


def words(file: Path, runs: Path, name: str, *more: str) -> list[str]:
    return [*f"launch {file} --inline --device cpu --runs {runs} --name {name}".split(), *more]


def span(run: Path) -> tuple[float, float]:
    start, finish = first(run / "journal.jsonl", "start"), last(run / "journal.jsonl", "finish")
    assert start is not None and finish is not None
    return start["time"], finish["time"]


def overlap(one: Path, other: Path) -> bool:
    (begin, end), (other_begin, other_end) = span(one), span(other)
    return begin < other_end and other_begin < end


@cores
@pytest.mark.full
def test_what_needs_nothing_runs_at_once_and_what_does_waits(
    place: Path, tmp_path: Path, done: Done
) -> None:
    said = done(*words(place / "long.py", tmp_path, "two", "--side-by-side", "2"))
    runs = runs_of(tmp_path / "two")
    assert overlap(runs["one"], runs["other"])
    assert span(runs["after"])[0] > span(runs["one"])[1]
    on = {name: set(events(run, "start")[0]["own_cores"]) for name, run in runs.items()}
    assert all(on.values()) and not on["one"] & on["other"]
    assert "one  start" in said and "other  finished" in said
    assert said.count("\nstudy ") >= 2  # the tables at the end
    done(*words(place / "long.py", tmp_path, "turn"))
    assert all(same_weights(run, runs_of(tmp_path / "turn")[name]) for name, run in runs.items())


@cores
@pytest.mark.full
def test_when_the_suite_is_killed_its_runs_are_saved_and_it_goes_on(
    place: Path, tmp_path: Path, done: Done
) -> None:
    launch = words(place / "long.py", tmp_path, "killed", "--side-by-side", "2")
    command = [sys.executable, "-m", "pipeline", *launch]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as suite:
        wait_for((tmp_path / "killed" / "suite.json").exists)
        runs = runs_of(tmp_path / "killed")
        going = (runs["one"], runs["other"])
        wait_for(lambda: all(max(steps_of(run, "step"), default=0) > 2 for run in going))
        suite.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(is_driven(run) for run in going))
    assert [state_of(run) for run in going] == ["stopped", "stopped"]
    [row] = list_suites(tmp_path)
    resume = f"resume killed --runs {tmp_path}"
    assert (row.state, row.resume) == ("0 of 3 finished", f"spiketrain {resume}")
    done(*resume.split())
    for run in going:  # each step once: nothing was lost
        assert steps_of(run, "step") == list(range(1, 12 * 8 + 1))


@cores
@pytest.mark.full
def test_a_run_that_fails_lets_the_others_end_and_says_why(
    place: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(saboteur(tmp_path / "hook", REFUSE)))
    error = refused(*words(place / "short.py", tmp_path, "bad", "--side-by-side", "2"))
    runs = runs_of(tmp_path / "bad")
    assert error == f"{runs['one'].name}: sabotage: must not be; got one"
    assert state_of(runs["other"]) == "finished" and not runs["after"].exists()
    assert "sabotage" in (runs["one"] / "launch.log").read_text()


@cores
@pytest.mark.full
def test_a_run_that_is_killed_is_marked_so_and_so_is_its_suite(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "uneven"
    launch = words(place / "uneven.py", tmp_path, "uneven", "--side-by-side", "2")
    with subprocess.Popen([sys.executable, "-m", "pipeline", *launch]) as suite:
        try:
            wait_for((folder / "suite.json").exists)
            going = runs_of(folder)["one"]
            wait_for(lambda: max(steps_of(going, "step"), default=0) > 2)
            wait_for(lambda: marked(place, folder).get("one") == "RUNNING")
            [one] = [
                each
                for each in psutil.Process(suite.pid).children()
                if any("/one-" in word for word in each.cmdline())
            ]
            one.kill()
            assert suite.wait(timeout=90) == 1
        finally:
            suite.kill()  # which its runs, too, would not survive
    assert marked(place, folder) == {"one": "KILLED", "other": "FINISHED", "uneven": "KILLED"}


def marked(place: Path, suite: Path) -> dict[str, str]:
    client = connect(f"sqlite:///{place}/mlflow.db")
    found = client.search_runs(
        [each.experiment_id for each in client.search_experiments()],
        f"tags.`spiketrain.study_parent` = '{read_json(suite / 'suite.json')['parent']}'",
    )
    return {str(run.info.run_name).split("-")[0]: run.info.status for run in found}


@cores
@pytest.mark.full
@pytest.mark.distributed
def test_a_run_that_is_stopped_alone_stops_the_suite_once_the_others_have_ended(
    place: Path, tmp_path: Path, spiketrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(saboteur(tmp_path / "hook", STOP)))
    code, said, _ = spiketrain(*words(place / "short.py", tmp_path, "alone", "--side-by-side", "2"))
    assert (code, said.splitlines()[-1]) == (
        130,
        f"stopped; resume with: spiketrain resume alone --runs {tmp_path}",
    )
    assert {name: state_of(run) for name, run in runs_of(tmp_path / "alone").items()} == {
        "one": "stopped",
        "after": "new",
        "other": "finished",
    }


def test_where_there_is_no_room_for_two_they_take_turns_on_shared_cores(
    place: Path, tmp_path: Path, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Inline, "max_parallel_runs", lambda self: 0)
    done(*words(place / "short.py", tmp_path, "turns", "--side-by-side", "auto"))
    runs = list(runs_of(tmp_path / "turns").values())
    assert not any(read_json(run / "job.json")["own_cores"] for run in runs)
    assert not any(overlap(one, other) for one, other in itertools.combinations(runs, 2))
    assert read_json(tmp_path / "turns" / "suite.json")["cluster"]["side_by_side"] == "auto"


@pytest.mark.full
def test_a_search_takes_what_did_best_though_the_shared_value_diverges(
    place: Path, tmp_path: Path, refused: Refused, done: Done
) -> None:
    rates = (0.001, 0.01, 0.1, 0.3, 1e38)
    *ended, diverged = rates
    said = done(
        *words(
            place / "searched.py",
            tmp_path,
            "s",
            "--tune",
            f"optimizer.lr={','.join(map(str, rates))}",
        )
    )
    page, runs, at = tmp_path / "s" / "report.html", runs_of(tmp_path / "s"), ("--runs", tmp_path)

    def is_an_artifact() -> bool:
        return page.read_bytes() in [
            each.read_bytes() for each in place.glob("**/artifacts/report.html")
        ]

    next_words = f"\npage    {page}\nnext    spiketrain compare s "
    assert next_words in said and is_an_artifact()
    assert said.count("chosen") == 1 and "  diverged\n" in said
    assert f"shared: only the rule differs\n{runs['searched'].name} (BPTT) diverged\n" in said
    assert "tuned: each rule with its own best value of optimizer.lr" in said
    trials = {rate: runs[f"searched-lr-{rate}"] for rate in rates}
    top1 = {rate: read_json(trials[rate] / "summary.json")["top1"] for rate in ended}
    best = max(top1, key=lambda rate: top1[rate])
    assert not (trials[diverged] / "summary.json").exists()
    assert [state_of(run) for run in (trials[diverged], runs["searched"])] == ["diverged"] * 2
    written = {name: read_json(run / "recipe.json")["recipe"] for name, run in runs.items()}
    taken = [written[name]["optimizer"]["kwargs"]["lr"] for name in ("searched-tuned", "searched")]
    assert taken == [best, diverged]
    told = json.loads(done("compare", "s", *at, "--format", "json"))
    assert [trial["value"] for trial in told["trials"] if trial["taken"]] == [best]
    assert [trial["value"] for trial in told["trials"] if trial["top1"] is None] == [diverged]
    assert len(told["tuned"]) == 1
    [shared] = told["shared"]
    assert (shared["runs"], shared["unfinished"][0]["state"]) == ([], "diverged")
    page.unlink()
    said = done("resume", "s", *at)
    assert "s has finished" in said and next_words in said
    made = page.stat()
    # A page that is there may have a sweep on it.
    assert "page" not in done("resume", "s", *at) and page.stat() == made
    assert [row.state for row in list_suites(tmp_path)] == ["7 of 7 finished"]
    assert done("report", "s", *at) == f"{page}\n" and is_an_artifact()
    text = page.read_text()
    assert "5 trials on a held-out part" in text and "<td>diverged</td>" in text
    error = refused("compare", *(run.name for run in trials.values()), "--runs", str(tmp_path))
    assert "optimizer.lr: 0.001 and 0.01" in error


def stand_ins(folder: Path, *, job: Any = None) -> Any:
    """A suite of one run, whose folder is there."""
    recipe, run = small_recipe(), folder / "run"
    run.mkdir()
    whole = Job(run=str(run), study="s", data_fingerprint="f", commit="c", recipe={})
    return SimpleNamespace(
        trust=(),
        folder=folder / "suite",
        folders={recipe.name: run},
        can_start=lambda recipe: True,
        is_over=lambda name: state_of(run) == "finished",
        remaining=lambda: [] if state_of(run) == "finished" else [recipe],
        job=job or (lambda recipe: whole),
    )


def drives_as(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """In the place of each process that would drive a run; RUN is its folder."""
    real = subprocess.Popen

    def popen(words: list[str], **how: Any) -> Any:
        return real(["sh", "-c", script.replace("RUN", words[words.index("resume") + 1])], **how)

    monkeypatch.setattr(suite.subprocess, "Popen", popen)
    monkeypatch.setattr(suite, "_POLL_S", 0.01)


def test_a_run_that_storage_does_not_let_begin_is_told_once_the_others_have_ended(
    tmp_path: Path,
) -> None:
    away = Mock(side_effect=OSError(errno.ESTALE, "Stale file handle"))
    with pytest.raises(OSError, match="Stale"):
        train_side_by_side(stand_ins(tmp_path, job=away), Inline(), 2, Console())


def test_a_run_that_the_child_of_a_killed_suite_still_saves_is_begun_once_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drives_as(
        monkeypatch,
        """test ! -e RUN/stop && echo '{"event": "finish", "step": 1}' > RUN/journal.jsonl""",
    )
    children, said = stand_ins(tmp_path), io.StringIO()
    (tmp_path / "run" / "stop").write_text("SIGUSR1")
    # Signals are of the main thread alone.
    monkeypatch.setattr(suite, "on_stop_signals", lambda hear: nullcontext())
    waiting = "waiting for another process that still trains it"
    with ThreadPoolExecutor(1) as beside:
        with (tmp_path / "run" / "driver.lock").open("w") as held_by_another:
            fcntl.flock(held_by_another, fcntl.LOCK_EX)
            finished = beside.submit(train_side_by_side, children, Inline(), 1, Console(file=said))
            wait_for(lambda: waiting in said.getvalue())
            time.sleep(0.1)
            assert (tmp_path / "run" / "stop").exists() and not finished.done()
        assert finished.result(20) is True
    assert said.getvalue().count("another process") == 1
    assert "runs over: 1 of 1\n" in said.getvalue()


def test_a_run_that_is_refused_was_not_stopped_whatever_note_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drives_as(
        monkeypatch,
        "touch RUN/stop; echo run: is being trained by another process on this machine; exit 2",
    )
    with pytest.raises(
        UserError, match=r"^run: run: is being trained by another process on this machine$"
    ):
        train_side_by_side(stand_ins(tmp_path), Inline(), 1, Console(file=io.StringIO()))


def test_more_than_there_is_room_for_is_refused() -> None:
    launcher = Inline(device="cpu")
    room = launcher.max_parallel_runs()
    crowded: Any = SimpleNamespace(
        max_parallel_runs=lambda: 0
    )  # fewer cores than one run has workers
    assert count_parallel_runs(launcher, "auto") == room
    assert count_parallel_runs(launcher, 1) == count_parallel_runs(crowded, "auto") == 1
    refused = f"--side-by-side must be at most {room}, so that each run has its own cores"
    with pytest.raises(UserError, match=f"{refused} and GPUs; got {room + 1}"):
        count_parallel_runs(launcher, room + 1)
    joined: Any = SimpleNamespace(
        max_parallel_runs=lambda: None
    )  # whose physical cores are unknown
    assert count_parallel_runs(joined, 3) == 3
    with pytest.raises(
        UserError, match=r"must be a number if the launch joins a cluster .*got auto"
    ):
        count_parallel_runs(joined, "auto")


wait_for = partial(until, within=90, pause=0.1)


REFUSE = "raise ValueError('sabotage: must not be; got one')"
STOP = "pathlib.Path(next(word for word in sys.orig_argv if '/one-' in word), 'stop').touch()"


def saboteur(folder: Path, act: str) -> Path:
    """A folder to put on the path: processes that drive the run of recipe `one` do this as they
    hand the network to its rule.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import pathlib, sys\nif '-m' in sys.orig_argv and 'pipeline' in sys.orig_argv and"
        " any('/one-' in word for word in sys.orig_argv):\n    from pipeline.rules.sltt import"
        " SLTT\n    attach = SLTT.attach\n    def sabotaged(self, *words, **more):\n       "
        f" {act}\n        return attach(self, *words, **more)\n    SLTT.attach = sabotaged\n"
    )
    return folder
