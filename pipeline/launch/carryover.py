"""What the command carryover does: the causal test of a run's network on its evaluation set, kept beside the run's summary."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pipeline.counts import listed_time_steps
from pipeline.data.base import Data, Grouped
from pipeline.ensemble import CausalTest, Shuffled, causal_test
from pipeline.launch.prepare import read_job
from pipeline.measure.memory import device_here
from pipeline.precision import computing
from pipeline.recipe import Recipe, write_json
from pipeline.tasks import build_data, check_data
from pipeline.units import counted
from pipeline.weights import load_run

STEPS = (1, 2, 4, 8)
FILE = "carryover.json"


def carryover_of_run(
    folder: Path, *, which: str, steps: str | None, micro_batch: int | None, by: str | None, trust: tuple[str, ...]
) -> CausalTest:
    """Test the network of a run of one task; write `carryover.json` into its folder. `by`: the groups that errors are over.

    Raises: ValueError for a run of several tasks, `steps` that are not such as "1,2,4,8", or data without groups to be taken
    `by`; what the data or the test refuse.
    """
    recipe = Recipe.read(folder / "recipe.json", trust=trust)
    if recipe.phases:
        raise ValueError(f"carryover: the run must be of one task; got {counted(len(recipe.phases), 'phase')} in {folder.name}")
    data = build_data(recipe)
    chosen = (
        listed_time_steps("carryover", steps) if steps is not None else (recipe.time_steps,) if len(data.shape) == 4 else STEPS
    )
    groups = _groups(data, by) if by is not None else None
    device = device_here()
    network = load_run(folder, which=which, trust=trust).to(device)
    check_data(data, fingerprint=read_job(folder).data_fingerprint, every_page=True)
    size = micro_batch or max(2, recipe.split(1).micro_batch)
    batches = Shuffled(data=data, micro_batch=size, time_steps=max(chosen), device=device, seed=recipe.seed)
    with computing(device, recipe.precision):  # as in training
        found = causal_test(network, batches, steps=chosen, groups=groups, seed=recipe.seed)
    about = {"run": folder.name, "which": which, "trained_steps": recipe.time_steps, "by": by}
    write_json(folder / FILE, about | asdict(found))
    return found


def _groups(data: Data, by: str) -> list[str]:
    if not isinstance(data, Grouped):
        raise ValueError(
            f"carryover: --by needs data that groups its samples; got --by {by}, and {type(data).__name__} has no groups"
        )
    return data.groups("val", by=by)
