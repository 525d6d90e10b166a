"""`spiketrain launch` and `resume` of a suite: its runs one after another, or side by side on
different cores, then its measurements.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.errors import UserError
from pipeline.core.printing import new_console, say
from pipeline.core.stages import say_stage
from pipeline.core.units import counted
from pipeline.launch.base import Launcher
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import check, driver_lock, ignore_lost_terminal, train
from pipeline.launch.measurements import measure_the_rest
from pipeline.launch.prepare import atomic_folder, named, numbered_folders, open_place, refuse_taken
from pipeline.launch.resume import change_run, change_suite, check_resumed
from pipeline.launch.side_by_side import parallel_runs, train_side_by_side
from pipeline.launch.suite_runs import SuiteRuns, begun_job
from pipeline.recipe import own_code
from pipeline.recipe.command_line import command
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import Suite, SuiteFile, runs_of
from pipeline.track.mlflow import TrackingError, sync, tracking_uri
from pipeline.track.state import is_driven, state_of
from pipeline.track.trials import entries_in, over_in
from pipeline.train.job import was_stopped
from pipeline.train.placeholder_weights import with_stand_ins


def launch_suite(
    suite: Suite,
    cluster: Cluster,
    runs: Path,
    *,
    stem: str,
    name: str | None = None,
    trust: tuple[str, ...] = (),
) -> Path | None:
    """Train a suite. Returns its folder, or None if it was asked to stop.

    Without a `name` it is called `stem` and the time.
    """
    launcher = cluster.launcher()
    parent = uuid.uuid4().hex
    folder, names = _names(suite, runs, stem=stem, name=name, mark=parent[:4])
    suite_file = SuiteFile(
        suite=suite.resolved(), runs=names, parent=parent, cluster=asdict(cluster)
    )
    SuiteFile.from_json(suite_file.to_json(), own=folder.name, trust=trust)
    say_stage(f"checking {counted(len(suite.recipes), 'recipe')} and their data")
    _check_ahead(suite, cluster, trust=trust)
    if cluster.checkpoints is not None:
        open_place(cluster.checkpoints, folder.parent / names[0])
    with launcher:
        slots = parallel_runs(launcher, cluster.side_by_side)
        with atomic_folder(folder) as hidden:  # nothing can be refused after this
            suite_file.write(hidden)
            own_code.write(hidden, trust)
        return _train_the_rest(folder, suite_file, cluster, launcher, slots, trust=trust)


def resume_suite(
    folder: Path,
    *,
    workers: int | tuple[int, ...] | None,
    inline: bool,
    address: str | None,
    options: Mapping[str, Any],
    trust: tuple[str, ...] = (),
) -> Path | None:
    """Continue a suite; `options` hold from now on. Returns its folder, or None if it was asked to
    stop.
    """
    suite_file = SuiteFile.read(folder, trust=trust)
    begun = {name: run for name, run in runs_of(folder).items() if run.exists()}
    for run in begun.values():
        begun_job(run, suite_file.parent, trust=trust)
    over = over_in(folder)
    left = [run for name, run in begun.items() if name not in over]
    if len(over) == len(entries_in(folder)):
        say(new_console(), f"{folder.name} has finished")
        return folder
    launched = Cluster.from_json(suite_file.cluster)
    cluster = launched.resumed(workers=workers, inline=inline, address=address, options=options)
    launcher = cluster.launcher()
    say_stage(
        f"checking {counted(len(suite_file.suite.recipes), 'recipe')} and where they continue"
    )
    for run in left:
        check_resumed(run, cluster, launched, trust=trust)
    _check_ahead(suite_file.suite, cluster, trust=trust, begun=frozenset(begun))
    with launcher:
        slots = parallel_runs(launcher, cluster.side_by_side)
        suite_file = change_suite(folder, suite_file, options, left, new_console())
        return _train_the_rest(folder, suite_file, cluster, launcher, slots, trust=trust)


def _train_the_rest(
    folder: Path,
    suite_file: SuiteFile,
    cluster: Cluster,
    launcher: Launcher,
    slots: int,
    *,
    trust: tuple[str, ...],
) -> Path | None:
    """Train every recipe whose run is not over, `slots` at a time."""
    console, runs, where = new_console(), folder.parent, runs_of(folder)
    ignore_lost_terminal(console)
    address = cluster.resume_address(Cluster.from_json(suite_file.cluster))
    resume = command("resume", runs / folder.name, address=address)
    say(console, str(folder), label="suite   ", whole=[str(folder)])
    say(console, resume, label="resume  ", whole=[resume])
    if slots > 1:
        say(console, f"{slots} runs at a time, each on cores and cards of its own (--side-by-side)")
    else:  # one run at a time needs no cores of its own
        cluster = replace(cluster, side_by_side=1)
    children = SuiteRuns(folder.name, suite_file, cluster, where, trust=trust)
    is_ours = False
    try:
        with driver_lock(folder):
            is_ours = True
            _update_cores(children, console)
            if slots > 1:
                done = train_side_by_side(children, launcher, slots, console)
            else:
                done = _train_in_turn(children, launcher, console)
            done = done and _measure(children, folder)
    finally:
        if is_ours:
            _sync_states(children, console)
    if not done:
        say(console, f"stopped; resume with: {resume}", whole=[resume])
    return folder if done else None


def _update_cores(children: SuiteRuns, console: Console) -> None:
    """Runs that have begun share cores as those do that begin now.

    They may have begun with another number of runs side by side.
    """
    cluster = children.cluster
    for run in (children.where[recipe.name] for recipe in children.left()):
        # A process that still drives a run, after its suite was killed, saves it and ends.
        if not run.exists() or is_driven(run):
            continue
        job = begun_job(run, children.suite_file.parent, trust=children.trust)
        if job.own_cores != cluster.worker_settings["own_cores"]:
            change_run(run, {"side_by_side": cluster.side_by_side}, console)


def _sync_states(children: SuiteRuns, console: Console) -> None:
    """Deliver to MLflow the states of the suite and its runs, once no process drives them.

    A process that was killed has not delivered its run's state. Between two runs MLflow has been
    informed that the suite runs.
    """
    try:
        begun = {name: run for name, run in children.where.items() if state_of(run) != "new"}
        if not begun or not children.left():  # the last run has delivered it
            return
        unfinished = [run for name, run in begun.items() if not children.is_over(name)]
        for run in unfinished or [*begun.values()][-1:]:
            sync(run, uri=tracking_uri(children.runs))
    except (TrackingError, OSError, ValueError) as error:
        say(console, str(error))  # not raised: the caller may be raising another error


def _train_in_turn(children: SuiteRuns, launcher: Launcher, console: Console) -> bool:
    """Returns False if the suite was asked to stop."""
    left = children.left()
    try:
        for recipe in left:
            finished = _train_one(children, recipe, launcher, console)
            # A request during a run's last batch comes too late for the run, and stops the suite.
            if not finished or (
                was_stopped(children.where[recipe.name]) and recipe is not left[-1]
            ):
                return False
    except KeyboardInterrupt:  # between two runs
        return False
    return True


def _measure(children: SuiteRuns, folder: Path) -> bool:
    """Returns False if the user stopped it."""
    try:
        measure_the_rest(folder, children.suite_file.suite, trust=children.trust)
    except KeyboardInterrupt:
        return False
    return True


def _train_one(children: SuiteRuns, recipe: Recipe, launcher: Launcher, console: Console) -> bool:
    """Returns False if the run was asked to stop. A run that diverged counts as trained."""
    job, launched = children.job(recipe), Cluster.from_json(children.suite_file.cluster)
    try:
        return train(
            job, launcher, children.runs, console, address=children.cluster.resume_address(launched)
        )
    except UserError:
        if not children.is_over(recipe.name):
            raise
        return True


def _check_ahead(
    suite: Suite, cluster: Cluster, *, trust: tuple[str, ...], begun: frozenset[str] = frozenset()
) -> None:
    """Refuse what can be refused before any run trains.

    Each run is checked again before it begins, with the weights that it starts from.
    """
    with with_stand_ins(suite) as recipes:
        for recipe in recipes:
            if recipe.name not in begun:
                check(recipe, cluster, trust=trust)


def _names(
    suite: Suite, runs: Path, *, stem: str, name: str | None, mark: str
) -> tuple[Path, tuple[str, ...]]:
    """The suite's folder and the names of its runs, none of which is taken.

    `mark` makes the names differ from those of a suite that is launched in the same second: runs
    get their folders later.
    """
    if name is not None:
        refuse_taken(named(runs, name))
    stamp = time.strftime("%Y%m%d-%H%M%S")

    def free(wanted: str) -> str:
        return next(path.name for path in numbered_folders(runs / wanted) if not path.exists())

    folder = runs / (name or free(f"{stem}-{stamp}"))
    return folder, tuple(free(f"{recipe.name}-{stamp}-{mark}") for recipe in suite.recipes)
