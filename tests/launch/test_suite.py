"""A suite from launch to report: stopped or killed anywhere and resumed, it ends with the bits of
one that nobody touched.
"""

import csv
import errno
import io
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from pipeline.__main__ import main
from pipeline.core.printing import NO_WIDTH
from pipeline.launch.driver import driver_lock
from pipeline.launch.suite import _sync_states
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import SuiteFile, runs_of
from pipeline.report.listing import list_suites, print_runs
from pipeline.report.suite import print_suite
from pipeline.track.connect import connect
from pipeline.track.journal import read
from pipeline.track.state import state_of
from pipeline.train.trainer import Trainer
from tests.helpers.events import RawJournal
from tests.helpers.nodes import free_port
from tests.helpers.small import Command, command, same_weights, small_recipe

RECIPES = """
from dataclasses import replace
from pipeline.train.distillation import Distillation
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from pipeline.recipe.suite import Suite
from pipeline.models.teachers.network import network_teacher
from tests.helpers.small import small_recipe

def table(runs, console):
    listed = " ".join(f"{name}:{run.name}" for name, run in runs.items())
    console.print(f"REPORT {listed}", soft_wrap=True)
    return {name: run.name for name, run in runs.items()}

def recipes():
    first = small_recipe(name="first", epochs=1)
    teacher = spec(network_teacher, weights="@first", model=first.model, time_steps=2)
    second = replace(
        first, name="second", rule=spec(BPTT), teacher=teacher, objective=spec(Distillation)
    )
    return first, second, replace(first, name="third", init="@first", seed=1)

"""
WITH_REPORT = RECIPES + "def recipe():\n    return Suite(recipes(), table)\n"
WITHOUT = RECIPES + "def recipe():\n    return list(recipes())\n"

pytestmark = pytest.mark.timeout(300)  # three runs and a new MLflow store


class Killed(BaseException):
    """Stands for a process that dies: nothing in the product catches it."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    """A folder with the recipe files, on the path, and one MLflow store for all tests: to make one
    takes seconds.
    """
    folder = tmp_path_factory.mktemp("suites")
    (folder / "lab_suite.py").write_text(WITH_REPORT)
    (folder / "lab_list.py").write_text(WITHOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        store = shutil.copy(empty_store, folder / "mlflow.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
        yield folder


@pytest.fixture
def spiketrain(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    return command(monkeypatch, capsys)


def at_step(
    patch: pytest.MonkeyPatch, recipe: str, step: int, act: Callable[[Trainer], None]
) -> None:
    """Do something in the middle of one recipe's run, as it asks for that step's samples."""
    original = Trainer._micro_batches

    def micro_batches(self: Trainer, source: Any) -> Any:
        if (self.recipe.name, self.step) == (recipe, step):
            act(self)
        return original(self, source)

    patch.setattr(Trainer, "_micro_batches", micro_batches)


def die(attempt: Trainer) -> None:
    raise Killed


def interrupt(attempt: Trainer) -> None:
    """Ctrl-C, in the process that drives; the step goes on once the driver's thread has heard
    it.
    """
    os.kill(os.getpid(), signal.SIGINT)
    deadline = time.monotonic() + 30
    while not (attempt.folder / "stop").exists():
        assert time.monotonic() < deadline, "the driver does not hear Ctrl-C"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def untouched(places: Path) -> Path:
    """The folder of a suite that ran in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            [
                "spiketrain",
                "launch",
                str(places / "lab_suite.py"),
                "--inline",
                "--runs",
                str(places / "whole"),
            ],
        )
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0
    [folder] = (places / "whole").glob("lab-suite-*")
    return folder


def test_mlflow_has_it_beneath_one_parent_and_its_checkpoints_by_address(
    untouched: Path, places: Path, spiketrain: Command
) -> None:
    client, runs = connect(f"sqlite:///{places}/mlflow.db"), runs_of(untouched)
    experiment = client.get_experiment_by_name(
        "first"
    )  # no recipe names a family: the first one's name
    assert experiment is not None
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    names = [run.name for run in runs.values()]
    parent = found[untouched.name]
    assert {found[name].data.tags["mlflow.parentRunId"] for name in names} == {parent.info.run_id}
    assert {each.info.status for each in (parent, *(found[name] for name in names))} == {"FINISHED"}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        "report.html",
        "report.json",
    }
    assert {file.path for file in client.list_artifacts(found[names[0]].info.run_id)} == {
        "recipe.json",
        "journal.jsonl",
        "summary.json",
        "activity.json",
        "answers.npz",
    }

    at = ("--runs", str(untouched.parent))
    code, said, _ = spiketrain("register", names[0], "--as", "small", "--which", "best", *at)
    checkpoint = max((runs["first"] / "checkpoints").glob("step_????????"))
    assert (code, said) == (
        0,
        f"{names[0]} -> models:/small@best, version 1: {checkpoint.as_uri()}\n",
    )
    assert client.get_model_version_by_alias("small", "best").run_id == found[names[0]].info.run_id
    code, said, _ = spiketrain("sync", untouched.name, *at)
    assert (
        code == 0
        and [line.split(" -> ")[0] for line in said.splitlines()] == names
        and said.count(": 0 points") == 3
    )


def same_bits(one: Path, other: Path) -> bool:
    return all(same_weights(run, runs_of(other)[name]) for name, run in runs_of(one).items())


def starts(run: Path) -> list[int]:
    return [event["step"] for event in read(run / "journal.jsonl") if event["event"] == "start"]


def test_a_suite_in_one_go(untouched: Path, spiketrain: Command) -> None:
    runs, suite_file = runs_of(untouched), SuiteFile.read(untouched, trust=["lab_suite"])
    stamp = f"{untouched.name.removeprefix('lab-suite-')}-{suite_file.parent[:4]}"
    assert [run.name for run in runs.values()] == [
        f"{name}-{stamp}" for name in ("first", "second", "third")
    ]
    jobs = [json.loads((run / "job.json").read_text()) for run in runs.values()]
    assert {job["parent"] for job in jobs} == {suite_file.parent} and suite_file.cluster[
        "inline"
    ] is True
    # What the references named is written down in the runs, absolute; the suite keeps the
    # references.
    weights = str(runs["first"] / "model.safetensors")
    written = {
        name: json.loads((run / "recipe.json").read_text())["recipe"] for name, run in runs.items()
    }
    assert (written["third"]["init"], written["second"]["teacher"]["kwargs"]["weights"]) == (
        weights,
        weights,
    )
    assert suite_file.suite.recipes[2].init == "@first"
    assert not same_weights(runs["first"], runs["third"])
    code, said, _ = spiketrain(
        "compare", untouched.name, "--runs", str(untouched.parent), "--trust", "lab_suite"
    )
    assert code == 0 and said.startswith("REPORT first:first-") and f"third:third-{stamp}" in said
    words = (
        "compare",
        untouched.name,
        "--runs",
        str(untouched.parent),
        "--trust",
        "lab_suite",
        "--format",
        "json",
    )
    assert json.loads(spiketrain(*words)[1]) == {name: run.name for name, run in runs.items()}
    code, said_of_runs, error = spiketrain(
        *words[:-4], "--format", "csv"
    )  # of which nothing of the suite's is imported
    assert code == 0 and {row["run"] for row in csv.DictReader(io.StringIO(said_of_runs))} == {
        run.name for run in runs.values()
    }, error
    at = f"--runs {untouched.parent}"
    assert spiketrain("resume", untouched.name, *at.split(), "--trust", "lab_suite")[
        1
    ].splitlines() == [
        f"{untouched.name} has finished",
        said.strip(),
        f"next    spiketrain compare {untouched.name} {at} --trust lab_suite",
        f"        spiketrain report {untouched.name} {at} --trust lab_suite",
        # of which nothing is of the file's own
        f"        spiketrain evaluate {runs['first'].name} {at}",
        f"        spiketrain export {runs['first'].name} {at}",
    ]


def test_a_page_that_mlflow_does_not_take_costs_the_suite_nothing(
    untouched: Path, spiketrain: Command
) -> None:
    page = untouched / "report.html"
    page.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        code, said, error = spiketrain(
            "resume", untouched.name, *(("--runs", str(untouched.parent), "--trust", "lab_suite"))
        )
    assert (
        code == 0
        and said.splitlines()[1].startswith("REPORT ")
        and f"\npage    {page}\nnext    " in said
        and page.exists()
    )
    assert error.startswith("MLflow at http://127.0.0.1:") and error.count("\n") == 1
    code, said, error = spiketrain(
        *shlex.split(
            error.partition("its page is made anew, and put into MLflow, by: spiketrain ")[2]
        )
    )
    assert (code, said) == (0, f"{page}\n"), error


def test_a_folder_may_be_named_by_where_one_stands(
    untouched: Path, spiketrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.` has no parent of its own: the runs of a suite that is named so are beside its folder all
    the same.
    """
    before = {folder: sorted(folder.iterdir()) for folder in (untouched.parent, untouched)}
    inside = untouched / "notes"
    for where, words, name in (
        (untouched, ("resume", ".", "--trust", "lab_suite"), untouched.name),
        (inside, ("resume", "..", "--trust", "lab_suite"), untouched.name),
        (runs_of(untouched)["first"], ("resume", "."), runs_of(untouched)["first"].name),
    ):
        where.mkdir(exist_ok=True)
        monkeypatch.chdir(where)
        code, said, error = spiketrain(*words)
        assert code == 0 and said.splitlines()[0] == f"{name} has finished", error
    inside.rmdir()
    monkeypatch.chdir(untouched)
    code, said, error = spiketrain("compare", ".", "--trust", "lab_suite")
    assert code == 0 and said.startswith("REPORT first:first-"), error
    assert {folder: sorted(folder.iterdir()) for folder in (untouched.parent, untouched)} == before


@pytest.mark.parametrize(
    "stops",
    [[("second", 5)], [("first", 4), ("second", 2), ("third", 6)]],
    ids=["in the second", "in each"],
)
@pytest.mark.parametrize("how", [die, interrupt])
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    how: Callable[[Trainer], None],
    stops: list[tuple[str, int]],
    untouched: Path,
    places: Path,
    tmp_path: Path,
    spiketrain: Command,
) -> None:
    words = [
        "launch",
        str(places / "lab_suite.py"),
        "--inline",
        "--runs",
        str(tmp_path),
        "--name",
        "broken",
    ]
    command = f"spiketrain resume broken --runs {tmp_path} --trust lab_suite"
    for recipe, step in stops:
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, recipe, step, how)
            if how is die:
                with pytest.raises(Killed):
                    spiketrain(*words)
            else:
                code, said, _ = spiketrain(*words)
                assert code == 130 and said.splitlines()[-1] == f"stopped; resume with: {command}"
        words = command.split()[1:]
    code, said, error = spiketrain(*words)
    assert code == 0, error
    runs = runs_of(tmp_path / "broken")
    assert said.splitlines()[-6] == "REPORT " + " ".join(
        f"{name}:{run.name}" for name, run in runs.items()
    )
    assert same_bits(tmp_path / "broken", untouched)
    assert {name for name, run in runs.items() if len(starts(run)) == 2} == {
        recipe for recipe, _ in stops
    }  # what had finished was left alone
    assert {json.loads((run / "job.json").read_text())["parent"] for run in runs.values()} == {
        SuiteFile.read(tmp_path / "broken", trust=["lab_suite"]).parent
    }


def test_asked_to_stop_during_a_runs_last_batch_the_suite_stops_and_goes_on(
    places: Path, tmp_path: Path, spiketrain: Command
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "second", 7, interrupt)
        code, said, _ = spiketrain(
            "launch",
            str(places / "lab_list.py"),
            "--inline",
            "--runs",
            str(tmp_path),
            "--name",
            "s",
        )
    assert (
        code == 130 and "stopped; resume with: spiketrain resume s --runs" in said.splitlines()[-1]
    )
    runs = runs_of(tmp_path / "s")
    assert [state_of(runs[name]) for name in ("first", "second")] == [
        "finished",
        "stopped",
    ]  # its evaluation is still to come
    assert not runs["third"].exists()
    [parent] = connect(f"sqlite:///{places}/mlflow.db").search_runs(
        [
            str(each.experiment_id)
            for each in connect(f"sqlite:///{places}/mlflow.db").search_experiments()
        ],
        f"tags.`spiketrain.study_parent` = '{SuiteFile.read(tmp_path / 's').parent}' and"
        " tags.`spiketrain.kind` = 'suite'",
    )
    assert parent.info.status == "KILLED"  # nobody drives it, though one of its runs has finished
    code, said, _ = spiketrain("compare", "s", "--runs", str(tmp_path))
    lines = said.splitlines()
    assert code == 0 and "SLTT-2" in said  # the table of the study so far
    assert [line for line in lines if line.startswith("not finished: ")] == [
        f"not finished: {name} ({runs[name].name}) {how}"
        for name, how in (("second", "is stopped"), ("third", "has not begun"))
    ]
    assert lines[-1] == f"1 of 3 finished; spiketrain resume s --runs {tmp_path}"
    code, said, error = spiketrain("compare", "s", "--runs", str(tmp_path), "--format", "json")
    [told] = json.loads(said)
    assert code == 0 and [run["rule"] for run in told["runs"]] == ["SLTT-2"]
    assert error.splitlines() == lines[-3:]

    def interrupted(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt  # between two runs, where nobody else listens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.launch.suite_runs.prepare", interrupted)
        code, said, _ = spiketrain("resume", "s", "--runs", str(tmp_path))
    assert (
        code == 130
        and said.splitlines()[-1] == f"stopped; resume with: spiketrain resume s --runs {tmp_path}"
    )


def test_what_is_listed_and_reported_while_children_are_missing(
    places: Path, tmp_path: Path, spiketrain: Command
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "second", 3, die)
        with pytest.raises(Killed):
            spiketrain(
                "launch",
                str(places / "lab_suite.py"),
                "--inline",
                "--runs",
                str(tmp_path),
                "--name",
                "half",
            )
    folder, second = tmp_path / "half", runs_of(tmp_path / "half")["second"]
    [row] = list_suites(tmp_path)
    assert (row.name, row.state, row.resume) == (
        "half",
        "1 of 3 finished",
        f"spiketrain resume half --runs {tmp_path} --trust lab_suite",
    )
    with driver_lock(folder):
        [row] = list_suites(tmp_path)
        assert (row.state, row.resume) == ("1 of 3 finished, running", None)
        code, _, error = spiketrain(
            "resume", "half", "--runs", str(tmp_path), "--trust", "lab_suite"
        )
        assert code == 2 and error == "half: is being trained by another process on this machine\n"
    out = io.StringIO()
    print_suite(folder, trust=("lab_suite",), console=Console(file=out, width=NO_WIDTH))
    said = out.getvalue().splitlines()
    assert (
        said[0] == f"not finished: second ({second.name}) is interrupted"
        and "REPORT" not in out.getvalue()
    )
    assert said[2].startswith(
        "1 of 3 finished, the report is printed when all have; spiketrain resume half --runs "
    )
    out = io.StringIO()
    print_runs(tmp_path, Console(file=out, width=80))
    assert "half   1 of 3 finished" in out.getvalue()
    assert f"spiketrain resume half --runs {tmp_path} --trust lab_suite\n" in out.getvalue()
    (folder / "suite.json").write_text("{")
    assert list_suites(tmp_path)[0].state == "suite.json is damaged"


def test_a_child_that_is_refused_stops_the_suite_and_after_mending_it_goes_on(
    untouched: Path, places: Path, tmp_path: Path, spiketrain: Command
) -> None:
    def refuse(attempt: Trainer) -> None:
        raise ValueError("IDE: the solve must converge")

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "second", 6, refuse)
        code, _, error = spiketrain(
            "launch",
            str(places / "lab_list.py"),
            "--inline",
            "--runs",
            str(tmp_path),
            "--name",
            "s",
        )
    assert code == 2 and error == "IDE: the solve must converge\n"
    runs = runs_of(tmp_path / "s")
    assert [state_of(run) for run in runs.values()] == ["finished", "failed", "new"]
    # The weights that the third starts from are damaged before its turn: refused then, and nothing
    # of it is left behind.
    newest, *older = sorted((runs["first"] / "checkpoints").glob("step_*"), reverse=True)
    weights = newest / "model.safetensors"
    whole = weights.read_bytes()

    def damage(attempt: Trainer) -> None:
        weights.write_bytes(whole[:-1])
        for checkpoint in older:
            (checkpoint / "manifest.json").unlink()

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "second", 7, damage)
        code, _, error = spiketrain("resume", "s", "--runs", str(tmp_path))
    assert code == 2 and error == f"{newest.parent}: needs a checkpoint that verifies; got none\n"
    assert state_of(runs["second"]) == "finished" and not runs["third"].exists()
    weights.write_bytes(whole)
    code, said, error = spiketrain("resume", "s", "--runs", str(tmp_path))
    assert code == 0, error
    assert (
        said.count("top-1 ") >= 3 and "study " in said and "of 3 finished" not in said
    )  # the tables of its studies
    assert same_bits(tmp_path / "s", untouched)


LAUNCH = """
from dataclasses import replace
from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import spec
from pipeline.train.distillation import Distillation
from pipeline.recipe.suite import Suite
from pipeline.models.teachers.network import network_teacher
from tests.helpers.small import small_recipe

def recipe():
    a, b = small_recipe(name="a"), small_recipe(name="b", init="@a")
    other = spec(mlp, in_features=64, hidden=(8,))
    taught = replace(a, name="b", objective=spec(Distillation))
    local = lambda runs, console: None
    return """


@pytest.mark.parametrize(
    ("recipes", "words", "said"),
    [
        (
            "[b, a]",
            "",
            "suite: a reference must name an earlier recipe; got '@a' in b, before it stand none",
        ),
        (
            "b",
            "",
            (
                "recipe: '@a' names an earlier recipe of the same suite; got b alone; give a run's"
                " folder or a file"
            ),
        ),
        ("[a, a]", "", "suite: recipes must have names of their own; got two of 'a'"),
        (
            "Suite((a, b), local)",
            "",
            "suite: report must be a function at the top level of a module",
        ),
        ("[a, replace(b, model=other)]", "", "init: "),
        (
            (
                "[a, replace(taught, teacher=spec(network_teacher, model=other, weights='@a',"
                " time_steps=2))]"
            ),
            "",
            "network_teacher: the weights in ",
        ),
        ("[a, replace(b, batch_size=1000)]", "", "batch_size must be at most the 64"),
        (
            "[a, b]",
            "--set init=@c",
            "suite: a reference must name an earlier recipe; got '@c' in a, before it stand none",
        ),
        ("[a, b]", "--set optimizer.lrr=1", "lrr"),
        (
            "[a, b]",
            "--side-by-side 999",
            "launch: 999 runs side by side need cores and cards of their own; there is room for ",
        ),
        (
            "[a, b]",
            "--checkpoints pyproject.toml",
            "must be open to this user; got NotADirectoryError",
        ),
        ("[a, b]", "--name x/y", "launch: --name must be a name in "),
        ("[a, b]", "--name ..", "launch: --name must be a name in "),
    ],
)
def test_what_cannot_be_trained_to_its_end_leaves_nothing_behind(
    recipes: str, words: str, said: str, tmp_path: Path, spiketrain: Command
) -> None:
    (tmp_path / "mine.py").write_text(LAUNCH + recipes + "\n")
    code, _, error = spiketrain(
        "launch",
        str(tmp_path / "mine.py"),
        "--inline",
        "--runs",
        str(tmp_path / "runs"),
        *words.split(),
    )
    assert code == 2 and said in error and error.count("\n") == 1, error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "compare whole",
            "suite.json: lab_suite.table is not in a trusted package; name its package with"
            " --trust",
        ),
        ("resume whole", "suite.json: lab_suite.table is not in a trusted package"),
        (
            "compare whole first --trust lab_suite",
            "compare: a suite is compared by itself; got whole among whole, first",
        ),
        (
            "compare whole --trust lab_suite --format json",
            "compare: whole must have finished; 0 of 1 runs have",
        ),
        (
            "compare whole --trust lab_suite --against SLTT",
            "compare: whole has a report of its own, so --against and --within have",
        ),
        ("compare nothing", "no run 'nothing'"),
        ("resume nothing", "no run or suite 'nothing' in "),
        ("resume f", "'f' begins the names of 2 runs"),
        ("evaluate whole", "no run 'whole'"),
    ],
)
def test_what_is_wrong_about_a_suite_ends_in_one_line(
    words: str, said: str, tmp_path: Path, spiketrain: Command
) -> None:
    for name in ("whole", "first", "f2"):
        (tmp_path / name).mkdir()
    (tmp_path / "first" / "recipe.json").write_text("{}")
    (tmp_path / "f2" / "recipe.json").write_text("{}")
    value = {
        "version": 1,
        "parent": "0" * 32,
        "cluster": {"inline": True},
        "report": "lab_suite.table",
        "children": [{"run": "first", "recipe": {"version": 1, "recipe": {"name": "first"}}}],
    }
    if "trust" in words:
        value["children"] = [{"run": "first", "recipe": small_recipe().to_json()}]
    (tmp_path / "whole" / "suite.json").write_text(json.dumps(value))
    code, _, error = spiketrain(*words.split(), "--runs", str(tmp_path))
    assert code == 2 and said in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compare s", "'s' begins the names of 2 runs: s1, s2"),
        ("resume s", "'s' begins the names of 2 runs: s1, s2"),
        ("compare s1", "s1: a run must be a folder; "),
        ("resume s1", "s1: a run must be a folder; "),
        (
            "compare s2",
            "s2: suite.json: a run must be a name of its own in the folder of runs; got 's2'",
        ),
        (
            "resume s2",
            "s2: suite.json: a run must be a name of its own in the folder of runs; got 's2'",
        ),
    ],
)
def test_suites_of_one_beginning_or_with_runs_that_are_none_end_in_one_line(
    words: str, said: str, tmp_path: Path, spiketrain: Command
) -> None:
    for name, run in (("s1", "file"), ("s2", "s2")):
        value = {
            "version": 1,
            "parent": "0" * 32,
            "cluster": {"inline": True},
            "report": None,
            "children": [{"run": run, "recipe": small_recipe().to_json()}],
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "suite.json").write_text(json.dumps(value))
    (tmp_path / "file").touch()
    code, _, error = spiketrain(*words.split(), "--runs", str(tmp_path))
    assert code == 2 and said in error and error.count("\n") == 1, error
    assert spiketrain("runs", "--runs", str(tmp_path))[0] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("cluster", "cluster: unknown field 'hosts'; it has workers, inline"),
        ("workers", "cluster: workers must be a whole number >= 1; got workers=0"),
        ("parent", "must be a run of this suite; got one of another launch"),
        ("job", "must be a whole run; it has no job.json: move it away, resume"),
    ],
)
def test_a_suite_from_elsewhere_is_not_resumed_over_what_is_not_its_own(
    change: str, said: str, places: Path, tmp_path: Path, spiketrain: Command
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "first", 1, die)
        with pytest.raises(Killed):
            spiketrain(
                "launch",
                str(places / "lab_list.py"),
                "--inline",
                "--runs",
                str(tmp_path),
                "--name",
                "s",
            )
    file = tmp_path / "s" / "suite.json"
    value, run = json.loads(file.read_text()), runs_of(tmp_path / "s")["first"]
    if change == "cluster":
        value["cluster"]["hosts"] = "here"
    elif change == "workers":
        value["cluster"]["workers"] = 0
    elif change == "parent":
        value["parent"] = "f" * 32
    else:
        (run / "job.json").unlink()
    file.write_text(json.dumps(value))
    code, _, error = spiketrain("resume", "s", "--runs", str(tmp_path))
    assert code == 2 and said in error and error.count("\n") == 1, error
    assert not runs_of(tmp_path / "s")["second"].exists()


def test_tiny_follows_references_and_names_do_not_collide(
    places: Path, tmp_path: Path, spiketrain: Command
) -> None:
    """The file is called as its only recipe is, so that its suite and its run would have one
    name.
    """
    (tmp_path / "twin.py").write_text(
        "from tests.helpers.small import small_recipe\n\ndef recipe():\n"
        "    return [small_recipe(name='twin'), small_recipe(name='after', init='@twin')]\n"
    )
    words = ("launch", str(tmp_path / "twin.py"), "--inline", "--runs", str(tmp_path / "runs"))
    code, _, error = spiketrain(*words, "--tiny")
    assert code == 0, error
    [suite] = [tmp_path / "runs" / row.name for row in list_suites(tmp_path / "runs")]
    runs = runs_of(suite)
    assert list(runs) == ["twin-tiny", "after-tiny"] and all(
        state_of(run) == "finished" for run in runs.values()
    )
    assert json.loads((runs["after-tiny"] / "recipe.json").read_text())["recipe"][
        "init"
    ].startswith(str(runs["twin-tiny"]))
    code, _, error = spiketrain(*words, "--set", "epochs=1", "--name", suite.name)
    assert code == 2 and f"--name must be new in {tmp_path / 'runs'}; got {suite.name}" in error
    code, _, error = spiketrain(*words, "--set", "epochs=1")
    assert code == 0, error
    newest = tmp_path / "runs" / list_suites(tmp_path / "runs")[0].name
    names = [newest.name, *(run.name for run in runs_of(newest).values())]
    assert names[1].startswith("twin-") and len(set(names)) == 3


def test_two_suites_launched_in_one_second_are_both_trained_to_their_end(
    places: Path, tmp_path: Path, spiketrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is launched while the first trains, before the first has made the folders of its
    later runs.
    """
    monkeypatch.setattr(
        "pipeline.launch.suite.time.strftime", lambda form, when=None: "20260105-120000"
    )
    words = (
        "launch",
        str(places / "lab_list.py"),
        "--inline",
        "--runs",
        str(tmp_path),
        "--set",
        "epochs=1",
        "--name",
    )
    for name in "ab":
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, "first", 1, die)
            with pytest.raises(Killed):
                spiketrain(*words, name)
    for name in "ab":
        code, _, error = spiketrain("resume", name, "--runs", str(tmp_path))
        assert code == 0, error
        assert all(state_of(run) == "finished" for run in runs_of(tmp_path / name).values())
    assert not {*runs_of(tmp_path / "a").values()} & {*runs_of(tmp_path / "b").values()}


def test_show_prints_every_recipe_of_a_suite_without_what_it_refers_to(
    places: Path, spiketrain: Command
) -> None:
    code, said, error = spiketrain("show", str(places / "lab_suite.py"))
    assert code == 0, error
    assert "@first" in said and "/tmp" not in said.replace(str(places), "")
    assert said.count("study key     depends on what first will have learnt") == 2
    assert (
        "shared by 3 recipes" in said
        and "global batch  8 = 1 worker x 8 samples x 1 accumulated" in said
    )
    told = [line.split(maxsplit=1) for line in said.splitlines()]
    assert all(
        sum(line[:1] == [key] for line in told) == 1
        for key in ("time_steps", "batch_size", "parameters")
    )
    assert [line[1].strip() for line in told if line[:1] == ["name"]] == [
        "first",
        "second",
        "third",
    ]
    code, _, error = spiketrain("evaluate", str(places / "lab_suite.py"), "--weights", "x.pt")
    assert code == 2 and "the file must hold one recipe; got first, second, third" in error


def test_storage_that_is_away_at_the_end_hides_no_other_error(tmp_path: Path) -> None:
    """MLflow is told as the suite ends, which may be by an error that is on its way to the user."""

    def away() -> list[Recipe]:
        raise OSError(errno.ESTALE, "Stale file handle")

    with RawJournal(tmp_path / "journal.jsonl", attempt=0) as journal:
        journal.event("start")
    console = Console(file=io.StringIO())
    children: Any = SimpleNamespace(where={"one": tmp_path}, runs=tmp_path, left=away)
    _sync_states(children, console)
    assert "Stale file handle" in console.file.getvalue()  # type: ignore[attr-defined]


MEASURED = """
import json
from pipeline.recipe.suite import Measurement, Suite
from tests.helpers.small import small_recipe

def told(runs, console):
    rules = {point["cost"]["rule"] for point in json.loads(runs["by-t"].read_text())["points"]}
    console.print("MEASURED", ", ".join(sorted(rules)))

def recipe():
    measurement = Measurement("by-t", "sweep", ("only",), {"steps": [2]})
    return Suite((small_recipe(name="only", epochs=1),), told, measurements=(measurement,))
"""


def test_a_measurement_is_an_entry_that_a_resume_makes(
    places: Path, spiketrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (places / "lab_measured.py").write_text(MEASURED)
    runs, trust = places / "measured", ("--trust", "lab_measured")
    words = ("--name", "study", "--inline", "--runs", str(runs))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.launch.suite.measure_the_rest", interrupted)
        code, out, error = spiketrain("launch", str(places / "lab_measured.py"), *words)
    assert code == 130 and "MEASURED" not in out, error
    code, out, error = spiketrain("compare", "study", "--runs", str(runs), *trust)
    assert code == 0 and "not finished: by-t (measured-by-t.json) has not begun" in out, error
    assert "1 of 2 finished" in spiketrain("runs", "--runs", str(runs))[1]
    code, out, error = spiketrain("resume", "study", "--inline", "--runs", str(runs), *trust)
    assert code == 0 and "MEASURED SLTT-2" in out, error
    assert "2 of 2 finished" in spiketrain("runs", "--runs", str(runs))[1]
    code, out, error = spiketrain("resume", "study", "--inline", "--runs", str(runs), *trust)
    assert code == 0 and "study has finished" in out, error
