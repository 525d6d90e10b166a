"""What the commands launch, resume and evaluate do, told as a story; the parts are elsewhere."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from pipeline.backend.base import autocast
from pipeline.evaluate import Evaluation, evaluate, inputs
from pipeline.export import is_export, load_export
from pipeline.job import resume_command
from pipeline.launch.base import Device, Launcher
from pipeline.launch.drive import Tracking, drive, prepare, read_job, was_stopped
from pipeline.launch.inline import Inline
from pipeline.launch.ray import Ray
from pipeline.recipe import Recipe, read_json, write_json
from pipeline.tasks import Loaders, mean_of, tasks_of
from pipeline.track.mlflow import tracking_uri
from pipeline.track.state import state_of
from pipeline.weights import load_run, load_weights
from pipeline.worker import build_network, check_data, check_recipe


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where and on how much a run trains: nothing of it belongs to the recipe."""

    workers: int = 1
    inline: bool = False
    address: str | None = None
    device: Device = "auto"
    cpus_per_worker: int = 1
    loader_threads: int = 1
    max_restarts: int = 3

    def launcher(self) -> Launcher:
        if self.inline:
            for name in ("workers", "address", "cpus_per_worker", "max_restarts"):
                if getattr(self, name) != getattr(Cluster, name):
                    option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                    raise ValueError(f"launch: --inline is one worker in this process, without Ray; got {option}")
            return Inline(device=self.device)
        return Ray(
            workers=self.workers,
            address=self.address,
            cpus_per_worker=self.cpus_per_worker,
            device=self.device,
            max_restarts=self.max_restarts,
        )


def launch_all(
    recipes: Sequence[Recipe], cluster: Cluster, runs: Path, *, name: str | None = None, trust: tuple[str, ...] = ()
) -> list[Path] | None:
    """Train each recipe in turn, never two at a time on the same cores; their folders, or None when asked to stop."""
    if name is not None and len(recipes) > 1:
        raise ValueError(f"launch: --name names one run; got {len(recipes)} recipes")
    launcher = cluster.launcher()
    for recipe in recipes:  # everything that can be refused is, before the first of them leaves anything behind
        Recipe.from_json(recipe.to_json(), trust=trust)
        check_recipe(recipe, cluster.workers)
        recipe.data.build().fingerprint()
        Loaders(tasks_of(recipe), recipe, recipe.split(cluster.workers))
    console = Console()
    parent = uuid.uuid4().hex if len(recipes) > 1 else None
    folders = []
    with launcher:
        for recipe in recipes:
            job = prepare(recipe, runs, name=name, parent=parent, trust=trust)
            folder = Path(job.run)
            write_json(folder / "cluster.json", asdict(cluster))
            job = replace(job, threads=cluster.cpus_per_worker, loader_threads=cluster.loader_threads)
            command = resume_command(runs, folder.name, trust=trust)
            finished = drive(job, launcher, _tracking(runs), console, resume_command=command)
            if finished is None:
                console.print(f"stopped; go on with: {command}", soft_wrap=True)
            folders.append(folder)
            left = [each.name for each in recipes[len(folders) :]]
            if was_stopped(folder) and left:  # also where the last batch was under way already, and the run finished
                console.print(f"not started: {', '.join(left)}", soft_wrap=True)
            if finished is None or (was_stopped(folder) and left):
                return None
    return folders


def resume_run(
    folder: Path, runs: Path, *, workers: int | None, inline: bool, address: str | None, trust: tuple[str, ...] = ()
) -> list[Path] | None:
    """Go on with a run: its folder, or None when asked to stop."""
    console = Console()
    if folder.parent.resolve() != runs.resolve():  # a run that was named by its path
        runs = folder.parent
    if state_of(folder) == "finished":
        console.print(f"{folder.name} has finished")
        return [folder]
    cluster = Cluster(**read_json(folder / "cluster.json"))
    if inline:
        cluster = Cluster(inline=True, device=cluster.device, loader_threads=cluster.loader_threads)
    elif workers is not None or address is not None:
        cluster = replace(cluster, inline=False, workers=workers or cluster.workers, address=address or cluster.address)
    command = resume_command(runs, folder.name, trust=trust)
    with cluster.launcher() as launcher:
        finished = drive(read_job(folder, trust=trust), launcher, _tracking(runs), console, resume_command=command)
    if finished is None:
        console.print(f"stopped; go on with: {command}", soft_wrap=True)
        return None
    return [folder]


def evaluate_run(
    folder: Path, *, which: str | None, weights: Path | None, time_steps: int | None, trust: tuple[str, ...]
) -> None:
    """Print the accuracy of a run's network, with the weights of a checkpoint or of a file (None: of the last checkpoint)."""
    if which is not None and weights is not None:
        raise ValueError(f"evaluate: --weights takes the place of a checkpoint, so --which has no effect; got --which {which}")
    recipe = Recipe.read(folder / "recipe.json", trust=trust)
    if weights is None:
        which = which or "last"
        network = load_run(folder, which=which, trust=trust)
    else:
        network = _with_weights(recipe, weights, trust=trust)
    check_data(recipe.data.build(), read_job(folder), every_page=True)
    _print_accuracy(network, recipe, f"{folder.name} ({which if weights is None else weights.name}", time_steps)


def evaluate_recipes(recipes: Sequence[Recipe], *, which: str | None, weights: Path | None, time_steps: int | None) -> None:
    """Print the accuracy of the one recipe's network with the weights of a file; no run is needed."""
    if weights is None or which is not None:
        got = "no --weights" if weights is None else f"--which {which}"
        raise ValueError(f"evaluate: a recipe has no checkpoints and needs --weights FILE; got {got}")
    if len(recipes) > 1:
        names = ", ".join(recipe.name for recipe in recipes)
        raise ValueError(f"evaluate: --weights are those of one network, so the file must hold one recipe; got {names}")
    recipe = recipes[0]
    network = _with_weights(recipe, weights)
    recipe.data.build().check()
    _print_accuracy(network, recipe, f"{recipe.name} ({weights.name}", time_steps)


def _with_weights(recipe: Recipe, file: Path, *, trust: tuple[str, ...] = ()) -> nn.Module:
    """The recipe's network with the weights of a file: one of `spiketrain export`, packed or not, or any other."""
    if is_export(file):
        return load_export(file, model=recipe.model, trust=trust)
    return load_weights(build_network(recipe, tasks_of(recipe)), file)


def _print_accuracy(network: nn.Module, recipe: Recipe, name: str, time_steps: int | None) -> None:
    """On the whole evaluation set of each task."""
    steps = time_steps or recipe.time_steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    loaders, results = Loaders(tasks_of(recipe), recipe, recipe.split(1)), []
    for index, task in enumerate(loaders.tasks):
        begun = time.monotonic()
        task.choose_head(network)
        with closing(loaders.val(index)) as val_set, autocast(device, recipe.precision):  # as in training
            batches = inputs(val_set, steps, device)
            result, _ = evaluate(network, batches, recipe.objective.build().labels, over_time=recipe.over_time)
            results.append(result)
        where = f", {task.name}" if recipe.phases else ""
        print(f"{name}, T = {steps}{where}): {_told(results[-1])} in {time.monotonic() - begun:.1f} s")
    if recipe.phases:
        print(f"{name}, T = {steps}, mean of {len(results)} tasks): {_told(mean_of(results))}")


def _told(result: Evaluation) -> str:
    return (
        f"top-1 {result.top1:.4f}, top-5 {result.top5:.4f}, loss {result.loss:.4f}, "
        f"firing rate {result.firing_rate:.4f} on {result.samples} samples"
    )


def _tracking(runs: Path) -> Tracking:
    return Tracking(tracking_uri(runs), "spiketrain")
