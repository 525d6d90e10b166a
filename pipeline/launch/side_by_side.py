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
from dataclasses import dataclass, field
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
from pipeline.track.mlflow import tracking_uri
from pipeline.track.state import is_driven
from pipeline.train.job import Job, was_stopped
from pipeline.train.writer_lock import PATIENCE_S

LEAVING_S = PATIENCE_S
"""Time in which the driver of a run saves and ends after its suite was killed, and in which a dead
machine loses its lock.
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


def train_side_by_side(suite: SuiteRuns, launcher: Launcher, slots: int, console: Console) -> bool:
    """Train the runs that are left, `slots` at a time. Returns False if asked to stop.

    After the first failure no further run begins. The error is raised once the others have ended.

    Raises:
        LaunchError: a run failed; the line is the last one of its driver.
        UserError: a run was refused.
    """
    return _SideBySide(suite, launcher, slots, console).train()


@dataclass
class _SideBySide:
    suite: SuiteRuns
    launcher: Launcher
    slots: int
    console: Console
    running: dict[str, _ChildDriver] = field(default_factory=dict)
    driven_since: dict[str, float] = field(default_factory=dict)
    """When another process was first seen to drive a run. Most likely it is the driver of a killed
    suite, which saves its run and ends.
    """

    def train(self) -> bool:
        failed: Exception | None = None
        stopped = False
        with _stop_requests() as requests:
            while True:
                if requests():
                    for each in self.running.values():
                        each.stop(at_once=requests() > 1)
                for name, each in list(self.running.items()):
                    if each.ended():
                        del self.running[name]
                        failed = failed or each.failure()
                        stopped = stopped or not self.suite.is_over(
                            name
                        )  # only this run was stopped
                is_waiting = False
                if not requests() and failed is None and not stopped:
                    try:
                        is_waiting = self._begin_more()
                    except (OSError, ValueError) as error:
                        failed = error
                if not self.running and not is_waiting:
                    break
                time.sleep(_POLL_S)
        if failed is not None:
            raise failed
        return not self.suite.left()

    def _begin_more(self) -> bool:
        """Fill the free slots, in the suite's order. Returns whether other processes drive runs.

        Raises: OSError or ValueError if a run cannot begin.
        """
        elsewhere = 0
        for recipe in self.suite.left():
            if len(self.running) + elsewhere == self.slots:
                break
            if recipe.name in self.running or not self.suite.can_begin(recipe):
                continue
            if self._is_driven_elsewhere(recipe.name):
                elsewhere += 1
            else:
                job = self.suite.job(recipe)
                child = _ChildDriver(recipe.name, job, self.suite, self.launcher, self.console)
                self.running[recipe.name] = child
        return elsewhere > 0

    def _is_driven_elsewhere(self, name: str) -> bool:
        """Whether another process drives the run.

        Raises: UserError if it has done so for more than LEAVING_S.
        """
        run = self.suite.where[name]
        if not is_driven(run):
            self.driven_since.pop(name, None)
            return False
        if name not in self.driven_since:
            self.driven_since[name] = time.monotonic()
            text = f"another process still trains it: waiting for up to {LEAVING_S:.0f} s"
            say(self.console, f"{name}  {text}")
        if time.monotonic() - self.driven_since[name] > LEAVING_S:
            raise UserError(
                f"{run.name}: is being trained by another process, which still does after"
                f" {LEAVING_S:.0f} s"
            )
        return True


class _ChildDriver:
    """The process that drives one run of the suite."""

    def __init__(
        self, name: str, job: Job, suite: SuiteRuns, launcher: Launcher, console: Console
    ) -> None:
        self.folder, self._is_over = Path(job.run), partial(suite.is_over, name)
        self._files = RunFolder(self.folder)
        self._files.stop.unlink(missing_ok=True)
        runs = suite.folder.parent
        self._shown = Shown(self.folder, console, store=tracking_uri(runs), name=name)
        words = ["resume", str(self.folder), "--runs", str(runs)]
        words += [*launcher.resume_options(), *trust_words(suite.trust)]
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
        with suppress(OSError):  # the storage is away: the next turn asks again
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
