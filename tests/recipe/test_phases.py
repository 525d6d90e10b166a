"""Phases: written in a recipe, kept through JSON, and a clock that needs the step alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.datasets.beton import Beton
from pipeline.data.datasets.synthetic import Synthetic
from pipeline.data.datasets.tasks import Permuted, SplitClasses
from pipeline.recipe.phases import Phase, stretch_at, timetable
from pipeline.recipe.recipe import Recipe, spec
from tests.recipe.test_recipe import small

TASKS = tuple(Phase(name=f"task-{task}", data=spec(Permuted, task=task)) for task in range(4))


def with_files(data: Any, folder: Path) -> Any:
    """A task of files of its own, beside the recipe's."""
    return data


# -------------------------------------------------------------------------------------- in a recipe


def test_phases_are_the_same_after_json() -> None:
    last = Phase(name="last", data=spec(SplitClasses, task=0, order=(1, 0)), epochs=3)
    recipe = small(phases=(*TASKS[:2], last))
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe and again.phases[2].epochs == 3
    assert again.phases[1].data.build(Synthetic(shape=(1, 4, 4))).order.tolist() != list(range(16))


def test_the_study_key_covers_phases() -> None:
    recipes = [
        small(),
        small(phases=TASKS[:2]),
        small(phases=TASKS[:3]),
        small(phases=(TASKS[1], TASKS[0])),
        small(phases=(TASKS[0], replace(TASKS[1], epochs=2))),
        small(phases=(TASKS[0], replace(TASKS[1], data=spec(Permuted, task=1, seed=1)))),
    ]
    assert len({recipe.study_key({"data": "abc"}) for recipe in recipes}) == len(recipes)
    tasks = [replace(TASKS[0], data=spec(with_files, folder=folder)) for folder in ("a", "b")]
    assert len({small(phases=(task,)).study_key({"data": "abc"}) for task in tasks}) == 1


def test_every_path_of_a_resolved_recipe_is_absolute() -> None:
    recipe = small(
        data=spec(Beton, folder="data/x", classes=10, size=28),
        phases=(TASKS[0], Phase(name="other", data=spec(with_files, folder="data/y"))),
        init="runs/a",
    ).resolved()
    own, of_phase = (each.data.kwargs["folder"] for each in (recipe, recipe.phases[1]))
    assert [own, of_phase, recipe.init] == [
        str(Path(path).absolute()) for path in ("data/x", "data/y", "runs/a")
    ]
    assert recipe.phases[0] == TASKS[0]


def test_tiny_keeps_two_tasks_and_four_steps() -> None:
    tiny = small(phases=(replace(TASKS[0], epochs=9), *TASKS[1:])).tiny()
    assert (tiny.phases, tiny.stop_after) == (TASKS[:2], 2)
    assert small(phases=TASKS[:1]).tiny().stop_after == small().tiny().stop_after == 4


def test_a_table_of_parameters_names_each_phase() -> None:
    assert small(phases=TASKS[:2]).flat().items() >= {
        ("phases.1.name", "task-1"),
        ("phases.1.data", "pipeline.data.datasets.tasks.Permuted"),
        ("phases.1.data.task", "1"),
    }


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Phase(name=" ", data=spec(Permuted, task=0)), "phase: name must be text"),
        (lambda: Phase(name="a", data=Permuted), "phase a: data must be spec"),
        (
            lambda: Phase(name="a", data=spec(Permuted, data=spec(Synthetic), task=0)),
            "data must not set 'data', which receives the recipe's data",
        ),
        (
            lambda: Phase(name="a", data=spec(Permuted, task=0), epochs=0),
            "epochs must be None or a whole number from 1; got 0",
        ),
        (
            lambda: Phase(name="a", data=spec(Permuted, task=0), head=-1),
            "head must be None or a whole number from 0; got -1",
        ),
        (lambda: Phase(name="a", data=spec(Permuted, task=0), head=True), "got True"),
        (lambda: small(phases=(TASKS[0], TASKS[0])), "different names; got task-0, task-0"),
        (lambda: small(phases=(TASKS[0], replace(TASKS[1], head=0))), "got none for task-0"),
        (lambda: small(phases=(spec(Permuted, task=0),)), "phases must be written as Phase"),
        (lambda: small(phases=3), "phases must be tuple"),
        (
            lambda: small(phases=TASKS).override({"phases.0.epochs": 2}),
            "must be changed in the recipe file; got phases.0.epochs: change data or",
        ),
    ],
)
def test_refuses(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_phases_in_json_are_checked_too() -> None:
    value = small(phases=TASKS[:2]).to_json()
    value["recipe"]["phases"][1]["kwargs"]["name"] = "task-0"
    with pytest.raises(ValueError, match="different names"):
        Recipe.from_json(value)
    value["recipe"]["phases"][1] = {
        "value": "pipeline.recipe.phases.inspect.getsource",
        "kwargs": {},
    }
    with pytest.raises(ValueError, match="not in a trusted package"):
        Recipe.from_json(value)


# ---------------------------------------------------------------------------------------- the clock


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=5),
    st.none() | st.integers(1, 12),
)
def test_every_step_has_its_phase_epoch_and_place(
    lengths: list[tuple[int, int]], stop_after: int | None
) -> None:
    stretches = timetable(lengths, stop_after=stop_after)
    expected = []  # (phase, epoch over the run, step within the epoch), by counting
    epochs_before = 0
    for index, (epochs, epoch_steps) in enumerate(lengths):
        inside = [
            (index, epochs_before + epoch, place)
            for epoch in range(epochs)
            for place in range(epoch_steps)
        ]
        inside = inside[: stop_after or len(inside)]
        expected += inside
        epochs_before = inside[-1][1] + 1
    assert stretches[-1].end == len(expected)
    for step, (index, epoch, place) in enumerate(expected):
        stretch = stretch_at(stretches, step)
        assert (stretch.index, stretch.epoch(step)) == (index, epoch)
        assert step - stretch.epoch_start(epoch) == place
        is_last = step + 1 == len(expected) or expected[step + 1][:2] != (index, epoch)
        assert (stretch.epoch_end(epoch) == step + 1) == is_last
    assert stretch_at(stretches, len(expected)) is stretches[-1]


def test_one_stretch_is_a_run_without_phases() -> None:
    [stretch], [short] = timetable([(3, 8)]), timetable([(3, 8)], stop_after=10)
    assert [stretch.epoch(step) for step in (0, 7, 8, 23, 24)] == [0, 0, 1, 2, 3]
    assert (stretch.first, stretch.end, short.end, short.epoch_end(1)) == (0, 24, 10, 10)
