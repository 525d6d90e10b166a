"""`spiketrain show`: a recipe with all its values, before anything is launched."""

import json
from collections.abc import Sequence

from rich.console import Console

from pipeline.core.printing import new_console, print_fields, say
from pipeline.core.units import counted
from pipeline.data.base import DataError
from pipeline.forecast.counts import describe_steps
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import Suite, references, refuse_references
from pipeline.train.backend.deepspeed import config
from pipeline.train.build import check_recipe, with_placeholder_weights
from pipeline.train.part_checks import fingerprint_of
from pipeline.train.tasks import build_data
from pipeline.train.weights import study_inputs


def show_recipe(
    made: Recipe | Suite,
    workers: int,
    console: Console | None = None,
    *,
    counts_steps: bool = False,
) -> None:
    """Print a recipe's fields, parameters, study key, global batch and DeepSpeed settings.

    For a suite, the values that all recipes share are printed once, followed by the other values
    of each recipe. Neither data files nor the weights of a reference are needed.

    Args:
        counts_steps: also print the cost of one step of each recipe, counted without running it.
    """
    console = console or new_console()
    if isinstance(made, Recipe):
        refuse_references(made)
        made = Suite((made,))
    with with_placeholder_weights(made) as recipes:
        steps = describe_steps(recipes, workers) if counts_steps else [""] * len(recipes)
        of_each = zip(made.recipes, recipes, steps, strict=True)
        resolved = [_resolved(recipe, ready, workers, step) for recipe, ready, step in of_each]
    fields, lines = (_shared(each) for each in zip(*resolved, strict=True))
    if len(resolved) > 1:
        _print(f"shared by {len(resolved)} recipes", fields, lines, console)
    for recipe, (own_fields, own_lines) in zip(made.recipes, resolved, strict=True):
        if len(resolved) > 1:
            console.print()
            own_fields, own_lines = (
                _without_shared(own_fields, fields),
                _without_shared(own_lines, lines),
            )
        _print(recipe.name, own_fields, own_lines, console)


def _resolved(
    recipe: Recipe, ready: Recipe, workers: int, step: str
) -> tuple[dict[str, str], dict[str, str]]:
    """The recipe's fields, and the values derived from them.

    `ready` is the recipe with files in place of its references.
    """
    network = check_recipe(
        ready.with_untrained_teacher(), workers
    )  # the weights may have to be downloaded
    split = recipe.split(workers)
    parameters = sum(p.numel() for p in network.parameters())
    each = (
        f"{counted(workers, 'worker')} x {counted(split.micro_batch, 'sample')} x"
        f" {split.accumulation} accumulated"
    )
    lines = {
        "parameters": f"{parameters:,}",
        "study key": _study(recipe),
        "global batch": f"{recipe.batch_size} = {each}",
    }
    if step:
        lines["one step"] = step
    if isinstance(rate := recipe.optimizer.kwargs.get("lr"), float):
        lines["learning rate"] = (
            f"{rate:g} for this batch, {rate * 256 / recipe.batch_size:g} for one of 256 samples"
        )
    if recipe.backend == "deepspeed":
        settings = config(
            micro_batch=split.micro_batch,
            workers=workers,
            parameters=parameters,
            zero=recipe.zero,
            precision=recipe.precision,
            clip_norm=recipe.clip_norm,
        )
        lines["DeepSpeed"] = json.dumps(settings, indent=2)
    return recipe.flat(), lines


def _shared(each: Sequence[dict[str, str]]) -> dict[str, str]:
    """The entries that all of them share."""
    return {
        key: value
        for key, value in each[0].items()
        if all(other.get(key) == value for other in each)
    }


def _without_shared(own: dict[str, str], shared: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in own.items() if key not in shared}


def _print(title: str, fields: dict[str, str], lines: dict[str, str], console: Console) -> None:
    say(console, title, style="italic")
    print_fields(console, fields)
    for name, text in lines.items():
        if "\n" in text:  # indented JSON
            console.out(f"{name:<13} {text}", highlight=False)
        else:
            say(console, text, label=f"{name:<13} ")


def _study(recipe: Recipe) -> str:
    if names := references(recipe):
        return f"depends on what {', '.join(names)} will have learnt"
    try:
        return recipe.study_key(study_inputs(recipe, fingerprint_of(build_data(recipe))))
    except DataError as error:
        return f"depends on the data's content, which is not here yet ({error})"
