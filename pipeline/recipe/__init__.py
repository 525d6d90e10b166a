"""Training runs as values: recipes, their parts, and suites of several recipes.

    from pipeline.recipe import Recipe, spec

The import needs the standard library only.
"""

from pipeline.recipe.phases import Phase
from pipeline.recipe.recipe import Checkpointing, Evaluation, Policy, Recipe
from pipeline.recipe.search import BASELINE, is_baseline
from pipeline.recipe.spec import Spec, spec
from pipeline.recipe.suite import Choice, Suite

__all__ = [
    "BASELINE",
    "Checkpointing",
    "Choice",
    "Evaluation",
    "Phase",
    "Policy",
    "Recipe",
    "Spec",
    "Suite",
    "is_baseline",
    "spec",
]
