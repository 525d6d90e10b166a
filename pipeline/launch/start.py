"""What the commands launch, resume and evaluate do with one run, told as a story; the parts are
elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from pipeline.core.printing import new_console, say
from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.core.torch_settings import computing
from pipeline.core.units import counted
from pipeline.launch.base import Launcher
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import drive
from pipeline.launch.lock import driver_lock
from pipeline.launch.prepare import prepare, read_job
from pipeline.launch.resume_options import change_run
from pipeline.measure.energy import in_words
from pipeline.measure.joules import Joules, inference_j
from pipeline.measure.memory import device_here
from pipeline.measure.sampled import ACTIVITY_EVERY
from pipeline.recipe.command_line import command
from pipeline.recipe.json import recipe_fields
from pipeline.recipe.recipe import Recipe, read_json
from pipeline.recipe.suite import Suite, refuse_references
from pipeline.track.mlflow import tracking_uri
from pipeline.track.state import state_of
from pipeline.train.build import build_network, check_recipe
from pipeline.train.checkpoint import Place, trainer_of
from pipeline.train.elastic import told
from pipeline.train.evaluation import Evaluated, Evaluation, evaluate, inputs
from pipeline.train.export import is_export, load_export
from pipeline.train.guards.storage import may_pass
from pipeline.train.job import Job
from pipeline.train.part_checks import check_network, fingerprint_of
from pipeline.train.tasks import Loaders, build_data, check_data, mean_of, tasks_of
from pipeline.train.weights import load_run, load_weights, place_of


def launch_run(
    recipe: Recipe,
    cluster: Cluster,
    runs: Path,
    *,
    name: str | None = None,
    adopts: bool = False,
    trust: tuple[str, ...] = (),
) -> Path | None:
    """Train a recipe: the run's folder, or None when asked to stop. `adopts`: see `prepare`."""
    refuse_references(recipe)
    launcher = cluster.launcher()
    say_stage("checking the recipe and its data")
    check(recipe, cluster, trust=trust)
    with launcher:
        job = prepare(recipe, cluster, runs, name=name, adopts=adopts, trust=trust)
        return _trained(job, launcher, runs, address=cluster.address)


def resume_run(
    folder: Path,
    *,
    workers: int | tuple[int, ...] | None,
    inline: bool,
    address: str | None,
    options: Mapping[str, Any],
    trust: tuple[str, ...] = (),
) -> Path | None:
    """Go on with a run, `options` from now on (`change_run`): its folder, or None when asked to
    stop.
    """
    if state_of(folder) == "finished":
        say(new_console(), f"{folder.name} has finished")
        return folder
    if options.get("side_by_side", 1) != 1:
        raise ValueError(
            f"resume: --side-by-side is for a suite; got {options['side_by_side']} with"
            f" {folder.name} alone"
        )
    launched = Cluster.from_json(read_json(RunFolder(folder).cluster))
    cluster = launched.resumed(workers=workers, inline=inline, address=address, options=options)
    say_stage("checking the run and where it goes on")
    check_resumed(folder, cluster, launched, trust=trust)
    with driver_lock(folder):
        pass  # whoever trains it is told of before a cluster is started in vain
    with cluster.launcher() as launcher:
        change_run(folder, options, new_console())
        return _trained(
            read_job(folder, trust=trust),
            launcher,
            folder.parent,
            address=cluster.address_to_say(launched),
        )


def check(recipe: Recipe, cluster: Cluster, *, trust: tuple[str, ...]) -> None:
    """Everything that can be refused is, before anything is left behind."""
    Recipe.from_json(recipe.to_json(), trust=trust)
    check_recipe(recipe, *cluster.sizes)
    fingerprint_of(build_data(recipe))
    Loaders(tasks_of(recipe), recipe, recipe.split(cluster.sizes[-1]))


def check_resumed(
    folder: Path, cluster: Cluster, launched: Cluster, *, trust: tuple[str, ...]
) -> None:
    """Likewise of a run that goes on where it was not `launched`: whether it trains at these
    numbers of workers.

    Raises:
        ValueError: its recipe does not, or cannot be read; or the newest checkpoint loads at
        another number alone.
    """
    recipe = Recipe.read(
        RunFolder(folder).recipe, trust=trust
    )  # its code joins the path here, which workers are given
    if cluster.sizes != launched.sizes:  # those were checked at the launch
        # What it began from need not be there any more.
        check_recipe(replace(recipe.with_untrained_teacher(), init=None), *cluster.sizes)
    if zero := recipe_fields(folder).get("zero"):
        wrote = _workers_of_newest(place_of(folder))
        if wrote is not None and cluster.sizes != (wrote,):
            raise ValueError(
                f"resume: ZeRO-{zero} needs the number of workers of its newest checkpoint,"
                f" {wrote}; got {told(cluster.sizes)}"
            )


def _workers_of_newest(place: Place) -> int | None:
    """That wrote the newest checkpoint; None: there is none, or its storage is away, which the
    workers wait for.
    """
    try:
        for name in reversed(place.names()):
            with suppress(
                FileNotFoundError, ValueError, KeyError
            ):  # damaged: moved away by whoever trains
                return trainer_of(place, name)["world_size"]
    except OSError as error:
        if not may_pass(error):
            raise
    return None


def train(
    job: Job, launcher: Launcher, runs: Path, console: Console, *, address: str | None
) -> bool:
    """Train a run to its end; False when it was asked to stop before. `address`: that whoever
    resumes it has to say.
    """
    resume = command("resume", runs / Path(job.run).name, address=address)
    return drive(job, launcher, console, uri=tracking_uri(runs), resume_command=resume) is not None


def _trained(job: Job, launcher: Launcher, runs: Path, *, address: str | None) -> Path | None:
    console, folder = new_console(), Path(job.run)
    if train(job, launcher, runs, console, address=address):
        return folder
    resume = command("resume", runs / folder.name, address=address)
    say(console, f"stopped; go on with: {resume}", whole=[resume])
    return None


def evaluate_run(
    folder: Path,
    *,
    which: str | None,
    weights: Path | None,
    time_steps: int | None,
    trust: tuple[str, ...],
) -> None:
    """Print the accuracy of a run's network, with the weights of a checkpoint or of a file (None:
    of the last checkpoint).
    """
    if which is not None and weights is not None:
        raise ValueError(
            "evaluate: --weights takes the place of a checkpoint, so --which has no effect; got"
            f" --which {which}"
        )
    recipe = Recipe.read(RunFolder(folder).recipe, trust=trust)
    if weights is None:
        which = which or "last"
        network = load_run(folder, which=which, trust=trust)
    else:
        network = _with_weights(recipe, weights, trust=trust)
    check_data(build_data(recipe), fingerprint=read_job(folder).data_fingerprint, every_page=True)
    _print_accuracy(
        network, recipe, f"{folder.name} ({which if weights is None else weights.name}", time_steps
    )


def evaluate_recipe(
    made: Recipe | Suite,
    *,
    which: str | None,
    weights: Path | None,
    time_steps: int | None,
    own: tuple[str, ...],
    trust: tuple[str, ...],
) -> None:
    """Print the accuracy of a recipe's network with the weights of a file; no run is needed.

    `own` is the recipe file's own module, where the network is of it; `trust` what the user names
    beside it."""
    if weights is None or which is not None:
        got = "no --weights" if weights is None else f"--which {which}"
        raise ValueError(
            f"evaluate: a recipe has no checkpoints and needs --weights FILE; got {got}"
        )
    if isinstance(made, Suite):
        names = ", ".join(recipe.name for recipe in made.recipes)
        raise ValueError(
            "evaluate: --weights are those of one network, so the file must hold one recipe; got"
            f" {names}"
        )
    network = _with_weights(made, weights, trust=(*trust, *own))
    if trust and not is_export(weights):  # after what is wrong with the file itself
        raise ValueError(
            "evaluate: --trust is for a file of spiketrain export, which says what its network is"
            f" made of; got --trust {' --trust '.join(trust)} with {weights}"
        )
    build_data(made).check()
    _print_accuracy(network, made, f"{made.name} ({weights.name}", time_steps)


def _with_weights(recipe: Recipe, file: Path, *, trust: tuple[str, ...]) -> nn.Module:
    """The recipe's network with the weights of a file: one of `spiketrain export`, packed or not,
    or any other.
    """
    if is_export(file):
        return load_export(file, model=recipe.model, trust=trust)
    return load_weights(build_network(recipe, tasks_of(recipe)), file)


def _print_accuracy(network: nn.Module, recipe: Recipe, name: str, time_steps: int | None) -> None:
    """On the whole evaluation set of each task, and what an inference of the last one costs."""
    console, steps = new_console(), time_steps or recipe.time_steps
    tasks = tasks_of(recipe)
    tasks[0].choose_head(network)
    check_network(network, recipe, tasks[0].data)
    device = device_here()
    network.to(device)
    about = {"over_time": recipe.over_time, "counts_operations": True, "joules": Joules(device)}
    loaders, found = Loaders(tasks, recipe, recipe.split(1)), list[Evaluated]()
    for index, task in enumerate(loaders.tasks):
        begun = time.monotonic()
        say_stage("evaluating; the first batch compiles what reads the data")
        task.choose_head(network)
        with (
            closing(loaders.val(index)) as val_set,
            computing(device, recipe.precision),
        ):  # as in training
            batches = inputs(val_set, steps, device)
            found.append(evaluate(network, batches, recipe.objective.build().labels, **about))
        where = f", {task.name}" if recipe.phases else ""
        say(
            console,
            f"{name}, T = {steps}{where}): {_told(found[-1].result)}; it took"
            f" {time.monotonic() - begun:.1f} s",
        )
    if recipe.phases:
        mean = _told(mean_of([each.result for each in found]))
        say(console, f"{name}, T = {steps}, mean of {counted(len(found), 'task')}): {mean}")
    inference = found[-1].inference
    assert inference is not None, "an evaluation of one worker has samples"
    say(
        console,
        in_words(inference.told(inference_j([found[-1].readings])), on_gpu=device.type == "cuda"),
    )


def _told(result: Evaluation) -> str:
    top5 = "" if result.top5 is None else f"top-5 {result.top5:.2%}, "
    return (
        f"top-1 {result.top1:.2%}, {top5}loss {result.loss:.4f} on"
        f" {counted(result.samples, 'sample')}, firing rate {result.firing_rate:.4f} on one in"
        f" {ACTIVITY_EVERY} of them"
    )
