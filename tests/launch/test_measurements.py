"""The measurements of a suite: made once, on the machine of the runs, and read by the report."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.forecast import rule_timing
from pipeline.launch.suite import make_missing_measurements
from pipeline.measure.memory import device_here, hardware
from pipeline.recipe.recipe import Recipe, spec, write_json
from pipeline.recipe.suite import Measurement, Suite, SuiteFile, measured_in
from pipeline.rules.bptt import BPTT
from pipeline.track.run_state import done_entries, suite_entries
from tests.helpers.small import small_recipe

RECIPES = (small_recipe(name="sltt"), small_recipe(name="bptt", rule=spec(BPTT)))
NAMES = tuple(recipe.name for recipe in RECIPES)


def report(runs: Any, console: Any) -> None:
    pass


def suite_of(*measurements: Measurement) -> Suite:
    return Suite(RECIPES, report, measurements=measurements)


SWEEP = Measurement("by-t", "sweep", NAMES, {"steps": [2, 3]})


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    def make(suite: Suite, **machine: Any) -> Path:
        folder = tmp_path / "suite"
        folder.mkdir()
        SuiteFile(suite=suite.resolved(), runs=NAMES, parent="0" * 32, cluster={}).write(folder)
        here = {**hardware(device_here()), "threads": 1, **machine}
        for recipe in RECIPES:
            run = tmp_path / recipe.name
            run.mkdir()
            write_json(run / "recipe.json", recipe.resolved().to_json())
            write_json(
                run / "summary.json",
                {"world_size": 2, "micro_batch": 4, "hardware": here, "own_cores": False},
            )
        return folder

    return make


def found_in(folder: Path) -> dict[str, Any]:
    return {name: json.loads(file.read_text()) for name, file in measured_in(folder).items()}


@pytest.mark.full
def test_a_sweep_is_measured_once_and_is_an_entry_beside_the_runs(made: Callable) -> None:
    suite = suite_of(SWEEP)
    folder = made(suite)
    assert [*suite_entries(folder)] == ["sltt", "bptt", "by-t"] and [*done_entries(folder)] == [
        *NAMES
    ]
    make_missing_measurements(folder, suite, trust=())
    points = found_in(folder)["by-t"]["points"]
    assert {(point["cost"]["rule"], point["time_steps"]) for point in points} >= {
        ("BPTT", 2),
        ("BPTT", 3),
        ("SLTT-2", 2),
        ("SLTT-2", 3),
    }
    assert [*done_entries(folder)] == ["sltt", "bptt", "by-t"]
    write_json(measured_in(folder)["by-t"], {"kept": True})
    make_missing_measurements(folder, suite, trust=())
    assert found_in(folder) == {"by-t": {"kept": True}}


def test_rules_take_turns_as_the_runs_were_trained(
    made: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def measure(recipe: Recipe, rules: list[Any], **about: Any) -> dict[str, Any]:
        asked.append((recipe.name, [rule.label for rule in rules], about))
        return {}

    monkeypatch.setattr(rule_timing, "measure_interleaved", measure)
    suite = suite_of(Measurement("in-turn", "interleaved", NAMES))
    make_missing_measurements(made(suite), suite, trust=())
    assert asked == [
        (
            "sltt",
            [recipe.rule.label for recipe in RECIPES],
            {"workers": 2, "samples": 4, "threads": 1},
        )
    ]


def test_a_plan_is_of_a_recipe_that_the_suite_does_not_train(made: Callable) -> None:
    suite = suite_of(
        Measurement(
            "card",
            "plan",
            (replace(RECIPES[1], name="other"),),
            {"device": "v100", "samples": 64, "workers": 1},
        )
    )
    folder = made(suite, cpu="another")
    make_missing_measurements(folder, suite, trust=())
    assert [each["rule"] for each in found_in(folder)["card"]["rules"]] == ["BPTT"]


@pytest.mark.parametrize(
    ("machine", "options", "why"),
    [
        (
            {"cpu": "another"},
            {},
            "the runs must have been trained on this hardware; got cpu another, here ",
        ),
        ({}, {"steps": []}, "sweep: steps must be numbers of time steps, from 1; got []"),
    ],
)
def test_what_cannot_be_measured_says_why_and_is_over(
    made: Callable, machine: dict[str, Any], options: dict[str, Any], why: str
) -> None:
    suite = suite_of(Measurement("by-t", "sweep", NAMES, options))
    folder = made(suite, **machine)
    make_missing_measurements(folder, suite, trust=())
    assert found_in(folder)["by-t"]["refused"].startswith(why) and "by-t" in done_entries(folder)


def test_a_suite_file_has_its_measurements(made: Callable) -> None:
    suite = suite_of(
        SWEEP, Measurement("card", "plan", (replace(RECIPES[0], name="other"),), {"device": "v100"})
    )
    assert (
        SuiteFile.read(made(suite), trust=("tests",)).suite.measurements
        == suite.resolved().measurements
    )
    assert suite.tiny().measurements == ()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (
            lambda: Measurement("a", "else", ("sltt",)),
            "suite: a measurement needs recipes and one of the kinds sweep, inter",
        ),
        (
            lambda: Measurement("a", "sweep", ()),
            "suite: a measurement needs recipes and one of the kinds sweep, inter",
        ),
        (
            lambda: Measurement("../a", "sweep", ("sltt",)),
            "suite: a measurement's name must have only",
        ),
        (
            lambda: suite_of(replace(SWEEP, of=("no",))),
            "unique name and recipes of the suite; got by-t with unknown recipes: no",
        ),
        (lambda: suite_of(replace(SWEEP, name="sltt")), "must have a unique name"),
        (
            lambda: Suite(RECIPES, measurements=(Measurement("a", "interleaved", NAMES),)),
            "measurements other than sweeps need a report",
        ),
    ],
)
def test_wrong_measurements_are_refused(wrong: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        wrong()
