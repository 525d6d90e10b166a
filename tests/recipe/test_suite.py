"""A suite as a value: names and references, what --tiny and --set do to it, and suite.json, which
may come from elsewhere.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipeline.core.tensor_file import describe_mismatch
from pipeline.models.mlp import mlp
from pipeline.models.teachers.network import network_teacher
from pipeline.recipe.phases import Phase
from pipeline.recipe.recipe import Recipe, spec
from pipeline.recipe.recipe_files import load_recipe, trust_of
from pipeline.recipe.suite import (
    Suite,
    SuiteFile,
    fill_references,
    references,
    refuse_references,
    runs_of,
)
from pipeline.train.build import check_recipe, with_placeholder_weights
from pipeline.train.distillation import Distillation
from tests.helpers.small import recipes_of, small_recipe


def taught(**changes: Any) -> Recipe:
    """Starts from `first` and learns from `second`."""
    teacher = spec(network_teacher, weights="@second", model=small_recipe().model, time_steps=2)
    return small_recipe(
        **{
            "name": "third",
            "init": "@first",
            "objective": spec(Distillation),
            "teacher": teacher,
            **changes,
        }
    )


def three(report: Any = None) -> Suite:
    return Suite(
        (small_recipe(name="first"), small_recipe(name="second", seed=1), taught()), report
    )


def report(runs: Mapping[str, Path], console: Any) -> None:
    console.print(
        f"report of {', '.join(f'{name} in {run}' for name, run in runs.items())}", soft_wrap=True
    )


def pointed(data: Any, *, folder: Path) -> Any:
    return data


def test_references_are_found_wherever_a_path_may_stand_and_filled() -> None:
    recipe = taught(phases=(Phase(name="task", data=spec(pointed, folder="@fourth")),))
    assert sorted(references(recipe)) == ["first", "fourth", "second"]
    ready = fill_references(recipe, lambda name: Path("runs") / name)
    assert ready.teacher is not None and references(ready) == () and ready.name == recipe.name
    paths = (ready.init, ready.teacher.kwargs["weights"], ready.phases[0].data.kwargs["folder"])
    assert paths == ("runs/first", "runs/second", "runs/fourth")


def test_one_family_for_all() -> None:
    named = Suite((small_recipe(name="first"), small_recipe(name="second", family="fashion")))
    assert (three().family, named.family) == ("first", "fashion")


def test_resolved_paths_are_absolute_and_references_stay() -> None:
    recipe = three().resolved().recipes[2]
    assert sorted(references(recipe)) == ["first", "second"]
    assert Path(fill_references(recipe, Path).resolved().init or "").is_absolute()


def test_tiny_and_set_reach_every_recipe_and_references_follow() -> None:
    suite = three(report).override({"optimizer.lr": 0.5}).tiny()
    assert [
        (recipe.name, recipe.optimizer.kwargs["lr"], recipe.batch_size) for recipe in suite.recipes
    ] == [(f"{name}-tiny", 0.5, 8) for name in ("first", "second", "third")]
    assert set(references(suite.recipes[2])) == {"first-tiny", "second-tiny"}
    assert suite.report is None  # which speaks of runs by the names, and of the sizes, of the whole


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Suite(()), "suite: recipes must be Recipes, at least one; got ()"),
        (lambda: Suite((1,)), "suite: recipes must be Recipes, at least one; got (1,)"),
        (
            lambda: Suite((taught(),)),
            (
                "suite: a reference must name an earlier recipe; got '@second' in third;"
                " earlier recipes: none"
            ),
        ),
        (
            lambda: Suite(
                (
                    small_recipe(name="a"),
                    taught(name="b", init="@b", teacher=None),
                    small_recipe(name="c"),
                )
            ),
            "suite: a reference must name an earlier recipe; got '@b' in b; earlier recipes: a",
        ),
        (lambda: Suite((small_recipe(init="@"),)), "got '@' in small; earlier recipes: none"),
        (
            lambda: Suite((small_recipe(),) * 2),
            "suite: recipes must have different names; got two recipes 'small'",
        ),
        (
            lambda: three().override({"name": "one"}),
            "suite: recipes must have different names; got two recipes 'one'",
        ),
        (
            lambda: three().override({"epoch": 1}),
            "suite: first does not accept the change; recipe: no field 'epoch'; it has name",
        ),
        (
            lambda: three(lambda runs, console: None),
            "suite: report must be a top-level function of a module",
        ),
        (lambda: three(Path.exists), "called with (runs, console); got <function Path.exists"),
        (
            lambda: three(three),
            (
                "suite: report must be a top-level function of a module, called with (runs,"
                " console); got three"
            ),
        ),
        (lambda: three(print), "suite: report must be a top-level function"),
        (
            lambda: refuse_references(taught()),
            "recipe: '@second' must name an earlier recipe of the same suite; got third without",
        ),
    ],
)
def test_what_is_no_suite_is_refused_in_one_line(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^.*{re.escape(said)}.*$"):
        make()


# --------------------------------------------------------------------------------------- in advance


def test_stand_ins_have_the_shapes_of_what_will_be_learnt_and_are_gone_afterwards() -> None:
    with with_placeholder_weights(three()) as recipes:
        assert recipes[:2] == three().recipes[:2]
        teacher = recipes[2].teacher
        assert teacher is not None
        files = [Path(recipes[2].init or ""), Path(teacher.kwargs["weights"])]
        expected = small_recipe().model.build().state_dict()
        for file in files:
            assert describe_mismatch(load_file(file), expected) == ""
        check_recipe(recipes[2], 1)
    assert not any(file.exists() for file in files)


def test_a_teacher_that_will_not_fit_is_known_before_anything_trains() -> None:
    other = spec(
        network_teacher,
        weights="@second",
        model=spec(mlp, in_features=64, hidden=(8,)),
        time_steps=2,
    )
    suite = Suite((*three().recipes[:2], taught(teacher=other)))
    with (
        with_placeholder_weights(suite) as recipes,
        pytest.raises(ValueError, match=r"network_teacher: .* must have the model's keys"),
    ):
        check_recipe(recipes[2], 1)


# --------------------------------------------------------------------------------------- suite.json


def suite_json(**changes: Any) -> dict[str, Any]:
    file = SuiteFile(
        suite=three(report).resolved(),
        runs=("a", "b", "c"),
        parent="0" * 32,
        cluster={"inline": True},
    )
    return json.loads(json.dumps(file.to_json())) | changes


def test_a_suite_is_the_same_after_json(tmp_path: Path) -> None:
    suite_file = SuiteFile.from_json(suite_json(), trust=["tests"])
    assert (suite_file.suite, suite_file.to_json()) == (three(report).resolved(), suite_json())
    suite_file.write(tmp_path)
    assert SuiteFile.read(tmp_path, trust=["tests"]) == suite_file
    assert runs_of(tmp_path) == {
        name: tmp_path.parent / run
        for name, run in (("first", "a"), ("second", "b"), ("third", "c"))
    }


def with_child(**changes: Any) -> dict[str, Any]:
    value = suite_json()
    return {**value, "children": [{**value["children"][0], **changes}, *value["children"][1:]]}


def with_target(target: str) -> dict[str, Any]:
    value = suite_json()
    value["children"][0]["recipe"]["recipe"]["rule"] = {"target": target, "kwargs": {}}
    return value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "suite.json: this spiketrain reads format version 1; got []"),
        ({"version": 2}, "suite.json: this spiketrain reads format version 1; got 2"),
        (
            suite_json(children=[]),
            "suite.json: children must be a list with at least one entry; got []",
        ),
        (suite_json(children=["a"]), "suite.json: a child must have a run and a recipe; got 'a'"),
        (suite_json(children=[{"run": "a"}]), "suite.json: a child must have a run and a recipe"),
        (
            with_child(recipe={"version": 1, "recipe": {"name": 3}}),
            "suite.json: a recipe's name must be text; got 3",
        ),
        (
            with_child(recipe={"version": 2, "recipe": {"name": "x"}}),
            "recipe.json: needs name, model, rule",
        ),
        *(
            (
                with_child(run=run),
                f"suite.json: a run must be a unique name in the folder of runs; got {run!r}",
            )
            for run in ("..", ".", "", "../elsewhere", "/etc", "a/b", "b/", 3, None, ["a"])
        ),
        (
            suite_json(children=suite_json()["children"][:1] * 2),
            "a run must be a unique name in the folder of runs; got 'a'",
        ),
        (with_child(run="own"), "a run must be a unique name in the folder of runs; got 'own'"),
        (
            suite_json(parent="' OR 1=1"),
            'suite.json: parent must be 32 hex digits; got "\' OR 1=1"',
        ),
        (suite_json(parent=None), "suite.json: parent must be 32 hex digits; got None"),
        *(
            (
                with_child(choice={"field": "optimizer.lr", "trials": trials}),
                f"suite.json: a choice: trials must be tuple[str, ...]; got {trials}",
            )
            for trials in (None, 3)
        ),
        (
            with_child(choice={"field": "optimizer.lr"}),
            "suite.json: a choice: needs field, trials; got no trials",
        ),
        (suite_json(cluster=[]), "suite.json: cluster must be an object; got []"),
        (with_target("os.system"), "recipe.json: os.system is not in a trusted package"),
        (
            with_target("pipeline.recipe.suite.Suite"),
            "pipeline.recipe.suite.Suite is not in a trusted package",
        ),
        (
            suite_json(report="os.system"),
            "suite.json: os.system is not in a trusted package; name its package with --trust",
        ),
        (
            suite_json(report="pipeline.data.write.images.write_fashion"),
            "suite.json: pipeline.data.write.images.write_fashion is not in a trusted",
        ),
        (
            suite_json(report="tests.recipe.test_suite.json.loads"),
            "suite.json: tests.recipe.test_suite.json.loads is not in a trusted package",
        ),
        (
            suite_json(report="tests.recipe.test_suite.none"),
            "suite.json: tests.recipe.test_suite.none does not exist in this installation",
        ),
        (
            suite_json(report="tests.recipe.test_suite.three"),
            "suite: report must be a top-level function",
        ),
        (suite_json(report=3), "suite.json: a dotted name must be text; got 3"),
    ],
)
def test_a_damaged_or_foreign_suite_json_is_refused_in_one_line(
    value: Any, said: str, tmp_path: Path
) -> None:
    folder = written(value, tmp_path)
    with pytest.raises(ValueError, match=f"^{folder}: .*{re.escape(said)}.*$"):
        SuiteFile.read(folder, trust=["tests"])


def written(value: Any, runs: Path) -> Path:
    (runs / "own").mkdir()
    (runs / "own" / "suite.json").write_text(json.dumps(value))
    return runs / "own"


def test_a_run_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    with pytest.raises(ValueError, match=r"own: a run must be a folder; .*/b is a file$"):
        runs_of(written(suite_json(), tmp_path))


def test_nothing_of_ones_own_is_imported_without_trust() -> None:
    with pytest.raises(
        ValueError, match=r"suite\.json: tests\.recipe\.test_suite\.report is not in"
    ):
        SuiteFile.from_json(suite_json())


# ------------------------------------------------------------------------------------- recipe files


def test_a_recipe_file_gives_a_recipe_a_list_or_a_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    head = "from pipeline.recipe.suite import Suite\nfrom tests.helpers.small import small_recipe\n"
    bodies = {
        "of_one": "return small_recipe()",
        "of_two": "return [small_recipe(name='a'), small_recipe(name='b', init='@a')]",
        "of_suite": "return Suite((small_recipe(),), table)\ndef table(runs, console): pass",
    }
    made = {}
    for stem, body in bodies.items():
        (tmp_path / f"{stem}.py").write_text(f"{head}def recipe():\n    {body}\n")
        made[stem] = load_recipe(tmp_path / f"{stem}.py")
        assert len(recipes_of(tmp_path / f"{stem}.py")) == (2 if stem == "of_two" else 1)
    assert made["of_one"] == small_recipe()
    two, suite = made["of_two"], made["of_suite"]
    assert isinstance(two, Suite) and two.report is None
    assert isinstance(suite, Suite) and suite.report is not None
    # The report alone is the file's own here, and running the file was trusting it.
    assert {stem: trust_of(each, [tmp_path / f"{stem}.py"]) for stem, each in made.items()} == {
        "of_one": (),
        "of_two": (),
        "of_suite": ("of_suite",),
    }
    (tmp_path / "twice.py").write_text(
        f"{head}def recipe():\n    return [small_recipe(), small_recipe()]\n"
    )
    said = r"twice\.py: suite: recipes must have different names; got two recipes 'small'"
    with pytest.raises(ValueError, match=said):
        load_recipe(tmp_path / "twice.py")
