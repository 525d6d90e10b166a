"""The continual recipes hold the published settings that they name."""

import importlib

import pytest

from pipeline.recipe.recipe import Recipe
from pipeline.rules.hlop import HLOP

PERMUTED = [f"permuted_fashion_hlop_{rule}" for rule in ("bptt", "dsr", "ottt", "sltt")]


def recipe_of(name: str) -> Recipe:
    return importlib.import_module(f"recipes.continual.{name}").recipe()


def published_rows(tasks: int) -> list[tuple[int, ...]]:
    """What the published scripts for permuted MNIST add in each task, written out as they compute
    it.
    """
    first, more = [80, 200, 100], [70, 70, 70]
    rows = [tuple(first)]
    for task in range(1, tasks):
        if task % 3 == 0:
            more = [each - 20 for each in more]
        rows.append(tuple(more))
    return rows


@pytest.mark.parametrize("name", PERMUTED)
def test_ten_permutations_add_the_published_rows(name: str) -> None:
    recipe = recipe_of(name)
    rule = recipe.rule.build()
    assert isinstance(rule, HLOP)
    rows = [rule.rows.of(task) for task in range(len(recipe.phases))]
    assert rows == published_rows(10)
    assert sum(second for _, second, _ in rows[:-1]) == 580
