"""Several runs of a suite at the same time, each driven by a `spiketrain resume` of its own.

Each worker keeps to cores of its own (pipeline.core.cores), or gets a GPU of its own from Ray. The
cost of a run is thus measured while others use the same memory bus, but never the same cores.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from rich.console import Console

from pipeline.core.errors import UserError
from pipeline.core.printing import say
from pipeline.core.run_folder import RunFolder
from pipeline.launch.base import CountOrAuto, Launcher, LaunchError
from pipeline.launch.progress import Shown
from pipeline.launch.signals import PATIENT, on_stop_signals
from pipeline.launch.suite_runs import SuiteRuns
from pipeline.recipe.command_line import trust_words
from pipeline.recipe.recipe import Recipe
from pipeline.track.mlflow import tracking_uri
from pipeline.track.state import is_driven
from pipeline.train.job import Job, was_stopped
from pipeline.train.writer_lock import PATIENCE_S

LEAVING_S = PATIENCE_S
"""In which the driver of a run saves and ends after its suite was killed, and a machine that died
loses its lock.
"""
_POLL_S = 0.25
_PR_SET_PDEATHSIG = 1


def parallel_runs(launcher: Launcher, wanted: CountOrAuto) -> int:
    """The number of runs that train at once. `auto`: as many as there is room for.

    Raises:
        UserError: there is no room for so many.
    """
    if wanted == 1:
        return 1
    room = launcher.room()
    if wanted == "auto":
        return max(1, room)
    if wanted > room:
        raise UserError(
            f"launch: {wanted} runs side by side need cores and cards of their own; there is room"
            f" for {room}"
        )
    return wanted


def train_side_by_side(
    children: SuiteRuns, launcher: Launcher, slots: int, console: Console
) -> bool:
    """Train the runs that are left, `slots` at a time. Returns False if asked to stop.

    After the first failure no further run begins. The error is raised once the others have ended.

    Raises:
        LaunchError: a run failed; the line is the last one of its driver.
        UserError: a run was refused.
    """
    running: dict[str, _ChildDriver] = {}
    others = _OtherDrivers(console)
    failed: Exception | None = None
    stopped = False
    with _stop_requests() as requests:
        while True:
            if requests():
                for each in running.values():
                    each.stop(at_once=requests() > 1)
            for name, each in list(running.items()):
                if not each.ended():
                    continue
                del running[name]
                failed = failed or each.failure()
                stopped = stopped or not children.is_over(name)  # the run alone was asked to stop
            is_waiting = False
            if not requests() and failed is None and not stopped:
                try:
                    is_waiting = _begin_more(children, launcher, slots, running, others, console)
                except (OSError, ValueError) as error:
                    failed = error
            if not running and not is_waiting:
                break
            time.sleep(_POLL_S)
    if failed is not None:
        raise failed
    return not children.left()


def _begin_more(
    children: SuiteRuns,
    launcher: Launcher,
    slots: int,
    running: dict[str, _ChildDriver],
    others: _OtherDrivers,
    console: Console,
) -> bool:
    """Fill the free slots, in the suite's order. Returns whether other processes still drive runs.

    Raises: OSError or ValueError if a run cannot begin.
    """
    elsewhere = 0
    for recipe in children.left():
        if len(running) + elsewhere == slots:
            break
        if recipe.name in running or not children.can_begin(recipe):
            continue
        if others.drive(children.where[recipe.name], recipe.name):
            elsewhere += 1
        else:
            job = children.job(recipe)
            running[recipe.name] = _ChildDriver(recipe, job, children, launcher, console)
    return elsewhere > 0


class _OtherDrivers:
    """Drivers that this suite has not started: most likely of a suite that was killed, which save
    their runs and end.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._since: dict[str, float] = {}

    def drive(self, run: Path, name: str) -> bool:
        """Whether another process drives this run.

        Raises:
            UserError: it has done so for more than LEAVING_S.
        """
        if not is_driven(run):
            self._since.pop(name, None)
            return False
        if name not in self._since:
            self._since[name] = time.monotonic()
            say(
                self._console,
                f"{name}  another process still trains it: waiting for up to {LEAVING_S:.0f} s",
            )
        if time.monotonic() - self._since[name] > LEAVING_S:
            raise UserError(
                f"{run.name}: is being trained by another process, which still does after"
                f" {LEAVING_S:.0f} s"
            )
        return True


class _ChildDriver:
    """The process that drives one run of the suite."""

    def __init__(
        self, recipe: Recipe, job: Job, children: SuiteRuns, launcher: Launcher, console: Console
    ) -> None:
        self.folder, self._is_over = Path(job.run), partial(children.is_over, recipe.name)
        self._files = RunFolder(self.folder)
        self._files.stop.unlink(missing_ok=True)
        self._shown = Shown(
            self.folder, console, store=tracking_uri(children.runs), name=recipe.name
        )
        words = ["resume", str(self.folder), "--runs", str(children.runs)]
        words += [*launcher.resume_options(), *trust_words(children.trust)]
        self._log = self._files.launch_log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
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
        self._log.close()
        return True

    def stop(self, *, at_once: bool) -> None:
        """Ask the run to save after this step; `at_once`: end it without saving."""
        with suppress(OSError):  # storage is away: asked again at the next turn
            self._files.stop.touch()
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
            return LaunchError(
                f"{self.folder.name}: its process was killed by {signal.Signals(-code).name}"
            )
        lines = self._files.launch_log.read_text(errors="replace").strip().splitlines()
        line = f"{self.folder.name}: {lines[-1] if lines else f'exit status {code}'}"
        return UserError(line) if code == 2 else LaunchError(line)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], int]]:
    """The number of requests to stop. Signals that never mean "at once" count as one."""
    requests = 0

    def hear(number: signal.Signals) -> None:
        nonlocal requests
        requests = max(1, requests) if number in PATIENT else requests + 1

    with on_stop_signals(hear):
        yield lambda: requests


_prctl = ctypes.CDLL(None).prctl  # loaded now: nothing may be loaded between fork and exec


def _end_with_suite() -> None:
    """Let the kernel send SIGUSR1 when the suite's process dies, so that the run is saved.

    SIGUSR1 never means "at once": the suite may have asked this run to save before.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
