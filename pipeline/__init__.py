"""spiketrain trains spiking neural networks on one or more machines. The recipe names the training
rule, and spiketrain measures the cost of each rule relative to BPTT.

`import pipeline` imports neither torch nor a recipe: each name is imported when it is first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.measure.check import check
    from pipeline.models.foreign.wrap import unwrap, wrap
    from pipeline.recipe.recipe import Phase, Recipe, Spec, spec
    from pipeline.recipe.suite import Choice, Suite
    from pipeline.report.rule_comparison import compare
    from pipeline.report.stores import results
    from pipeline.train.export import load

__all__ = [
    "Choice",
    "Phase",
    "Recipe",
    "Spec",
    "Suite",
    "check",
    "compare",
    "load",
    "results",
    "spec",
    "unwrap",
    "wrap",
]

# The module of each public name.
_MODULES = {
    **dict.fromkeys(("Phase", "Recipe", "Spec", "spec"), "pipeline.recipe.recipe"),
    **dict.fromkeys(("Choice", "Suite"), "pipeline.recipe.suite"),
    "compare": "pipeline.report.rule_comparison",
    "check": "pipeline.measure.check",
    "load": "pipeline.train.export",
    "results": "pipeline.report.stores",
    **dict.fromkeys(("unwrap", "wrap"), "pipeline.models.foreign.wrap"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("spiketrain")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
