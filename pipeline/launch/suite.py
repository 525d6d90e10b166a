"""What the commands launch and resume do with a suite: each recipe in turn, never two at a time on the same cores."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from pipeline.job import Job, resume_command
from pipeline.launch.base import Launcher
from pipeline.launch.cluster import Cluster
from pipeline.launch.drive import driver_lock, prepare, read_job, was_stopped
from pipeline.launch.folder import numbered, refuse_taken, whole_folder
from pipeline.launch.start import check, train
from pipeline.stand_in import with_stand_ins
from pipeline.suite import Suite, SuiteFile, filled, runs_of
from pipeline.track.state import state_of
from pipeline.weights import weights_file


def launch_suite(
    suite: Suite, cluster: Cluster, runs: Path, *, stem: str, name: str | None = None, trust: tuple[str, ...] = ()
) -> Path | None:
    """Train a suite: its folder, or None when asked to stop. Without a `name` it is called `stem` and the time."""
    launcher = cluster.launcher()
    parent = uuid.uuid4().hex
    folder, names = _names(suite, runs, stem=stem, name=name, mark=parent[:4])
    suite_file = SuiteFile(suite=suite.resolved(), runs=names, parent=parent, cluster=asdict(cluster))
    SuiteFile.from_json(suite_file.to_json(), own=folder.name, trust=trust)
    _check_ahead(suite, cluster, trust=trust)
    with launcher:
        with whole_folder(folder) as hidden:
            suite_file.write(hidden)
        return _train_the_rest(folder, suite_file, cluster, launcher, trust=trust)


def resume_suite(
    folder: Path, *, workers: int | None, inline: bool, address: str | None, trust: tuple[str, ...] = ()
) -> Path | None:
    """Go on with a suite where it stopped: its folder, or None when asked to stop."""
    suite_file = SuiteFile.read(folder, trust=trust)
    begun = {name: run for name, run in runs_of(folder).items() if run.exists()}
    for run in begun.values():
        _begun(run, suite_file.parent, trust=trust)
    if len(begun) == len(suite_file.runs) and all(state_of(run) == "finished" for run in begun.values()):
        Console().print(f"{folder.name} has finished")
        return folder
    cluster = Cluster.from_json(suite_file.cluster).resumed(workers=workers, inline=inline, address=address)
    launcher = cluster.launcher()
    _check_ahead(suite_file.suite, cluster, trust=trust, begun=frozenset(begun))
    with launcher:
        return _train_the_rest(folder, suite_file, cluster, launcher, trust=trust)


def _train_the_rest(
    folder: Path, suite_file: SuiteFile, cluster: Cluster, launcher: Launcher, *, trust: tuple[str, ...]
) -> Path | None:
    """Every recipe whose run has not finished, each from where its run stands."""
    console, runs, where = Console(), folder.parent, runs_of(folder)
    command = resume_command(runs, folder.name, trust=trust)
    console.out(f"suite   {folder}\nresume  {command}", highlight=False)
    stopped = f"stopped; go on with: {command}"
    with driver_lock(folder):
        left = [recipe for recipe in suite_file.suite.recipes if state_of(where[recipe.name]) != "finished"]
        try:
            for recipe in left:
                run = where[recipe.name]
                if run.exists():
                    job = _begun(run, suite_file.parent, trust=trust)
                else:
                    ready = filled(recipe, lambda name: weights_file(where[name]))
                    check(ready, cluster, trust=trust)
                    about = {"parent": suite_file.parent, "suite": folder.name, "family": suite_file.suite.family}
                    job = prepare(ready, cluster, runs, name=run.name, trust=trust, **about)
                finished = train(job, launcher, runs, console)
                # Who asks during a run's last batch finds it finished: it is the suite that stops.
                if not finished or (was_stopped(run) and recipe is not left[-1]):
                    console.out(stopped, highlight=False)
                    return None
        except KeyboardInterrupt:  # between two runs
            console.out(stopped, highlight=False)
            return None
    return folder


def _check_ahead(suite: Suite, cluster: Cluster, *, trust: tuple[str, ...], begun: frozenset[str] = frozenset()) -> None:
    """Refuse what can be refused before any of them trains; each is checked again, with the weights it refers to, in its turn."""
    with with_stand_ins(suite) as recipes:
        for recipe in recipes:
            if recipe.name not in begun:
                check(recipe, cluster, trust=trust)


def _begun(run: Path, parent: str, *, trust: tuple[str, ...]) -> Job:
    """The job of a child that has its folder.

    Raises:
        ValueError: it is not whole, or it is no child of this suite.
    """
    if not (run / "job.json").is_file():
        raise ValueError(f"suite: {run.name} must be a whole run; it has no job.json: move it away, resume")
    job = read_job(run, trust=trust)
    if job.parent != parent:
        raise ValueError(f"suite: {run.name} must be a run of this suite; got one of another launch")
    return job


def _names(suite: Suite, runs: Path, *, stem: str, name: str | None, mark: str) -> tuple[Path, tuple[str, ...]]:
    """The suite's folder and the names of its runs, none of which is taken.

    `mark` sets them apart from those of a suite that is launched in the same second, as runs get their folders later.
    """
    if name is not None and (Path(name).name != name or name == ".."):
        raise ValueError(f"launch: --name of a suite must be a name in {runs}; got {name}")
    if name is not None:
        refuse_taken(runs / name)
    stamp = time.strftime("%Y%m%d-%H%M%S")

    def free(wanted: str) -> str:
        return next(path.name for path in numbered(runs / wanted) if not path.exists())

    folder = runs / (name or free(f"{stem}-{stamp}"))
    return folder, tuple(free(f"{recipe.name}-{stamp}-{mark}") for recipe in suite.recipes)
