"""A suite before its first child has trained: fresh weights stand in for those that its references
will name.

They have the names and shapes of the weights to come, so that everything is checked in advance but
what the values decide."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import Suite, filled, references
from pipeline.train.build import build_network
from pipeline.train.checkpoint import weights_of
from pipeline.train.tasks import tasks_of


@contextmanager
def with_stand_ins(suite: Suite) -> Iterator[tuple[Recipe, ...]]:
    """Its recipes with a file of fresh weights in the place of each reference; the files are gone
    afterwards.

    Raises:
        ValueError: a network that is referred to cannot be built.
    """
    wanted = {name for recipe in suite.recipes for name in references(recipe)}
    files: dict[str, Path] = {}
    recipes: list[Recipe] = []
    with tempfile.TemporaryDirectory(prefix="spiketrain-") as place:
        for recipe in suite.recipes:
            recipes.append(filled(recipe, files.__getitem__))
            if recipe.name in wanted:
                files[recipe.name] = Path(place) / f"{len(recipes)}.safetensors"
                save_file(
                    weights_of(build_network(recipes[-1], tasks_of(recipes[-1]))),
                    files[recipe.name],
                )
        yield tuple(recipes)
