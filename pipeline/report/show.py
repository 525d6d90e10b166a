"""What a recipe resolves to, before anything is launched."""

from __future__ import annotations

import json

from rich.console import Console

from pipeline.backend.deepspeed import config
from pipeline.build import check_recipe
from pipeline.data.base import DataError
from pipeline.part_checks import fingerprint_of
from pipeline.printing import new_console, print_fields, say
from pipeline.recipe import Recipe
from pipeline.stand_in import with_stand_ins
from pipeline.suite import Suite, references, refuse_references
from pipeline.tasks import build_data
from pipeline.weights import study_inputs


def show_recipe(made: Recipe | Suite, workers: int, console: Console | None = None) -> None:
    """Print a recipe, or each of a suite: resolved, its parameters, study key, global batch and DeepSpeed settings.

    No data file is needed, nor what a reference names.
    """
    console = console or new_console()
    if isinstance(made, Recipe):
        refuse_references(made)
        _show(made, made, workers, console)
        return
    with with_stand_ins(made) as recipes:
        for recipe, ready in zip(made.recipes, recipes, strict=True):
            _show(recipe, ready, workers, console)


def _show(recipe: Recipe, ready: Recipe, workers: int, console: Console) -> None:
    """`ready` is the recipe with files in the place of its references."""
    network = check_recipe(ready.with_untrained_teacher(), workers)  # its weights may have to be downloaded
    split = recipe.split(workers)
    parameters = sum(p.numel() for p in network.parameters())
    say(console, recipe.name, style="italic")
    print_fields(console, recipe.flat())
    say(console, f"{parameters:,}", label="parameters    ")
    say(console, _study(recipe), label="study key     ")
    batch = f"{recipe.batch_size} = {workers} workers x {split.micro_batch} samples x {split.accumulation} accumulated"
    say(console, batch, label="global batch  ")
    if isinstance(rate := recipe.optimizer.kwargs.get("lr"), float):
        told = f"{rate:g} for this batch, {rate * 256 / recipe.batch_size:g} for one of 256 samples"
        say(console, told, label="learning rate ")
    if recipe.backend == "deepspeed":
        settings = config(
            micro_batch=split.micro_batch,
            workers=workers,
            parameters=parameters,
            zero=recipe.zero,
            precision=recipe.precision,
            clip_norm=recipe.clip_norm,
        )
        console.out("DeepSpeed     " + json.dumps(settings, indent=2), highlight=False)


def _study(recipe: Recipe) -> str:
    if names := references(recipe):
        return f"depends on what {', '.join(names)} will have learnt"
    try:
        return recipe.study_key(study_inputs(recipe, fingerprint_of(build_data(recipe))))
    except DataError as error:
        return f"depends on the data's content, which is not here yet ({error})"
