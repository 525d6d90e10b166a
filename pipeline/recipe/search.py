"""Fair comparisons: several seeds, and a search for each rule's best value of a field.

    over_seeds(suite, 3)
        every recipe with three seeds: its own, which is 0 by default, and the next two
    with_tuning(suite, "optimizer.lr", (.03, .1, .3, 1., 3.))
        the same recipes, and every rule with its own best of the five values

Under the protocol `shared` only the rule differs. Under `tuned` every rule, the baseline included,
gets the same values and the same number of trials. Trials never see the evaluation set: they train
on nine tenths of the training set and are judged on the rest. The values are part of the
study (`Recipe.searched`), so runs whose searches tried different values are not compared.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

from pipeline.core.checks import require
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.spec import reference_to
from pipeline.recipe.suite import Choice, Report, Suite, fill_references, references

BASELINE = "BPTT"  # the rule that other rules are compared with
MIN_VALUES = 5
HELD_OUT = 0.1


def is_baseline(rule: str, baseline: str = BASELINE) -> bool:
    """Whether a rule is the baseline. BPTT in slices of time counts as BPTT."""
    return rule == baseline or (baseline == BASELINE and rule.startswith(f"{BASELINE}-chunk-"))


def join_suites(suites: Sequence[Suite]) -> Suite:
    """One suite of the recipes of several suites.

    Raises:
        ValueError: two recipes have the same name, or one of several suites has a report or
            choices.
    """
    if len(suites) == 1:
        return suites[0]
    for suite in suites:
        _refuse_unless_plain(suite, "other files")
    return Suite(tuple(recipe for suite in suites for recipe in suite.recipes))


def parse_search(text: str) -> tuple[str, list[Any]]:
    """The field and the values of `optimizer.lr=.03,.1,.3,1,3` or `schedule.at=[.3],[.3,.6]`.

    Raises:
        ValueError: the text has another form, or a value is not a Python literal.
    """
    field, _, values = text.partition("=")
    try:
        parsed = ast.literal_eval(f"[{values}]")
    # literal_eval raises all of these for text that is not a literal.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        parsed = []
    require(
        field.strip() and isinstance(parsed, list) and parsed,
        f"--tune: must look like optimizer.lr=0.03,0.1,0.3,1.0,3.0; got {text!r}",
    )
    return field.strip(), parsed


def over_seeds(suite: Suite, count: int) -> Suite:
    """The suite with `count` copies of each recipe, with consecutive seeds.

    The n-th copy of a recipe refers to the n-th copies of other recipes.

    Raises:
        ValueError: `count` is below 1, or is above 1 for a suite with a report or choices, which
            name recipes.
    """
    require(count >= 1, f"launch: --seeds must be at least 1; got {count}")
    if count == 1:
        return suite
    _refuse_unless_plain(suite, "--seeds")
    return Suite(
        tuple(
            _with_seed_offset(recipe, offset) for offset in range(count) for recipe in suite.recipes
        )
    )


def with_tuning(
    suite: Suite, field: str, values: Sequence[Any], *, report: Report | None = None
) -> Suite:
    """Add trials to a suite, and a copy of each recipe with the best value of its trials.

    Recipes that differ only in name and seed share their trials. Each value has one trial, with the
    seed of the first recipe. All recipes are evaluated after their last epoch only.

    Args:
        report: prints the results, such as `pipeline.report.suite.print_protocols`; see `Suite`.

    Raises:
        ValueError: fewer than 5 values, or a repeated value; a suite with a report or choices; a
            recipe without the field or with a reference; data without `held_out`, or with a value
            for it.
    """
    error_prefix = f"tuned: {field}"
    _refuse_unless_plain(suite, "--tune")
    require(
        len(values) >= MIN_VALUES and not any(a == b for a, b in combinations(values, 2)),
        f"{error_prefix} needs at least {MIN_VALUES} different values; got"
        f" {', '.join(map(str, values))}",
    )
    # The text of 1 and 1.0 must be equal.
    texts = (str(float(each)) if type(each) is int else str(each) for each in values)
    search = {"tuned": (field,), "searched": tuple(sorted(texts))}
    trials: dict[str, list[Recipe]] = {}
    finals: list[Recipe] = []
    choices: dict[str, Choice] = {}
    for recipe in suite.recipes:
        if names := references(recipe):
            raise ValueError(
                f"{error_prefix} can be searched only for recipes without references;"
                f" {recipe.name} has '@{names[0]}'"
            )
        key = json.dumps(replace(recipe, name="-", seed=0).to_json(), sort_keys=True)
        shared_trials = trials.setdefault(key, [])
        if not shared_trials:
            shared_trials += [_trial(recipe, field, value, search) for value in values]
        final = replace(
            _evaluate_once(recipe), name=f"{recipe.name}-tuned", protocol="tuned", **search
        )
        choices[final.name] = Choice(field, tuple(trial.name for trial in shared_trials))
        finals.append(final)
    return Suite(
        (
            *map(_evaluate_once, suite.recipes),
            *chain.from_iterable(trials.values()),
            *finals,
        ),
        report,
        choices,
    )


def _trial(recipe: Recipe, field: str, value: Any, search: Mapping[str, Any]) -> Recipe:
    require(
        not recipe.data.kwargs.get("held_out"),
        f"tuned: {recipe.name} must not set data.held_out, which its trials set; got"
        f" {recipe.data.kwargs.get('held_out')}",
    )
    name = f"{recipe.name}-{field.rpartition('.')[2]}-{_name_part(value)}"
    return replace(
        _evaluate_once(recipe.override({field: value, "data.held_out": HELD_OUT})),
        name=name,
        protocol="trial",
        **search,
    )


def _evaluate_once(recipe: Recipe) -> Recipe:
    return recipe.override({"evaluation.every": 0})


def _name_part(value: Any) -> str:
    """The value as part of a folder's name: 0.3_0.6 for [0.3, 0.6]."""
    return "_".join(map(_name_part, value)) if isinstance(value, (list, tuple)) else str(value)


def _with_seed_offset(recipe: Recipe, offset: int) -> Recipe:
    return replace(
        fill_references(recipe, lambda name: reference_to(f"{name}-seed{offset}")),
        name=f"{recipe.name}-seed{offset}",
        seed=recipe.seed + offset,
    )


def _refuse_unless_plain(suite: Suite, option: str) -> None:
    require(
        suite.report is None and not suite.choices,
        f"launch: a suite with its own report or choices must be launched without {option}",
    )
