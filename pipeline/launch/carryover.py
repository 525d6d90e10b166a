"""What the command carryover does: the causal test of a run's network on its evaluation set, kept beside the run's summary."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch

from pipeline.backend.base import autocast
from pipeline.data.base import Data
from pipeline.ensemble import CausalTest, causal_test, from_both_halves, training_examples
from pipeline.launch.drive import read_job
from pipeline.recipe import Recipe, write_json
from pipeline.weights import load_run
from pipeline.worker import check_data

STEPS = (1, 2, 4, 8)
FILE = "carryover.json"


def carryover_of_run(
    folder: Path, *, which: str, steps: str | None, micro_batch: int | None, trust: tuple[str, ...]
) -> CausalTest:
    """Test the network of a run of one task; write `carryover.json` into its folder.

    Raises: ValueError for a run of several tasks, or `steps` that are not such as "1,2,4,8"; what the data or the test refuse.
    """
    recipe = Recipe.read(folder / "recipe.json", trust=trust)
    if recipe.phases:
        raise ValueError(f"carryover: the run must be of one task; got {len(recipe.phases)} phases in {folder.name}")
    data: Data = recipe.data.build()
    chosen = _parsed(steps) if steps is not None else (recipe.time_steps,) if len(data.shape) == 4 else STEPS
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_run(folder, which=which, trust=trust).to(device)
    check_data(data, read_job(folder), every_page=True)
    size = micro_batch or max(2, recipe.split(1).micro_batch)
    with (
        closing(from_both_halves(data, size, max(chosen), device)) as batches,
        closing(training_examples(data, size, max(chosen), device, seed=recipe.seed)) as examples,
        autocast(device, recipe.precision),  # as in training
    ):
        found = causal_test(network, batches, examples, steps=chosen, seed=recipe.seed)
    write_json(folder / FILE, {"run": folder.name, "which": which, "trained_steps": recipe.time_steps, **asdict(found)})
    return found


def _parsed(steps: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in steps.split(","))
    except ValueError:
        raise ValueError(f"carryover: --steps must be numbers of time steps, such as 1,2,4,8; got {steps!r}") from None
