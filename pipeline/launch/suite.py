"""`spiketrain launch` and `resume` of a suite: its runs one after another, or side by side on
different cores, then its measurements.

Measurements are entries of the suite: sweeps, interleaved times and plans. They begin after all
runs are over, one after another, in the process of the launch. Each result is written atomically to
a file in the suite's folder. A resume makes the measurements whose file is missing.
"""

import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.checks import require
from pipeline.core.errors import UserError
from pipeline.core.printing import new_console, say
from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.core.units import counted
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import (
    Launcher,
    check,
    drive,
    driver_lock,
    end_stopped,
    ignore_lost_terminal,
    launcher_of,
)
from pipeline.launch.prepare import atomic_folder, free_folder, named, open_store, refuse_taken
from pipeline.launch.resume import check_resumed, save_options
from pipeline.launch.suite_runs import SuiteRuns, begun_job, parallel_runs, train_side_by_side
from pipeline.measure.memory import hardware_differences
from pipeline.recipe import own_code
from pipeline.recipe.json import read_json, write_json
from pipeline.recipe.printed_commands import command
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import Measurement, Suite, SuiteFile, measured_in, runs_of
from pipeline.track.events import Start
from pipeline.track.journal import read
from pipeline.track.mlflow import TrackingError, sync, tracking_uri
from pipeline.track.provenance import conditions_of
from pipeline.track.run_state import done_entries, state_of, suite_entries
from pipeline.train.build import with_placeholder_weights
from pipeline.train.job import was_stopped


def launch_suite(
    suite: Suite,
    cluster: Cluster,
    runs: Path,
    *,
    stem: str,
    name: str | None = None,
    trust: tuple[str, ...] = (),
) -> Path:
    """Train a suite. Returns its folder.

    `name` is the name of its folder. None: `stem` and the time.
    """
    launcher = launcher_of(cluster)
    if name is not None:
        refuse_taken(named(runs, name))
    # The runs get their folders only later. The mark makes their names differ from those of a suite
    # that is launched in the same second.
    parent, stamp = uuid.uuid4().hex, time.strftime("%Y%m%d-%H%M%S")
    folder = runs / (name or free_folder(runs / f"{stem}-{stamp}").name)
    suite_file = SuiteFile(
        suite=suite.resolved(),
        runs=tuple(
            free_folder(runs / f"{each.name}-{stamp}-{parent[:4]}").name for each in suite.recipes
        ),
        parent=parent,
        cluster=asdict(cluster),
    )
    SuiteFile.from_json(suite_file.to_json(), own=folder.name, trust=trust)
    say_stage(f"checking {counted(len(suite.recipes), 'recipe')} and their data")
    _check_ahead(suite, cluster, trust=trust)
    if cluster.checkpoints is not None:
        open_store(cluster.checkpoints, folder.parent / suite_file.runs[0])
    with launcher:
        slots = parallel_runs(launcher, cluster.side_by_side)
        with atomic_folder(folder) as hidden:  # nothing can be refused after this
            suite_file.write(hidden)
            own_code.write(hidden, trust)
        return _train(SuiteRuns(folder, suite_file, cluster, trust), launcher, slots)


def resume_suite(
    folder: Path,
    *,
    workers: int | tuple[int, ...] | None,
    inline: bool,
    address: str | None,
    options: Mapping[str, Any],
    trust: tuple[str, ...] = (),
) -> Path:
    """Continue a suite. `options` are saved with it. Returns its folder."""
    suite_file = SuiteFile.read(folder, trust=trust)
    begun = {name: run for name, run in runs_of(folder).items() if run.exists()}
    for run in begun.values():
        begun_job(run, suite_file.parent, trust=trust)
    over = done_entries(folder)
    left = [run for name, run in begun.items() if name not in over]
    if len(over) == len(suite_entries(folder)):
        say(new_console(), f"{folder.name} has finished")
        return folder
    launched = Cluster.from_json(suite_file.cluster)
    cluster = launched.resumed(workers=workers, inline=inline, address=address, options=options)
    launcher = launcher_of(cluster)
    say_stage(
        f"checking {counted(len(suite_file.suite.recipes), 'recipe')} and where they continue"
    )
    for run in left:
        check_resumed(run, cluster, launched, trust=trust)
    _check_ahead(suite_file.suite, cluster, trust=trust, begun=frozenset(begun))
    with launcher:
        slots = parallel_runs(launcher, cluster.side_by_side)
        save_options(folder, left, options, new_console())
        suite_file = SuiteFile.read(folder, trust=trust)
        return _train(SuiteRuns(folder, suite_file, cluster, trust), launcher, slots)


def _train(suite: SuiteRuns, launcher: Launcher, slots: int) -> Path:
    console, folder = new_console(), suite.folder
    ignore_lost_terminal(console)
    resume = command("resume", folder, address=suite.resume_address)
    say(console, str(folder), label="suite   ", whole=[str(folder)])
    say(console, resume, label="resume  ", whole=[resume])
    if slots > 1:
        say(console, f"{slots} runs at a time, each on cores and cards of its own (--side-by-side)")
    else:  # one run at a time needs no cores of its own
        suite = replace(suite, cluster=replace(suite.cluster, side_by_side=1))
    with ExitStack() as at_the_end, driver_lock(folder):
        at_the_end.callback(_sync_states, suite, console)
        try:
            if slots > 1:
                done = train_side_by_side(suite, launcher, slots, console)
            else:
                done = _train_in_turn(suite, launcher, console)
            if done:
                measure_the_rest(folder, suite.suite_file.suite, trust=suite.trust)
        except KeyboardInterrupt:  # between two runs, or during a measurement
            done = False
    if not done:
        end_stopped(console, resume)
    return folder


def _sync_states(suite: SuiteRuns, console: Console) -> None:
    """Deliver to MLflow the states of the suite and its runs, once no process drives them.

    A killed process has not delivered its run's state. Between two runs MLflow still shows the
    suite as running.
    """
    try:
        begun = {name: run for name, run in suite.folders.items() if state_of(run) != "new"}
        if not begun or not suite.left():  # the last run has delivered the state
            return
        unfinished = [run for name, run in begun.items() if not suite.is_over(name)]
        for run in unfinished or [*begun.values()][-1:]:
            sync(run, uri=tracking_uri(suite.folder.parent))
    except (TrackingError, OSError, ValueError) as error:
        say(console, str(error))  # not raised: the caller may be raising another error


def _train_in_turn(suite: SuiteRuns, launcher: Launcher, console: Console) -> bool:
    """As `train_side_by_side`, but train one run after another, driven by this process. A diverged
    run counts as trained.
    """
    left = suite.left()
    for recipe in left:
        try:
            if drive(suite.job(recipe), launcher, console, address=suite.resume_address) is None:
                return False
        except UserError:
            if not suite.is_over(recipe.name):
                raise
        # A request during a run's last batch comes too late for the run, and stops the suite.
        if was_stopped(suite.folders[recipe.name]) and recipe is not left[-1]:
            return False
    return True


def _check_ahead(
    suite: Suite, cluster: Cluster, *, trust: tuple[str, ...], begun: frozenset[str] = frozenset()
) -> None:
    """Refuse recipes that can be refused before any run trains.

    Each run is checked again before it begins, with the weights that it starts from.
    """
    with with_placeholder_weights(suite) as recipes:
        for recipe in recipes:
            if recipe.name not in begun:
                check(recipe, cluster, trust=trust)


# -------------------------------------------------------------------------------- the measurements


def measure_the_rest(folder: Path, suite: Suite, *, trust: tuple[str, ...]) -> None:
    """Make the measurements whose files are missing in a suite's folder.

    A measurement that is refused here also gets a file: `{"refused": why}`.
    """
    files, runs = measured_in(folder), runs_of(folder)
    for measurement in suite.measurements:
        if files[measurement.name].exists():
            continue
        say_stage(f"measuring {measurement.name}")
        try:
            result = _measure(measurement, runs, trust)
        except ValueError as error:
            result = {"refused": str(error)}
        write_json(files[measurement.name], result)


def _measure(measurement: Measurement, runs: Mapping[str, Path], trust: tuple[str, ...]) -> Any:
    """The result of a measurement as JSON values.

    Raises:
        ValueError: the run that it belongs to was trained on another machine, or on another of its
            devices, or the forecast refuses.
    """
    recipes = [
        each if isinstance(each, Recipe) else Recipe.read(RunFolder(runs[each]).recipe, trust=trust)
        for each in measurement.of
    ]
    conditions: dict[str, Any] = {"hardware": {}}
    if trained := [RunFolder(runs[each]) for each in measurement.of if isinstance(each, str)]:
        conditions = conditions_of(
            read_json(trained[0].summary) if trained[0].summary.exists() else {},
            read(trained[0].journal, Start.kind),
        )[-1]
        differences = hardware_differences(
            conditions["hardware"] or {}, own_cores=conditions["own_cores"]
        )
        other = "; ".join(f"{name} {there}, here {here}" for name, here, there in differences)
        require(not other, f"the runs were trained on another machine: {other}")
    rules, options = [each.rule for each in recipes], dict(measurement.options)
    if measurement.kind == "sweep":
        from pipeline.forecast.sweep import sweep

        options = {"steps": (recipes[0].time_steps,), **options}
        return sweep(recipes[0], rules=rules, **options).to_json()
    if measurement.kind == "interleaved":
        from pipeline.forecast.rule_timing import measure_interleaved

        options = {
            "workers": conditions.get("world_size") or 1,
            "samples": conditions.get("micro_batch"),
            "threads": conditions["hardware"].get("threads", 1),
            **options,
        }
        return {
            label: asdict(times)
            for label, times in measure_interleaved(recipes[0], rules, **options).items()
        }
    from pipeline.forecast import plan as forecast

    device, workers = forecast.DEVICES[options.pop("device")], options.pop("workers")
    return asdict(
        forecast.plan(
            recipes[0], forecast.Cluster(workers=workers, device=device), rules=rules, **options
        )
    )
