"""`spiketrain launch` and `resume` of a suite: its runs one after another or side by side, then its
measurements.

Measurements are entries of the suite: sweeps, interleaved times and plans. They start after all
runs are over, one after another, in the process of the launch. Each result is written atomically to
a file in the suite's folder. A resume makes the measurements that have no file yet.
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
    check_launch,
    drive,
    driver_lock,
    end_stopped,
    ignore_lost_terminal,
    launcher_of,
)
from pipeline.launch.prepare import (
    atomic_folder,
    folder_named,
    free_folder,
    open_store,
    refuse_taken,
)
from pipeline.launch.resume import check_resumed, save_options
from pipeline.launch.suite_runs import (
    SuiteRuns,
    count_parallel_runs,
    read_suite_job,
    train_side_by_side,
)
from pipeline.measure.memory import hardware_differences
from pipeline.recipe import own_code
from pipeline.recipe.json import read_json, write_json
from pipeline.recipe.printed_commands import command
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import Measurement, Suite, SuiteFile, measured_in, runs_of
from pipeline.track.events import Start
from pipeline.track.journal import read
from pipeline.track.mlflow import TrackingError, sync, tracking_uri
from pipeline.track.run_state import conditions_of, done_entries, state_of, suite_entries
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

    Args:
        stem: the first part of the folder's name if `name` is None. The time follows.

    Raises:
        ValueError: the name is taken, or the suite, a recipe, its data or an option is refused.
        LaunchError: a run failed.
    """
    launcher = launcher_of(cluster)
    if name is not None:
        refuse_taken(folder_named(runs, name))
    parent, timestamp = uuid.uuid4().hex, time.strftime("%Y%m%d-%H%M%S")
    folder = runs / (name or free_folder(runs / f"{stem}-{timestamp}").name)
    # The folders of the runs are made later. A part of `parent` in their names keeps them apart
    # from the runs of another suite that is launched in the same second.
    suite_file = SuiteFile(
        suite=suite.resolved(),
        runs=tuple(
            free_folder(runs / f"{each.name}-{timestamp}-{parent[:4]}").name
            for each in suite.recipes
        ),
        parent=parent,
        cluster=asdict(cluster),
    )
    SuiteFile.from_json(suite_file.to_json(), own=folder.name, trust=trust)  # raises if refused
    say_stage(f"checking {counted(len(suite.recipes), 'recipe')} and their data")
    _check_recipes(suite, cluster, trust=trust)
    if cluster.checkpoints is not None:  # raises if the storage cannot be opened
        open_store(cluster.checkpoints, folder.parent / suite_file.runs[0])
    with launcher:
        slots = count_parallel_runs(launcher, cluster.side_by_side)
        with atomic_folder(folder) as hidden:
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
    """Continue a suite. Returns its folder.

    Args:
        options: values of OPERATIONAL_FIELDS. They permanently replace those of the launch.

    Raises:
        ValueError: a folder is damaged, or a run, a recipe or an option is refused.
        LaunchError: a run failed.
    """
    suite_file = SuiteFile.read(folder, trust=trust)
    started = {name: run for name, run in runs_of(folder).items() if run.exists()}
    for run in started.values():  # raises if a run is not of this suite
        read_suite_job(run, suite_file.parent, trust=trust)
    done = done_entries(folder)
    if len(done) == len(suite_entries(folder)):
        say(new_console(), f"{folder.name} has finished")
        return folder
    launched = Cluster.from_json(suite_file.cluster)
    cluster = launched.resumed(workers=workers, inline=inline, address=address, options=options)
    launcher = launcher_of(cluster)
    say_stage(
        f"checking {counted(len(suite_file.suite.recipes), 'recipe')} and where they continue"
    )
    unfinished = [run for name, run in started.items() if name not in done]
    for run in unfinished:
        check_resumed(run, cluster, launched, trust=trust)
    _check_recipes(suite_file.suite, cluster, trust=trust, started=frozenset(started))
    with launcher:
        slots = count_parallel_runs(launcher, cluster.side_by_side)
        save_options(folder, unfinished, options, new_console())
        suite_file = SuiteFile.read(folder, trust=trust)
        return _train(SuiteRuns(folder, suite_file, cluster, trust), launcher, slots)


def _train(suite: SuiteRuns, launcher: Launcher, slots: int) -> Path:
    console, folder = new_console(), suite.folder
    ignore_lost_terminal(console)
    resume = command("resume", folder, address=suite.resume_address)
    say(console, str(folder), label="suite   ", whole=[str(folder)])
    say(console, resume, label="resume  ", whole=[resume])
    if slots > 1:
        say(console, f"{slots} runs at a time, each on its own cores and GPUs (--side-by-side)")
    else:  # a single run may use all cores
        suite = replace(suite, cluster=replace(suite.cluster, side_by_side=1))
    with ExitStack() as stack, driver_lock(folder):
        stack.callback(_sync_states, suite, console)  # called after the lock is released
        try:
            if slots > 1:
                is_complete = train_side_by_side(suite, launcher, slots, console)
            else:
                is_complete = _train_one_by_one(suite, launcher, console)
            if is_complete:
                make_missing_measurements(folder, suite.suite_file.suite, trust=suite.trust)
        except KeyboardInterrupt:  # between two runs, or during a measurement
            is_complete = False
    if not is_complete:
        end_stopped(console, resume)
    return folder


def _sync_states(suite: SuiteRuns, console: Console) -> None:
    """Deliver the states of the suite and its runs to MLflow, when no process drives them.

    The driver of a run may have been killed before it delivered the run's state. A suite that stops
    between two runs is still marked as running in MLflow.
    """
    try:
        started = {name: run for name, run in suite.folders.items() if state_of(run) != "new"}
        if not started or not suite.remaining():  # the last run has delivered the state
            return
        unfinished = [run for name, run in started.items() if not suite.is_over(name)]
        for run in unfinished or [*started.values()][-1:]:
            sync(run, uri=tracking_uri(suite.folder.parent))
    except (TrackingError, OSError, ValueError) as error:
        say(console, str(error))  # not raised: the caller may be raising another error


def _train_one_by_one(suite: SuiteRuns, launcher: Launcher, console: Console) -> bool:
    """As `train_side_by_side`, but this process drives one run after another."""
    remaining = suite.remaining()
    for recipe in remaining:
        try:
            if drive(suite.job(recipe), launcher, console, address=suite.resume_address) is None:
                return False
        except UserError:
            if not suite.is_over(recipe.name):  # a run that diverged is over
                raise
        # A request in the last batch of a run is too late to stop the run, but stops the suite.
        if was_stopped(suite.folders[recipe.name]) and recipe is not remaining[-1]:
            return False
    return True


def _check_recipes(
    suite: Suite, cluster: Cluster, *, trust: tuple[str, ...], started: frozenset[str] = frozenset()
) -> None:
    """Check the recipes of all runs that have not started, before any run trains.

    Each run is checked again before it starts, with the weights that it starts from.

    Raises:
        ValueError: a recipe or its data is refused.
    """
    with with_placeholder_weights(suite) as recipes:
        for recipe in recipes:
            if recipe.name not in started:
                check_launch(recipe, cluster, trust=trust)


# -------------------------------------------------------------------------------- the measurements


def make_missing_measurements(folder: Path, suite: Suite, *, trust: tuple[str, ...]) -> None:
    """Make the measurements that have no file in a suite's folder.

    A measurement that is refused gets a file, too: `{"refused": MESSAGE}`.
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
        ValueError: the first run of the measurement was trained on other hardware, or the forecast
            refuses a value.
    """
    recipes = [
        each if isinstance(each, Recipe) else Recipe.read(RunFolder(runs[each]).recipe, trust=trust)
        for each in measurement.of
    ]
    conditions: dict[str, Any] = {"hardware": {}}
    if trained := [RunFolder(runs[each]) for each in measurement.of if isinstance(each, str)]:
        summary = read_json(trained[0].summary) if trained[0].summary.exists() else {}
        conditions = conditions_of(summary, read(trained[0].journal, Start.kind))[-1]
        differences = "; ".join(
            f"{name} {there}, here {here}"
            for name, here, there in hardware_differences(
                conditions["hardware"] or {}, own_cores=conditions["own_cores"]
            )
        )
        require(
            not differences, f"the runs must have been trained on this hardware; got {differences}"
        )
    rules, options = [each.rule for each in recipes], dict(measurement.options)
    labels = [rule.build().label for rule in rules]
    require(
        len({*labels}) == len(labels),
        f"the recipes of a measurement must have different rules; got {', '.join(labels)}",
    )
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

    cluster = forecast.Cluster(
        workers=options.pop("workers"), device=forecast.DEVICES[options.pop("device")]
    )
    return asdict(forecast.plan(recipes[0], cluster, rules=rules, **options))
