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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from pipeline.__main__ import main
from pipeline.launch.driver import driver_lock
from pipeline.launch.suite import _sync_states
from pipeline.recipe.recipe import read_json, write_json
from pipeline.recipe.suite import SuiteFile, runs_of
from pipeline.report.selection import list_suites, print_runs
from pipeline.track.mlflow_store import connect
from pipeline.track.run_state import state_of
from pipeline.train.trainer import Trainer
from tests.helpers.events import RawJournal
from tests.helpers.interruptions import Act, before_batch, die, dies
from tests.helpers.nodes import free_port
from tests.helpers.small import Command, Done, Refused, same_weights, small_recipe, steps_of
from tests.helpers.waiting import until

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


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("suites")
    (folder / "lab_suite.py").write_text(WITH_REPORT)
    (folder / "lab_list.py").write_text(WITHOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        store = shutil.copy(empty_store, folder / "mlflow.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
        yield folder


def launch(file: Path, runs: Path, name: str) -> list[str]:
    return ["launch", str(file), "--inline", "--runs", str(runs), "--name", name]


def at_step(patch: pytest.MonkeyPatch, recipe: str, step: int, act: Act) -> None:
    before_batch(patch, lambda trainer: trainer.recipe.name == recipe and act(trainer), step=step)


def killed(spiketrain: Command, recipe: str, step: int, words: list[str]) -> None:
    with dies(lambda patch: at_step(patch, recipe, step, die)):
        spiketrain(*words)


def interrupt(attempt: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    until((attempt.folder / "stop").exists, within=30, pause=0.01)


@pytest.fixture(scope="module")
def untouched(places: Path) -> Path:
    words = ["launch", str(places / "lab_suite.py"), "--inline", "--runs", f"{places}/whole"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spiketrain", *words])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0
    [folder] = (places / "whole").glob("lab-suite-*")
    return folder


def test_mlflow_has_it_beneath_one_parent_and_its_checkpoints_by_address(
    untouched: Path, places: Path, done: Done
) -> None:
    client, runs = connect(f"sqlite:///{places}/mlflow.db"), runs_of(untouched)
    # No recipe names a family: the first one's name is it.
    experiment = client.get_experiment_by_name("first")
    assert experiment is not None
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    names = [run.name for run in runs.values()]
    parent, first = found[untouched.name], found[names[0]].info.run_id
    assert {found[name].data.tags["mlflow.parentRunId"] for name in names} == {parent.info.run_id}
    assert {each.info.status for each in (parent, *(found[name] for name in names))} == {"FINISHED"}
    assert [
        {file.path for file in client.list_artifacts(run)} for run in (parent.info.run_id, first)
    ] == [
        {"report.html", "report.json"},
        {"recipe.json", "journal.jsonl", "summary.json", "activity.json", "answers.npz"},
    ]

    at = ("--runs", untouched.parent)
    checkpoint = max((runs["first"] / "checkpoints").glob("step_????????"))
    assert (
        done("register", names[0], "--as", "small", "--which", "best", *at)
        == f"{names[0]} -> models:/small@best, version 1: {checkpoint.as_uri()}\n"
    )
    assert client.get_model_version_by_alias("small", "best").run_id == first
    said = done("sync", untouched.name, *at)
    assert [line.split(" -> ")[0] for line in said.splitlines()] == names
    assert said.count(": 0 points") == 3


def same_bits(one: Path, other: Path) -> bool:
    return all(same_weights(run, runs_of(other)[name]) for name, run in runs_of(one).items())


def test_a_suite_in_one_go(untouched: Path, done: Done) -> None:
    runs, suite_file = runs_of(untouched), SuiteFile.read(untouched, trust=["lab_suite"])
    stamp = f"{untouched.name.removeprefix('lab-suite-')}-{suite_file.parent[:4]}"
    names = {name: f"{name}-{stamp}" for name in ("first", "second", "third")}
    assert {name: run.name for name, run in runs.items()} == names
    assert {read_json(run / "job.json")["parent"] for run in runs.values()} == {suite_file.parent}
    assert suite_file.cluster["inline"] is True
    # The runs hold the absolute paths that references stand for; the suite keeps the references.
    weights = str(runs["first"] / "model.safetensors")
    written = {name: read_json(run / "recipe.json")["recipe"] for name, run in runs.items()}
    assert written["third"]["init"] == weights
    assert written["second"]["teacher"]["kwargs"]["weights"] == weights
    assert suite_file.suite.recipes[2].init == "@first"
    assert not same_weights(runs["first"], runs["third"])
    at = f"{untouched.name} --runs {untouched.parent}"
    trusted = [*at.split(), "--trust", "lab_suite"]
    said = done("compare", *trusted)
    assert said.startswith("REPORT first:first-") and f"third:third-{stamp}" in said
    assert json.loads(done("compare", *trusted, "--format", "json")) == names
    # A table of the runs imports nothing of the suite's.
    rows = csv.DictReader(io.StringIO(done("compare", *at.split(), "--format", "csv")))
    assert {row["run"] for row in rows} == set(names.values())
    runs_words = f"--runs {untouched.parent}"
    assert done("resume", *trusted).splitlines() == [
        f"{untouched.name} has finished",
        said.strip(),
        f"next    spiketrain compare {at} --trust lab_suite",
        f"        spiketrain dashboard {runs_words}",
        # Of the first run nothing is of the file's own.
        f"        spiketrain export {names['first']} {runs_words}",
    ]


def test_a_page_that_mlflow_does_not_take_costs_the_suite_nothing(
    untouched: Path, spiketrain: Command, done: Done
) -> None:
    page = untouched / "report.html"
    page.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        code, said, error = spiketrain(
            "resume", untouched.name, "--runs", str(untouched.parent), "--trust", "lab_suite"
        )
    assert code == 0 and said.splitlines()[1].startswith("REPORT ")
    assert f"\npage    {page}\nnext    " in said and page.exists()
    assert error.startswith("MLflow at http://127.0.0.1:") and error.count("\n") == 1
    retry = error.partition("write the page again, and log it to MLflow, with: spiketrain ")[2]
    assert done(*shlex.split(retry)) == f"{page}\n"


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([("second", 5)], id="in the second"),
        pytest.param(
            [("first", 4), ("second", 2), ("third", 6)], marks=pytest.mark.full, id="in each"
        ),
    ],
)
@pytest.mark.parametrize("how", [pytest.param(die, marks=pytest.mark.full), interrupt])
def test_stopped_and_resumed_it_ends_with_the_same_bits(
    how: Callable[[Trainer], None],
    stops: list[tuple[str, int]],
    untouched: Path,
    places: Path,
    tmp_path: Path,
    spiketrain: Command,
    done: Done,
) -> None:
    words = launch(places / "lab_suite.py", tmp_path, "broken")
    command = f"spiketrain resume broken --runs {tmp_path} --trust lab_suite"
    for recipe, step in stops:
        if how is die:
            killed(spiketrain, recipe, step, words)
        else:
            with pytest.MonkeyPatch.context() as patch:
                at_step(patch, recipe, step, how)
                code, said, _ = spiketrain(*words)
            assert code == 130 and said.splitlines()[-1] == f"stopped; resume with: {command}"
        words = command.split()[1:]
    said, runs = done(*words), runs_of(tmp_path / "broken")
    named = " ".join(f"{name}:{run.name}" for name, run in runs.items())
    assert said.splitlines()[-5] == f"REPORT {named}"
    assert same_bits(tmp_path / "broken", untouched)
    # What had finished was left alone.
    assert {name for name, run in runs.items() if len(steps_of(run, "start")) == 2} == {
        recipe for recipe, _ in stops
    }
    assert {read_json(run / "job.json")["parent"] for run in runs.values()} == {
        SuiteFile.read(tmp_path / "broken", trust=["lab_suite"]).parent
    }


def test_asked_to_stop_during_a_runs_last_batch_the_suite_stops_and_goes_on(
    places: Path, tmp_path: Path, spiketrain: Command, done: Done
) -> None:
    stopped = f"stopped; resume with: spiketrain resume s --runs {tmp_path}"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "second", 7, interrupt)
        code, said, _ = spiketrain(*launch(places / "lab_list.py", tmp_path, "s"))
    assert (code, said.splitlines()[-1]) == (130, stopped)
    runs = runs_of(tmp_path / "s")
    # The evaluation of the second is still to come.
    assert [state_of(run) for run in runs.values()] == ["finished", "stopped", "new"]
    client = connect(f"sqlite:///{places}/mlflow.db")
    [parent] = client.search_runs(
        [each.experiment_id for each in client.search_experiments()],
        f"tags.`spiketrain.study_parent` = '{SuiteFile.read(tmp_path / 's').parent}' and"
        " tags.`spiketrain.kind` = 'suite'",
    )
    assert parent.info.status == "KILLED"  # nobody drives it, though one of its runs has finished
    table = done("compare", "s", "--runs", tmp_path)
    lines = table.splitlines()
    assert "SLTT-2" in table  # of the study so far
    assert [line for line in lines if line.startswith("not finished: ")] == [
        f"not finished: {name} ({runs[name].name}) {how}"
        for name, how in (("second", "is stopped"), ("third", "has not begun"))
    ]
    assert lines[-1] == f"1 of 3 finished; spiketrain resume s --runs {tmp_path}"
    code, said, error = spiketrain("compare", "s", "--runs", str(tmp_path), "--format", "json")
    [told] = json.loads(said)
    assert code == 0 and [run["rule"] for run in told["runs"]] == ["SLTT-2"]
    assert error.splitlines() == lines[-3:]
    with pytest.MonkeyPatch.context() as patch:
        # Between two runs, where nobody else listens.
        patch.setattr("pipeline.launch.suite.prepare", Mock(side_effect=KeyboardInterrupt))
        code, said, _ = spiketrain("resume", "s", "--runs", str(tmp_path))
    assert (code, said.splitlines()[-1]) == (130, stopped)


def test_what_is_listed_and_reported_while_children_are_missing(
    places: Path, tmp_path: Path, spiketrain: Command, done: Done, refused: Refused
) -> None:
    killed(spiketrain, "second", 3, launch(places / "lab_suite.py", tmp_path, "half"))
    folder = tmp_path / "half"
    _, second, third = runs_of(folder).values()
    at = f"half --runs {tmp_path} --trust lab_suite"
    resume = f"resume {at}"
    [row] = list_suites(tmp_path)
    assert (row.name, row.state, row.resume) == ("half", "1 of 3 finished", f"spiketrain {resume}")
    with driver_lock(folder):
        [row] = list_suites(tmp_path)
        assert (row.state, row.resume) == ("1 of 3 finished, running", None)
        assert (
            refused(*resume.split()) == "half: is being trained by another process on this machine"
        )
    assert done("compare", *at.split()).splitlines() == [
        f"not finished: second ({second.name}) is interrupted",
        f"not finished: third ({third.name}) has not begun",
        f"1 of 3 finished, the report follows when all have finished; spiketrain {resume}",
    ]
    out = io.StringIO()
    print_runs(tmp_path, Console(file=out, width=80))
    assert "half   1 of 3 finished" in out.getvalue()
    assert f"spiketrain {resume}\n" in out.getvalue()
    (folder / "suite.json").write_text("{")
    assert list_suites(tmp_path)[0].state == "suite.json is damaged"


def test_a_child_that_is_refused_stops_the_suite_and_after_mending_it_goes_on(
    untouched: Path, places: Path, tmp_path: Path, refused: Refused, done: Done
) -> None:
    refuse = Mock(side_effect=ValueError("IDE: the solve must converge"))
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, "second", 6, refuse)
        assert (
            refused(*launch(places / "lab_list.py", tmp_path, "s"))
            == "IDE: the solve must converge"
        )
    runs, resume = runs_of(tmp_path / "s"), ("resume", "s", "--runs", str(tmp_path))
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
        said = f"{newest.parent}: must hold a checkpoint that verifies; got none"
        assert refused(*resume) == said
    assert state_of(runs["second"]) == "finished" and not runs["third"].exists()
    weights.write_bytes(whole)
    said = done(*resume)  # with the tables of its studies
    assert said.count("top-1 ") >= 3 and "study " in said and "of 3 finished" not in said
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
            "suite: a reference must name an earlier recipe; got '@a' in b; earlier recipes: none",
        ),
        (
            "b",
            "",
            (
                "recipe: '@a' must name an earlier recipe of the same suite; got b without a"
                " suite: use the path of a run's folder or of a weights file"
            ),
        ),
        ("[a, a]", "", "suite: recipes must have different names; got two recipes 'a'"),
        (
            "Suite((a, b), local)",
            "",
            "suite: report must be a top-level function of a module",
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
            "suite: a reference must name an earlier recipe; got '@c' in a; earlier recipes: none",
        ),
        ("[a, b]", "--set optimizer.lrr=1", "lrr"),
        (
            "[a, b]",
            "--side-by-side 999",
            "launch: --side-by-side must be at most ",
        ),
        (
            "[a, b]",
            "--checkpoints pyproject.toml",
            "must be readable for this user; got NotADirectoryError",
        ),
        ("[a, b]", "--name x/y", "launch: --name must be a name in "),
        ("[a, b]", "--name ..", "launch: --name must be a name in "),
    ],
)
def test_what_cannot_be_trained_to_its_end_leaves_nothing_behind(
    recipes: str, words: str, said: str, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "mine.py").write_text(LAUNCH + recipes + "\n")
    file, runs = str(tmp_path / "mine.py"), tmp_path / "runs"
    assert said in refused("launch", file, "--inline", "--runs", str(runs), *words.split())
    assert not runs.exists()


def write_suite(folder: Path, run: str, recipe: dict[str, Any], report: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    value = {"version": 1, "parent": "0" * 32, "cluster": {"inline": True}, "report": report}
    write_json(folder / "suite.json", {**value, "children": [{"run": run, "recipe": recipe}]})


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
            "compare: a suite must be the only name; got whole in whole, first",
        ),
        (
            "compare whole --trust lab_suite --format json",
            "compare: whole must have finished; got 0 of 1 done",
        ),
        (
            "compare whole --trust lab_suite --against SLTT",
            "compare: --against and --within must not be set, because whole has its own report",
        ),
        ("compare nothing", "no run 'nothing'"),
        ("resume nothing", "no run 'nothing' in "),
        ("resume f", "'f' begins the names of 2 runs"),
        ("evaluate whole", "no run 'whole'"),
        *(
            (f"{command} {name}", said)
            for command in ("compare", "resume")
            for name, said in (
                ("s", "'s' begins the names of 2 runs: s1, s2"),
                ("s1", "s1: a run must be a folder; "),
                (
                    "s2",
                    "s2: suite.json: a run must be a unique name in the folder of runs; got 's2'",
                ),
            )
        ),
    ],
)
def test_what_is_wrong_about_a_suite_ends_in_one_line(
    words: str, said: str, tmp_path: Path, refused: Refused, done: Done
) -> None:
    for name in ("first", "f2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text("{}")
    damaged = {"version": 1, "recipe": {"name": "first"}}
    recipe = small_recipe().to_json()
    write_suite(
        tmp_path / "whole", "first", recipe if "trust" in words else damaged, "lab_suite.table"
    )
    (tmp_path / "file").touch()
    write_suite(tmp_path / "s1", "file", recipe)
    write_suite(tmp_path / "s2", "s2", recipe)
    assert said in refused(*words.split(), "--runs", str(tmp_path))
    done("runs", "--runs", tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"cluster": {"inline": True, "hosts": "here"}},
            "cluster: unknown field 'hosts'; it has workers, inline",
        ),
        (
            {"cluster": {"inline": True, "workers": 0}},
            "cluster: workers must be a whole number >= 1; got workers=0",
        ),
        ({"parent": "f" * 32}, "must be a run of this suite; got one of another launch"),
        (None, "must have a job.json; got none: move the folder away, then resume"),
    ],
)
def test_a_suite_from_elsewhere_is_not_resumed_over_what_is_not_its_own(
    change: dict[str, Any] | None,
    said: str,
    places: Path,
    tmp_path: Path,
    spiketrain: Command,
    refused: Refused,
) -> None:
    killed(spiketrain, "first", 1, launch(places / "lab_list.py", tmp_path, "s"))
    file, runs = tmp_path / "s" / "suite.json", runs_of(tmp_path / "s")
    if change is None:
        (runs["first"] / "job.json").unlink()
    else:
        write_json(file, read_json(file) | change)
    assert said in refused("resume", "s", "--runs", str(tmp_path))
    assert not runs["second"].exists()


def test_tiny_follows_references_and_names_do_not_collide(
    places: Path, tmp_path: Path, refused: Refused, done: Done
) -> None:
    """The file is called as its only recipe is, so that its suite and its run would have one
    name.
    """
    (tmp_path / "twin.py").write_text(
        "from tests.helpers.small import small_recipe\n\ndef recipe():\n"
        "    return [small_recipe(name='twin'), small_recipe(name='after', init='@twin')]\n"
    )
    words = ("launch", str(tmp_path / "twin.py"), "--inline", "--runs", str(tmp_path / "runs"))
    done(*words, "--tiny")
    [suite] = [tmp_path / "runs" / row.name for row in list_suites(tmp_path / "runs")]
    runs = runs_of(suite)
    assert {name: state_of(run) for name, run in runs.items()} == {
        "twin-tiny": "finished",
        "after-tiny": "finished",
    }
    assert read_json(runs["after-tiny"] / "recipe.json")["recipe"]["init"].startswith(
        str(runs["twin-tiny"])
    )
    assert f"--name must be new in {tmp_path / 'runs'}; got {suite.name}" in refused(
        *words, "--set", "epochs=1", "--name", suite.name
    )
    done(*words, "--set", "epochs=1")
    newest = tmp_path / "runs" / list_suites(tmp_path / "runs")[0].name
    names = [newest.name, *(run.name for run in runs_of(newest).values())]
    assert names[1].startswith("twin-") and len(set(names)) == 3


def test_show_prints_every_recipe_of_a_suite_without_what_it_refers_to(
    places: Path, refused: Refused, done: Done
) -> None:
    said = done("show", places / "lab_suite.py")
    assert "@first" in said and "/tmp" not in said.replace(str(places), "")
    assert said.count("study key     depends on the trained weights of first") == 2
    assert "shared by 3 recipes" in said
    assert "global batch  8 = 1 worker x 8 samples x 1 accumulation step" in said
    fields = [line.split() for line in said.splitlines() if line]
    keys = [line[0] for line in fields]
    assert all(keys.count(key) == 1 for key in ("time_steps", "batch_size", "parameters"))
    assert [line[1] for line in fields if line[0] == "name"] == ["first", "second", "third"]
    assert "the file must have one recipe; got first, second, third" in refused(
        "evaluate", str(places / "lab_suite.py"), "--weights", "x.pt"
    )


def test_storage_that_is_away_at_the_end_hides_no_other_error(tmp_path: Path) -> None:
    away = Mock(side_effect=OSError(errno.ESTALE, "Stale file handle"))
    with RawJournal(tmp_path / "journal.jsonl", attempt=0) as journal:
        journal.event("start")
    out = io.StringIO()
    children: Any = SimpleNamespace(folders={"one": tmp_path}, runs=tmp_path, remaining=away)
    _sync_states(children, Console(file=out))
    assert "Stale file handle" in out.getvalue()


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
    places: Path, spiketrain: Command, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    (places / "lab_measured.py").write_text(MEASURED)
    runs = ("--runs", str(places / "measured"))
    resume = ("resume", "study", "--inline", *runs, "--trust", "lab_measured")
    with monkeypatch.context() as patch:
        patch.setattr(
            "pipeline.launch.suite.make_missing_measurements", Mock(side_effect=KeyboardInterrupt)
        )
        words = launch(places / "lab_measured.py", places / "measured", "study")
        code, out, error = spiketrain(*words)
    assert code == 130 and "MEASURED" not in out, error
    out = done("compare", "study", *runs, "--trust", "lab_measured")
    assert "not finished: by-t (measured-by-t.json) has not begun" in out
    assert "1 of 2 finished" in done("runs", *runs)
    assert "MEASURED SLTT-2" in done(*resume)
    assert "2 of 2 finished" in done("runs", *runs)
    assert "study has finished" in done(*resume)
