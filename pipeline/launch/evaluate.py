"""`spiketrain evaluate`: the accuracy of a trained network on the whole evaluation set, and the
energy of an inference.
"""

import time
from contextlib import closing
from pathlib import Path

from torch import nn

from pipeline.core.checks import require
from pipeline.core.printing import new_console, say
from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.core.torch_settings import computing
from pipeline.core.units import counted
from pipeline.launch.prepare import read_job
from pipeline.measure.constants import ACTIVITY_EVERY
from pipeline.measure.energy import EnergyCounter, describe_inference, joules_per_sample
from pipeline.measure.memory import device_here
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import Suite
from pipeline.train.backend.collectives import Ranks
from pipeline.train.build import build_network
from pipeline.train.evaluation import (
    Evaluation,
    EvaluationOutput,
    evaluate,
    evaluation_batches,
    mean_over_tasks,
)
from pipeline.train.export import is_export, load_export
from pipeline.train.part_checks import check_network
from pipeline.train.tasks import Loaders, build_data, check_data, tasks_of
from pipeline.train.transfer import move_network
from pipeline.train.weights import load_run, load_weights


def evaluate_run(
    folder: Path,
    *,
    which: str | None,
    weights: Path | None,
    time_steps: int | None,
    trust: tuple[str, ...],
) -> None:
    """Print the accuracy of a run's network, on all evaluation data of the run.

    Args:
        which: the checkpoint that has the weights; "last" by default.
        weights: a file with other weights.

    Raises:
        ValueError: `which` and `weights` are both given, the weights do not fit, or the data is
            refused.
    """
    require(
        which is None or weights is None,
        "evaluate: --weights replace the checkpoint, so --which must not be given as well; got"
        f" --which {which}",
    )
    recipe = Recipe.read(RunFolder(folder).recipe, trust=trust)
    if weights is None:
        which = which or "last"
        network, source = load_run(folder, which=which, trust=trust), which
    else:
        network, source = _with_weights(recipe, weights, trust=trust), weights.name
    check_data(build_data(recipe), fingerprint=read_job(folder).data_fingerprint, every_page=True)
    _print_accuracy(network, recipe, f"{folder.name} ({source}", time_steps)


def evaluate_recipe(
    recipe: Recipe | Suite,
    *,
    which: str | None,
    weights: Path | None,
    time_steps: int | None,
    own: tuple[str, ...],
    trust: tuple[str, ...],
) -> None:
    """Print the accuracy of a recipe's network with the weights of a file. No run is needed.

    Args:
        own: the recipe file's own module, if the network is defined there.
        trust: the packages that the user trusts.

    Raises:
        ValueError: an option is missing or refused, the recipe is a suite, the weights do not fit,
            or the data is refused.
    """
    if weights is None or which is not None:
        got = "no --weights" if weights is None else f"--which {which}"
        raise ValueError(
            "evaluate: a recipe has no checkpoints, so --weights FILE must be given without"
            f" --which; got {got}"
        )
    if isinstance(recipe, Suite):
        raise ValueError(
            "evaluate: --weights are the weights of one network, so the file must have one recipe;"
            f" got {', '.join(each.name for each in recipe.recipes)}"
        )
    network = _with_weights(recipe, weights, trust=(*trust, *own))
    require(  # errors of the file come first
        not trust or is_export(weights),
        "evaluate: --trust must only be given with a file of spiketrain export, which names the"
        f" code of its network; got --trust {' --trust '.join(trust)} with {weights}",
    )
    build_data(recipe).check()
    _print_accuracy(network, recipe, f"{recipe.name} ({weights.name}", time_steps)


def _with_weights(recipe: Recipe, file: Path, *, trust: tuple[str, ...]) -> nn.Module:
    if is_export(file):
        return load_export(file, model=recipe.model, trust=trust)
    return load_weights(build_network(recipe, tasks_of(recipe)), file)


def _print_accuracy(
    network: nn.Module, recipe: Recipe, line_prefix: str, time_steps: int | None
) -> None:

    console, steps, device = new_console(), time_steps or recipe.time_steps, device_here()
    tasks = tasks_of(recipe, device=device)
    tasks[0].choose_head(network)
    check_network(network, recipe, tasks[0].data)
    move_network(network, device)
    loaders, evaluated = Loaders(tasks, recipe, recipe.split(1)), list[EvaluationOutput]()
    energy_counter = EnergyCounter(device)
    for index, task in enumerate(loaders.tasks):
        start = time.monotonic()
        say_stage("evaluating; a machine's first start compiles the data loader")
        task.choose_head(network)
        with closing(loaders.val(index)) as val_set, computing(device, recipe.precision):
            evaluated.append(
                evaluate(
                    network,
                    evaluation_batches(val_set, steps, Ranks(device=str(device))),
                    recipe.objective.build().labels,
                    over_time=recipe.over_time,
                    counts_operations=True,
                    energy_counter=energy_counter,
                )
            )
        task_name = f", {task.name}" if recipe.phases else ""
        say(
            console,
            f"{line_prefix}, T = {steps}{task_name}): {_describe(evaluated[-1].result)}; evaluated"
            f" in {time.monotonic() - start:.1f} s",
        )
    if recipe.phases:
        say(
            console,
            f"{line_prefix}, T = {steps}, mean of {counted(len(evaluated), 'task')}):"
            f" {_describe(mean_over_tasks([each.result for each in evaluated]))}",
        )
    last = evaluated[-1]
    assert last.inference is not None, "an evaluation of one worker has samples"
    inference = last.inference.to_dict(joules_per_sample([last.readings]))
    say(console, describe_inference(inference, on_gpu=device.type == "cuda"))


def _describe(result: Evaluation) -> str:
    top5 = "" if result.top5 is None else f"top-5 {result.top5:.2%}, "
    return (
        f"top-1 {result.top1:.2%}, {top5}loss {result.loss:.4f} on"
        f" {counted(result.samples, 'sample')}, firing rate {result.firing_rate:.4f} on 1 of"
        f" {ACTIVITY_EVERY} samples"
    )
