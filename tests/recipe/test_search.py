"""Recipes made into comparisons: over seeds, and with a search that is the same for every rule."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipeline.data.datasets.beton import Beton
from pipeline.models.teachers.network import network_teacher
from pipeline.recipe.recipe import Recipe, spec
from pipeline.recipe.search import join_suites, over_seeds, parse_search, with_tuning
from pipeline.recipe.suite import Suite
from pipeline.report.suite import print_protocols
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.train.distillation import Distillation
from pipeline.train.schedule import milestones
from tests.helpers.small import small_recipe

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def recipe(**changes: Any) -> Recipe:
    """Of data that can hold a part out; nothing is read here."""
    return small_recipe(**{"data": spec(Beton, folder="data/small", classes=10, size=8), **changes})


def two_rules() -> Suite:
    return Suite((recipe(name="bptt", rule=spec(BPTT)), recipe(name="sltt", rule=spec(SLTT))))


def key(recipe: Recipe) -> str:
    return recipe.study_key({"data": "content"})


def test_each_recipe_with_seeds_that_follow_its_own() -> None:
    a, b = small_recipe(name="a", seed=4), small_recipe(name="b", seed=4, rule=spec(BPTT))
    suite = over_seeds(Suite((a, b)), 3)
    assert [(each.name, each.seed) for each in suite.recipes] == [
        (f"{name}-seed{more}", 4 + more) for more in range(3) for name in "ab"
    ]
    assert len({key(each) for each in suite.recipes}) == 1


def test_references_stay_within_a_seed() -> None:
    first = small_recipe(name="first")
    teacher = spec(network_teacher, weights="@first", model=first.model, time_steps=2)
    second = replace(
        first, name="second", init="@first", teacher=teacher, objective=spec(Distillation)
    )
    suite = over_seeds(Suite((first, second)), 2)
    assert [each.init for each in suite.recipes] == [None, "@first-seed0", None, "@first-seed1"]
    taught = suite.recipes[3].teacher
    assert taught is not None and taught.kwargs["weights"] == "@first-seed1"
    assert over_seeds(suite, 1) is suite


def test_every_rule_gets_the_same_search_and_the_tuned_field_leaves_the_key() -> None:
    suite = with_tuning(over_seeds(two_rules(), 2), "optimizer.lr", RATES, report=print_protocols)
    by_protocol = {
        protocol: [each for each in suite.recipes if each.protocol == protocol]
        for protocol in ("shared", "trial", "tuned")
    }
    assert [len(each) for each in by_protocol.values()] == [4, 10, 4]
    for rule in (BPTT, SLTT):
        trials = [each for each in by_protocol["trial"] if each.rule.target is rule]
        assert [
            (each.value_of("optimizer.lr"), each.seed, each.data.kwargs["held_out"])
            for each in trials
        ] == [(rate, 0, 0.1) for rate in RATES]
        for final in (each for each in by_protocol["tuned"] if each.rule.target is rule):
            assert suite.choices[final.name].trials == tuple(each.name for each in trials)
            assert not final.data.kwargs.get("held_out")
    keys = {protocol: {key(each) for each in recipes} for protocol, recipes in by_protocol.items()}
    assert [len(each) for each in (*keys.values(), set.union(*keys.values()))] == [1, 1, 1, 3]
    for protocol, field, is_same in (
        ("tuned", "optimizer.lr", True),
        ("tuned", "optimizer.momentum", False),
        ("shared", "optimizer.lr", False),
    ):
        first = by_protocol[protocol][0]
        assert (key(first.override({field: 0.7})) == key(first)) == is_same
    assert {each.searched for each in suite.recipes if each.protocol != "shared"} == {
        tuple(sorted(map(str, RATES)))
    }
    # Two searches are two studies. The same values as ints and in another order are one search.
    for values, is_same in (((*RATES[:-1], 77.0), False), ((1, *RATES[-2::-1]), True)):
        again = with_tuning(over_seeds(two_rules(), 2), "optimizer.lr", values).recipes
        found = {key(each) for each in again if each.protocol == "tuned"}
        assert (found == keys["tuned"]) == is_same
    assert suite.report is print_protocols
    assert {each.evaluation.every for each in suite.recipes} == {0}  # the test set is read once


def test_a_tuned_field_may_be_one_that_is_written_only_where_it_is_not_zero() -> None:
    suite = with_tuning(
        Suite((recipe(name="a", ema_decay=0.5),)), "ema_decay", (0.0, 0.5, 0.9, 0.99, 0.999)
    )
    assert len({key(each) for each in suite.recipes if each.protocol == "trial"}) == 1


def test_networks_of_one_rule_are_searched_apart() -> None:
    networks = Suite((recipe(name="narrow"), recipe(name="wide", time_steps=5)))
    suite = with_tuning(networks, "optimizer.lr", RATES)
    assert len(suite.recipes) == 2 + 10 + 2
    assert not set(suite.choices["wide-tuned"].trials) & set(suite.choices["narrow-tuned"].trials)


def test_a_search_as_it_is_written_on_the_command_line() -> None:
    assert [
        parse_search(text) for text in ("optimizer.lr=.03, 1,3e-1", "schedule.at=[.3],[.3, .6]")
    ] == [("optimizer.lr", [0.03, 1, 0.3]), ("schedule.at", [[0.3], [0.3, 0.6]])]


def test_a_search_over_lists_has_a_plain_name_for_each_and_no_list_twice() -> None:
    base = Suite((recipe(schedule=spec(milestones, at=(0.5,))),))
    lists = [[0.3], [0.5], [0.6], [0.7], [0.3, 0.6]]
    trials = [
        each for each in with_tuning(base, "schedule.at", lists).recipes if each.protocol == "trial"
    ]
    assert [each.value_of("schedule.at") for each in trials] == [tuple(each) for each in lists]
    assert trials[-1].name == "small-at-0.3_0.6"
    with pytest.raises(ValueError, match="at needs at least 5 different values"):
        with_tuning(base, "schedule.at", [*lists, [0.3, 0.6]])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: over_seeds(two_rules(), 0), "launch: --seeds must be at least 1; got 0"),
        (
            lambda: over_seeds(replace(two_rules(), report=print_protocols), 2),
            "launch: a suite with its own report or choices must be launched without --seeds",
        ),
        (
            lambda: join_suites([two_rules(), replace(two_rules(), report=print_protocols)]),
            "must be launched without other files",
        ),
        (
            lambda: join_suites([two_rules(), two_rules()]),
            "suite: recipes must have different names; got two recipes 'bptt'",
        ),
        (
            lambda: with_tuning(two_rules(), "optimizer.lr", RATES[:4]),
            "tuned: optimizer.lr needs at least 5 different values; got",
        ),
        (
            lambda: with_tuning(two_rules(), "optimizer.lr", (*RATES[:4], 0.1)),
            "needs at least 5 different values",
        ),
        (
            lambda: with_tuning(two_rules(), "optimizer.betas", RATES),
            "recipe: optimizer.betas must be written in the recipe",
        ),
        (lambda: with_tuning(two_rules(), "speed", RATES), "recipe: no field 'speed'"),
        (
            lambda: with_tuning(
                Suite((recipe(name="first"), recipe(name="second", init="@first"))),
                "optimizer.lr",
                RATES,
            ),
            "searched only for recipes without references; second has '@first'",
        ),
        (
            lambda: with_tuning(
                Suite((recipe().override({"data.held_out": 0.2}),)), "optimizer.lr", RATES
            ),
            "small must not set data.held_out, which its trials set; got 0.2",
        ),
        (
            lambda: with_tuning(two_rules(), "optimizer.lr", RATES).override({"optimizer.lr": 1.0}),
            "optimizer.lr is chosen by trials",
        ),
        (
            lambda: with_tuning(two_rules(), "seed", (1, 2, 3, 4, 5)),
            "tuned must name fields that the study key covers; got seed",
        ),
        (lambda: with_tuning(two_rules(), "rule.k", (1, 2, 3, 4, 5)), "k"),
        (lambda: parse_search("optimizer.lr"), "--tune: must look like optimizer.lr="),
        (lambda: parse_search("optimizer.lr=1,,2"), "--tune: must look like optimizer.lr="),
        (lambda: parse_search("rule.k=1],[2"), "--tune: must look like optimizer.lr="),
        (lambda: parse_search("rule.k={[]}"), "--tune: must look like optimizer.lr="),
        (lambda: small_recipe(protocol="tuned"), "recipe: tuned must name fields if"),
        (
            lambda: small_recipe(tuned=("optimizer.lr",)),
            "recipe: tuned must name fields if",
        ),
        (
            lambda: small_recipe(searched=("0.1",)),
            "recipe: searched needs a field in tuned; got",
        ),
        (
            lambda: small_recipe(protocol="tuned", tuned=("optimizer.beta",)),
            "optimizer.beta must be written in the recipe",
        ),
    ],
)
def test_what_makes_no_fair_comparison_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make()
