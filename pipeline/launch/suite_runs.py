"""The runs of a suite: the runs that remain, the job of each run, and runs side by side.

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
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from rich.console import Console

from pipeline.core.checks import require
from pipeline.core.errors import UserError
from pipeline.core.printing import say
from pipeline.core.run_folder import RunFolder
from pipeline.launch.cluster import Cluster, CountOrAuto
from pipeline.launch.driver import AT_ONCE, SAVING_SIGNALS, Launcher, check_launch, on_stop_signals
from pipeline.launch.prepare import prepare, read_job, write_job
from pipeline.launch.progress import ProgressDisplay
from pipeline.launch.ray import LaunchError
from pipeline.recipe.printed_commands import trust_words
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import SuiteFile, fill_references, prerequisites, runs_of, sources
from pipeline.track.mlflow import tracking_uri
from pipeline.track.run_state import best, is_driven, is_over, top1_of
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
        return sources(self.suite_file.suite)

    def remaining(self) -> list[Recipe]:
        """The recipes whose runs are not over, in the suite's order."""
        return [recipe for recipe in self.suite_file.suite.recipes if not self.is_over(recipe.name)]

    def can_start(self, recipe: Recipe) -> bool:
        """Whether all runs are over whose weights or results this run needs."""
        return all(self.is_over(name) for name in prerequisites(self.suite_file.suite, recipe))

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

    After the first failure, or after a stop of the suite or of one run, no further run starts. The
    first error is raised when the other runs have ended.

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
