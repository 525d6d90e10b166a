"""What a recipe resolves to, before anything is launched."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from pipeline.backend.deepspeed import config
from pipeline.data.base import DataError
from pipeline.recipe import Recipe
from pipeline.weights import study_inputs
from pipeline.worker import check_recipe


def show_recipe(recipe: Recipe, workers: int, console: Console | None = None) -> None:
    """Print the resolved recipe, its parameters, study key, global batch and DeepSpeed settings; needs no data file."""
    console = console or Console()
    network = check_recipe(recipe.with_untrained_teacher(), workers)  # its weights may have to be downloaded
    split = recipe.split(workers)
    parameters = sum(p.numel() for p in network.parameters())
    table = Table(title=recipe.name, show_header=False, box=None, pad_edge=False)
    for key, value in recipe.flat().items():
        table.add_row(key, value)
    console.print(table)
    console.print(f"parameters    {parameters:,}")
    console.print(f"study key     {_study(recipe)}")
    console.print(
        f"global batch  {recipe.batch_size} = {workers} workers x {split.micro_batch} samples x {split.accumulation} accumulated"
    )
    if isinstance(rate := recipe.optimizer.kwargs.get("lr"), float):
        console.print(f"learning rate {rate:g} for this batch, {rate * 256 / recipe.batch_size:g} for one of 256 samples")
    if recipe.backend == "deepspeed":
        settings = config(
            micro_batch=split.micro_batch,
            workers=workers,
            zero=recipe.zero,
            precision=recipe.precision,
            clip_norm=recipe.clip_norm,
        )
        console.print("DeepSpeed     " + json.dumps(settings, indent=2), soft_wrap=True)


def _study(recipe: Recipe) -> str:
    try:
        return recipe.study_key(study_inputs(recipe, recipe.data.build().fingerprint()))
    except DataError as error:
        return f"depends on the data's content, which is not here yet ({error})"
