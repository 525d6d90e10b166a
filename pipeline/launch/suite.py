"""`spiketrain launch` and `resume` of a suite: its runs one after another or side by side, then its
measurements.

Measurements are entries of the suite: sweeps, interleaved times and plans. They start after all
runs are over, one after another, in the process of the launch. Each result is written atomically to
a file in the suite's folder. A resume makes the measurements that have no file yet.

A run can start once the runs that it depends on are over. If several runs train at the same time,
each has a driver process of its own, `spiketrain resume`. Each worker has its own cores
(`core/cpu_affinity.py`), or its own GPU from Ray. So the measured cost of a run includes the load
of the other runs on the memory bus, but never on its cores.
"""

import ctypes
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.checks import require
from pipeline.core.errors import UserError
from pipeline.core.printing import new_console, say
from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.core.units import counted
from pipeline.launch.cluster import Cluster, CountOrAuto
from pipeline.launch.driver import (
    AT_ONCE,
    SAVING_SIGNALS,
    Launcher,
    check_launch,
    drive,
    driver_lock,
    end_stopped,
    ignore_lost_terminal,
    launcher_of,
    on_stop_signals,
)
from pipeline.launch.prepare import (
    atomic_folder,
    folder_named,
    free_folder,
    open_store,
    prepare,
    read_job,
    refuse_taken,
    write_job,
)
from pipeline.launch.progress import ProgressDisplay
from pipeline.launch.ray import LaunchError
from pipeline.launch.resume import check_resumed, save_options
from pipeline.measure.memory import hardware_differences
from pipeline.recipe import own_code
from pipeline.recipe.json import read_json, write_json
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import (
    Measurement,
    Suite,
    SuiteFile,
    command,
    fill_references,
    measured_in,
    references,
    runs_of,
    sources_in,
    trust_words,
)
from pipeline.track.events import Start
from pipeline.track.journal import read
from pipeline.track.mlflow import TrackingError, sync, tracking_uri
from pipeline.track.run_state import (
    best,
    conditions_of,
    done_entries,
    is_driven,
    is_over,
    state_of,
    suite_entries,
    top1_of,
)
from pipeline.train.build import with_placeholder_weights
from pipeline.train.job import Job, was_stopped
from pipeline.train.weights import copy_of_weights

_POLL_S = 0.25
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class SuiteRuns:
    """The runs of one launch or resume of the suite in `folder`."""

    folder: Path
    suite_file: SuiteFile
    cluster: Cluster
    trust: tuple[str, ...] = ()

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The folder of each run, by the name of its recipe. A folder may not exist yet."""
        return runs_of(self.folder)

    @property
    def resume_address(self) -> str | None:
        """The `--address` of the command that resumes the suite or one of its runs."""
        return self.cluster.resume_address(Cluster.from_json(self.suite_file.cluster))

    def is_over(self, name: str) -> bool:
        return is_over(self.folders[name], is_needed=name in self._sources)

    @cached_property
    def _sources(self) -> set[str]:
        return sources_in(self.folder)

    def remaining(self) -> list[Recipe]:
        """The recipes whose runs are not over, in the suite's order."""
        return [recipe for recipe in self.suite_file.suite.recipes if not self.is_over(recipe.name)]

    def can_start(self, recipe: Recipe) -> bool:
        """Whether all runs are over whose weights or results this run needs."""
        choice = self.suite_file.suite.choices.get(recipe.name)
        trials = choice.trials if choice else ()
        return all(self.is_over(name) for name in (*references(recipe), *trials))

    def job(self, recipe: Recipe) -> Job:
        """The job of a run. If the run has no folder yet, its recipe is completed with the value
        of the best trial and with paths of trained weights, and its folder is made.

        Raises:
            ValueError: the folder is damaged or not of this suite, or the completed recipe is
                refused.
        """
        run, suite = self.folders[recipe.name], self.suite_file.suite
        if run.exists():
            return replace(
                read_suite_job(run, self.suite_file.parent, trust=self.trust),
                own_cores=self.cluster.side_by_side != 1,  # the launch may have had another value
            )
        if choice := suite.choices.get(recipe.name):
            best_trial = best({name: top1_of(self.folders[name]) for name in choice.trials})
            [trial] = [each for each in suite.recipes if each.name == best_trial]
            recipe = recipe.override({choice.field: trial.value_of(choice.field)})
        completed = fill_references(recipe, lambda name: copy_of_weights(self.folders[name]))
        check_launch(completed, self.cluster, trust=self.trust)
        return prepare(
            completed,
            self.cluster,
            self.folder.parent,
            name=run.name,
            parent=self.suite_file.parent,
            suite=self.folder.name,
            family=suite.family,
            trust=self.trust,
        )


def read_suite_job(run: Path, parent: str, *, trust: tuple[str, ...]) -> Job:
    """Read the job of a run of the suite whose launch has the id `parent`.

    Raises:
        ValueError: the folder is damaged, or the run is not of this suite.
    """
    file = RunFolder(run).job
    require(
        file.is_file(),
        f"suite: {run.name} must have a {file.name}; got none: move the folder away, then resume",
    )
    job = read_job(run, trust=trust)
    require(
        job.parent == parent,
        f"suite: {run.name} must be a run of this suite; got one of another launch",
    )
    return job


# ------------------------------------------------------------------------------- runs side by side


def count_parallel_runs(launcher: Launcher, side_by_side: CountOrAuto) -> int:
    """The number of runs that train at the same time. `auto`: as many as there are resources for.

    Raises:
        UserError: there are too few cores or GPUs, or `auto` is used but their number is unknown.
    """
    if side_by_side == 1:
        return 1
    max_runs = launcher.max_parallel_runs()
    if side_by_side == "auto":
        if max_runs is None:
            raise UserError(
                "launch: --side-by-side must be a number if the launch joins a cluster without"
                " GPUs, because its number of physical cores is unknown; got auto"
            )
        return max(1, max_runs)
    if max_runs is not None and side_by_side > max_runs:
        raise UserError(
            f"launch: --side-by-side must be at most {max(1, max_runs)}, so that each run has its"
            f" own cores and GPUs; got {side_by_side}"
        )
    return side_by_side


def train_side_by_side(suite: SuiteRuns, launcher: Launcher, slots: int, console: Console) -> bool:
    """Train the remaining runs, `slots` at a time. Returns whether all runs of the suite are over.

    After a failure or a stop no further run starts. The first error is raised when all have ended.

    Raises:
        LaunchError: a run failed. The message has the driver's last line, signal or exit status.
        UserError: a run was refused.
        OSError, ValueError: the folder or the driver of a run could not be made.
    """
    running: dict[str, _ChildDriver] = {}
    reported: set[str] = set()

    def start_runs() -> bool:
        """Fill the free slots, in the suite's order. Returns whether other processes drive runs.

        Most likely these are the drivers of a killed suite, which save their runs and end.
        """
        driven_elsewhere = 0
        for recipe in suite.remaining():
            if len(running) + driven_elsewhere == slots:
                break
            if recipe.name in running or not suite.can_start(recipe):
                continue
            if is_driven(suite.folders[recipe.name]):
                driven_elsewhere += 1
                if recipe.name not in reported:
                    reported.add(recipe.name)
                    say(console, f"{recipe.name}  waiting for another process that still trains it")
            else:
                running[recipe.name] = _ChildDriver(recipe, suite, launcher, console)
        return driven_elsewhere > 0

    failure: Exception | None = None
    was_run_stopped = False
    signals: list[signal.Signals] = []
    with on_stop_signals(signals.append):
        while True:
            if signals:
                for child in running.values():
                    child.stop(at_once=any(number not in SAVING_SIGNALS for number in signals[1:]))
            for name, child in list(running.items()):
                if child.has_ended():
                    del running[name]
                    failure = failure or child.failure()
                    # The user may have stopped only this run.
                    was_run_stopped = was_run_stopped or not suite.is_over(name)
                    _say_how_many_are_over(suite, console)
            is_waiting = False
            if not signals and failure is None and not was_run_stopped:
                try:
                    is_waiting = start_runs()
                except (OSError, ValueError) as error:
                    failure = error
            if not running and not is_waiting:
                break
            time.sleep(_POLL_S)
    if failure is not None:
        raise failure
    return not suite.remaining()


class _ChildDriver:
    def __init__(
        self, recipe: Recipe, suite: SuiteRuns, launcher: Launcher, console: Console
    ) -> None:
        job, name = suite.job(recipe), recipe.name
        self.folder, self._is_over = Path(job.run), partial(suite.is_over, name)
        self._files, runs = RunFolder(self.folder), suite.folder.parent
        self._files.stop_request.unlink(missing_ok=True)
        write_job(job)
        self._display = ProgressDisplay(
            self.folder, console, mlflow_uri=tracking_uri(runs), name=name
        )
        arguments = ["resume", str(self.folder), "--runs", str(runs)]
        arguments += [*launcher.resume_options(), *trust_words(suite.trust)]
        with self._files.launch_log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only the suite, which then calls `stop`
                preexec_fn=_save_when_suite_dies,
            )
        self._is_terminated = False

    def has_ended(self) -> bool:
        if self._process.poll() is None:
            self._display.update()
            return False
        self._display.close()
        return True

    def stop(self, *, at_once: bool) -> None:
        """Ask the run to save after this step and end. If `at_once`, end it without saving."""
        with suppress(OSError):  # storage that does not answer: the next call asks again
            self._files.stop_request.touch()
        if at_once and not self._is_terminated:
            self._is_terminated = True
            with suppress(OSError):
                self._files.stop_request.write_text(AT_ONCE)
            self._process.terminate()

    def failure(self) -> Exception | None:
        """The error of the ended driver. None if the run is over or was stopped.

        A run that was refused has failed, even if it was also asked to stop.
        """
        code = self._process.returncode
        if code == 0 or (code != 2 and was_stopped(self.folder)) or self._is_over():
            return None
        if code < 0:
            text = f"its process was killed by {signal.Signals(-code).name}"
        else:
            lines = self._files.launch_log.read_text(errors="replace").strip().splitlines()
            text = lines[-1] if lines else f"exit status {code}"
        message = f"{self.folder.name}: {text}"
        return UserError(message) if code == 2 else LaunchError(message)


_prctl = ctypes.CDLL(None).prctl  # found now: between fork and exec no library may be loaded


def _save_when_suite_dies() -> None:
    """Let the kernel send SIGUSR1 to this process when the suite's process dies, so that the run
    saves and stops. SIGUSR1 never stops a run at once, even if the suite asked it to stop before.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)


# -------------------------------------------------------------------------------- launch and resume


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
        _say_how_many_are_over(suite, console)
    return True


def _say_how_many_are_over(suite: SuiteRuns, console: Console) -> None:
    runs = len(suite.folders)
    say(console, f"runs over: {runs - len(suite.remaining())} of {runs}")


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
