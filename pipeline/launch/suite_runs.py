"""The runs of a suite: which are left, which can begin, the job of each, and several at a time.

A run can begin once the runs that it depends on are over. Each of several runs that train at the
same time has a `spiketrain resume` of its own. Each worker has its own cores
(`core/cpu_affinity.py`), or its own GPU from Ray. The cost of a run is thus measured while others
use the same memory bus, but never the same cores.
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
from pipeline.launch.cluster import Cluster, CountOrAuto, LaunchError
from pipeline.launch.driver import Launcher, check
from pipeline.launch.driver_signals import PATIENT, on_stop_signals
from pipeline.launch.prepare import prepare, read_job, write_job
from pipeline.launch.progress import Shown
from pipeline.recipe.printed_commands import trust_words
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import SuiteFile, fill_references, prerequisites, runs_of, sources
from pipeline.track.mlflow import tracking_uri
from pipeline.track.run_state import best, is_driven, is_over, top1_of
from pipeline.train.job import Job, was_stopped
from pipeline.train.weights import lasting_weights

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
        """The folder of each recipe's run, by the recipe's name. It may not exist yet."""
        return runs_of(self.folder)

    @property
    def resume_address(self) -> str | None:
        """The `--address` of the command that resumes the suite or one of its runs."""
        return self.cluster.resume_address(Cluster.from_json(self.suite_file.cluster))

    def is_over(self, name: str) -> bool:
        """Whether the run of the recipe of this name needs no more training."""
        return is_over(self.folders[name], is_needed=name in self._sources)

    @cached_property
    def _sources(self) -> set[str]:
        return sources(self.suite_file.suite)

    def left(self) -> list[Recipe]:
        """The recipes whose runs are not over, in the suite's order."""
        return [recipe for recipe in self.suite_file.suite.recipes if not self.is_over(recipe.name)]

    def can_begin(self, recipe: Recipe) -> bool:
        """Whether the runs are over from which this run takes weights or a choice."""
        return all(self.is_over(name) for name in prerequisites(self.suite_file.suite, recipe))

    def job(self, recipe: Recipe) -> Job:
        """The job of a run. A run that has not begun is prepared, with its recipe completed: the
        best value of its trials, if it has trials, and the weights that it starts from.

        Raises:
            ValueError: its folder is damaged or not of this suite, or the completed recipe is
                refused.
        """
        run, suite = self.folders[recipe.name], self.suite_file.suite
        if run.exists():  # it may have begun with another number of runs side by side
            return replace(
                begun_job(run, self.suite_file.parent, trust=self.trust),
                own_cores=self.cluster.side_by_side != 1,
            )
        if choice := suite.choices.get(recipe.name):
            best_trial = best({name: top1_of(self.folders[name]) for name in choice.trials})
            [trial] = [each for each in suite.recipes if each.name == best_trial]
            recipe = recipe.override({choice.field: trial.value_of(choice.field)})
        ready = fill_references(recipe, lambda name: lasting_weights(self.folders[name]))
        check(ready, self.cluster, trust=self.trust)
        return prepare(
            ready,
            self.cluster,
            self.folder.parent,
            name=run.name,
            parent=self.suite_file.parent,
            suite=self.folder.name,
            family=suite.family,
            trust=self.trust,
        )


def begun_job(run: Path, parent: str, *, trust: tuple[str, ...]) -> Job:
    """The job of a run that has its folder.

    Raises:
        ValueError: the folder is damaged, or the run is not of this suite.
    """
    file = RunFolder(run).job
    require(
        file.is_file(),
        f"suite: {run.name} must be a whole run; it has no {file.name}: move it away, resume",
    )
    job = read_job(run, trust=trust)
    require(
        job.parent == parent,
        f"suite: {run.name} must be a run of this suite; got one of another launch",
    )
    return job


# ------------------------------------------------------------------------------- several at a time


def parallel_runs(launcher: Launcher, wanted: CountOrAuto) -> int:
    """The number of runs that train at once. `auto`: as many as there is room for.

    Raises:
        UserError: there is no room for so many, or `auto` where the room is unknown.
    """
    if wanted == 1:
        return 1
    room = launcher.room()
    if wanted == "auto":
        if room is None:
            raise UserError(
                "launch: --side-by-side must be a number on a cluster without GPUs that was joined,"
                " whose physical cores are unknown; got auto"
            )
        return max(1, room)
    if room is not None and wanted > room:
        raise UserError(
            f"launch: {wanted} runs side by side need cores and cards of their own; there is room"
            f" for {room}"
        )
    return wanted


def train_side_by_side(suite: SuiteRuns, launcher: Launcher, slots: int, console: Console) -> bool:
    """Train the runs that are left, `slots` at a time. Returns False if asked to stop.

    After the first failure no further run begins. The error is raised once the others have ended.

    Raises:
        LaunchError: a run failed; the line is the last one of its driver.
        UserError: a run was refused.
    """
    running: dict[str, _ChildDriver] = {}
    driven_elsewhere: set[str] = set()

    def begin_more() -> bool:
        """Fill the free slots, in the suite's order. Returns whether other processes drive runs.

        Most likely these are the drivers of a killed suite, which save their runs and end.
        """
        elsewhere = 0
        for recipe in suite.left():
            if len(running) + elsewhere == slots:
                break
            if recipe.name in running or not suite.can_begin(recipe):
                continue
            if is_driven(suite.folders[recipe.name]):
                elsewhere += 1
                if recipe.name not in driven_elsewhere:
                    driven_elsewhere.add(recipe.name)
                    say(console, f"{recipe.name}  another process still trains it: waiting")
            else:
                running[recipe.name] = _ChildDriver(recipe, suite, launcher, console)
        return elsewhere > 0

    failed: Exception | None = None
    stopped = False
    heard: list[signal.Signals] = []
    with on_stop_signals(heard.append):
        while True:
            if heard:
                for child in running.values():
                    child.stop(at_once=any(number not in PATIENT for number in heard[1:]))
            for name, child in list(running.items()):
                if child.ended():
                    del running[name]
                    failed = failed or child.failure()
                    stopped = stopped or not suite.is_over(name)  # only this run was stopped
            is_waiting = False
            if not heard and failed is None and not stopped:
                try:
                    is_waiting = begin_more()
                except (OSError, ValueError) as error:
                    failed = error
            if not running and not is_waiting:
                break
            time.sleep(_POLL_S)
    if failed is not None:
        raise failed
    return not suite.left()


class _ChildDriver:
    def __init__(
        self, recipe: Recipe, suite: SuiteRuns, launcher: Launcher, console: Console
    ) -> None:
        job, name = suite.job(recipe), recipe.name
        self.folder, self._is_over = Path(job.run), partial(suite.is_over, name)
        self._files, runs = RunFolder(self.folder), suite.folder.parent
        self._files.stop_request.unlink(missing_ok=True)
        write_job(job)
        self._shown = Shown(self.folder, console, store=tracking_uri(runs), name=name)
        words = ["resume", str(self.folder), "--runs", str(runs)]
        words += [*launcher.resume_options(), *trust_words(suite.trust)]
        with self._files.launch_log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the suite only, which passes it on
                preexec_fn=_end_with_suite,
            )
        self._is_terminated = False

    def ended(self) -> bool:
        if self._process.poll() is None:
            self._shown.look()
            return False
        self._shown.close()
        return True

    def stop(self, *, at_once: bool) -> None:
        """Ask the run to save after this step; `at_once`: end it without saving."""
        with suppress(OSError):  # the storage is away: the next turn asks again
            self._files.stop_request.touch()
        if at_once and not self._is_terminated:
            self._is_terminated = True
            self._process.terminate()

    def failure(self) -> Exception | None:
        """None if the run is over or was stopped. A run that was refused has failed, even if it was
        also asked to stop.
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


_prctl = ctypes.CDLL(None).prctl  # loaded now: nothing may be loaded between fork and exec


def _end_with_suite() -> None:
    """Let the kernel send SIGUSR1 when the suite's process dies, so that the run is saved.

    SIGUSR1 never means "at once": the suite may have asked this run to save before.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
