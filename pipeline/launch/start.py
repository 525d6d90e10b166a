"""`spiketrain launch` of one recipe: check it, make the folder of its run, train it."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pipeline.core.printing import new_console, say
from pipeline.core.stages import say_stage
from pipeline.launch.base import Launcher
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import drive
from pipeline.launch.prepare import prepare
from pipeline.recipe.command_line import command
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import refuse_references
from pipeline.track.mlflow import tracking_uri
from pipeline.train.build import check_recipe
from pipeline.train.job import Job
from pipeline.train.part_checks import fingerprint_of
from pipeline.train.tasks import Loaders, build_data, tasks_of


def launch_run(
    recipe: Recipe,
    cluster: Cluster,
    runs: Path,
    *,
    name: str | None = None,
    adopts: bool = False,
    trust: tuple[str, ...] = (),
) -> Path | None:
    """Train a recipe. Returns the run's folder, or None if it was asked to stop.

    `prepare` explains `adopts`.
    """
    refuse_references(recipe)
    launcher = cluster.launcher()
    say_stage("checking the recipe and its data")
    check(recipe, cluster, trust=trust)
    with launcher:
        job = prepare(recipe, cluster, runs, name=name, adopts=adopts, trust=trust)
        return train_to_end(job, launcher, runs, address=cluster.address)


def check(recipe: Recipe, cluster: Cluster, *, trust: tuple[str, ...]) -> None:
    """Refuse whatever can be refused before a file is written."""
    Recipe.from_json(recipe.to_json(), trust=trust)
    check_recipe(recipe, *cluster.sizes)
    fingerprint_of(build_data(recipe))
    Loaders(tasks_of(recipe), recipe, recipe.split(cluster.sizes[-1]))


def train_to_end(job: Job, launcher: Launcher, runs: Path, *, address: str | None) -> Path | None:
    """Train a run that the user has asked for alone. Returns its folder, or None if it was asked to
    stop; then the command that resumes it is printed.
    """
    console, folder = new_console(), Path(job.run)
    if train(job, launcher, runs, console, address=address):
        return folder
    resume = command("resume", runs / folder.name, address=address)
    say(console, f"stopped; go on with: {resume}", whole=[resume])
    return None


def train(
    job: Job, launcher: Launcher, runs: Path, console: Console, *, address: str | None
) -> bool:
    """Train a run to its end. Returns False if it was asked to stop before.

    `address` is the `--address` of the command that resumes it.
    """
    resume = command("resume", runs / Path(job.run).name, address=address)
    return drive(job, launcher, console, uri=tracking_uri(runs), resume_command=resume) is not None
