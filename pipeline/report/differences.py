"""In what two finished runs differ, beyond what a comparison varies: the rule and the seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.recipe.json import differing
from pipeline.recipe.recipe import Role, select
from pipeline.report.runs import recipe_of, summary_of
from pipeline.track.provenance import told_in

__all__ = ["differences", "of_the_study", "trained_apart", "tuned_in", "written"]


def differences(a: Path, b: Path) -> list[tuple[str, Any, Any]]:
    """`(field, value in run a, value in run b)` for all that must be equal and is not; empty when
    the two may be compared.

    Unequal study keys are explained from the two recipes. A path counts by the content that it
    leads to, so it is only named when nothing else explains the keys.
    """
    summaries = summary_of(a) or {}, summary_of(b) or {}
    found = [*trained_apart(*map(told_in, summaries))]
    if summaries[0].get("rule") == summaries[1].get("rule"):
        # One label in the table must be one rule (rescale is not in it) with one value of what was
        # tuned.
        recipes = [recipe_of(folder) for folder in (a, b)]
        found += differing("rule", *(recipe.get("rule") for recipe in recipes))
        for key in tuned_in(recipes[0]):
            found += differing(key, *(written(recipe, key) for recipe in recipes))
    keys = [summary.get("study") for summary in summaries]
    return found if keys[0] == keys[1] else _explained(a, b, summaries, keys) + found


def trained_apart(
    mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Any, Any]]:
    """The fields of what two runs were trained on that are not equal; where one changed on the way,
    in lists: `[2, 1]`.
    """
    if list(mine) != list(theirs):
        yield from list(differing("", _columns(mine), _columns(theirs))) or [
            ("trained_on", mine, theirs)
        ]


def _columns(trained_on: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`hardware.cpu` and the like with what they were, each once; what did not change stands
    alone.
    """
    columns: dict[str, list[Any]] = {}
    for each in trained_on:
        machine = {
            f"hardware.{name}": value for name, value in (each.get("hardware") or {}).items()
        }
        for name, value in {**each, **machine}.items():
            if name != "hardware" and value not in columns.setdefault(name, []):
                columns[name].append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in columns.items()}


def tuned_in(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The dotted keys that each rule has its own value of; none known where the journal alone tells
    of a recipe, as text.
    """
    keys = recipe.get("tuned")
    return tuple(keys) if isinstance(keys, (list, tuple)) else ()


def written(recipe: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key, `optimizer.lr`, of a recipe as JSON, or of flat parameters;
    None where there is none.
    """
    if key in recipe:
        return recipe[key]
    value: Any = recipe
    for name in key.split("."):
        value = value.get("kwargs", value).get(name) if isinstance(value, Mapping) else None
    return value


def of_the_study(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe as JSON that all runs of one study share."""
    return select(recipe, lambda role: Role.STUDY in role)


def _explained(
    a: Path, b: Path, summaries: tuple[dict, dict], keys: list[Any]
) -> list[tuple[str, Any, Any]]:
    recipes = [recipe_of(folder) for folder in (a, b)]
    kept = [{**of_the_study(recipe), "init": recipe.get("init")} for recipe in recipes]
    found = list(differing("", *kept))
    paths = [one for one in found if all(_is_path(value) for value in one[1:])]
    found = [one for one in found if one not in paths]
    contents = [summary.get("data_fingerprint") for summary in summaries]
    if contents[0] != contents[1]:
        found.append(("data_fingerprint", contents[0], contents[1]))
    return found or paths or [("study", keys[0], keys[1])]


def _is_path(value: Any) -> bool:
    """Recipes are written with absolute paths."""
    return value is None or (isinstance(value, str) and value.startswith("/"))
