"""Launched again under its name, by a scheduler that lost a node: a run goes on if the same is asked of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.launch.cluster import OPERATIONAL, Cluster, differences
from pipeline.recipe import Recipe, read_json
from pipeline.recipe_json import differing, listed, recipe_fields
from pipeline.suite import Suite, SuiteFile, is_suite

MAY_DIFFER = ("workers", "inline", "address", *OPERATIONAL)
"""of a launch: a run goes on where, on as many workers and as it is told now"""


def refuse_unless_launched_so(folder: Path, made: Recipe | Suite, cluster: Cluster, *, trust: tuple[str, ...]) -> None:
    """Refuse to go on with a run or suite that was launched with another recipe, or with other options.

    Raises:
        ValueError: what differs, as it was and as it is asked for now; or a damaged folder.
    """
    rule = f"launch: --or-resume goes on with {folder.name} as it was launched"
    if is_suite(folder) != isinstance(made, Suite):
        there, asked = ("a suite", "one recipe") if is_suite(folder) else ("one run", "a suite")
        raise ValueError(f"{rule}; it is {there}, and now {asked} is asked for")
    found = list(_differences(folder, made, trust=trust))
    if found:
        raise ValueError(f"{rule}; its recipe differs now: {listed(found)}")
    there = read_json(folder / "cluster.json") if isinstance(made, Recipe) else SuiteFile.read(folder, trust=trust).cluster
    was, now = Cluster.from_json(there), cluster
    changed = [told for name, told in differences(was, now).items() if name not in MAY_DIFFER]
    if changed:
        raise ValueError(f"{rule}; its options differ now: {', '.join(changed)}")


def _differences(folder: Path, made: Recipe | Suite, *, trust: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(made, Recipe):
        yield from differing("", recipe_fields(folder), _as_read(made.resolved()))
        return
    was, now = (
        {each.name: each for each in suite.recipes} for suite in (SuiteFile.read(folder, trust=trust).suite, made.resolved())
    )
    if list(was) != list(now):
        yield "recipes", list(was), list(now)
        return
    for name in was:
        yield from differing(name, _as_read(was[name]), _as_read(now[name]))


def _as_read(recipe: Recipe) -> Any:
    """The fields that a reader of recipe.json gets."""
    return json.loads(json.dumps(recipe.to_json()))["recipe"]
