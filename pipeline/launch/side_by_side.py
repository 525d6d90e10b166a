"""Several runs of a suite at the same time, each driven by a process of its own that resumes it as
a user would.

Each worker keeps to cores of its own (pipeline.core.cores), or has a card of its own from Ray: what
one
run costs is measured while others run, on the same memory bus, and never on the same cores.
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
from typing import Literal

from rich.console import Console

from pipeline.core.errors import UserError
from pipeline.core.printing import say
from pipeline.core.run_folder import RunFolder
from pipeline.launch.base import Launcher, LaunchError
from pipeline.launch.children import Children
from pipeline.launch.progress import Shown
from pipeline.launch.signals import PATIENT, wishes
from pipeline.recipe.command_line import trust_words
from pipeline.recipe.recipe import Recipe
from pipeline.track.mlflow import tracking_uri
from pipeline.track.state import is_driven
from pipeline.train.job import Job, was_stopped
from pipeline.train.writer_lock import PATIENCE_S

LEAVING_S = PATIENCE_S
"""in which a run saves and tells MLflow, after the suite that began it was killed, or a machine
that died loses it
"""
_POLL_S = 0.25
_PR_SET_PDEATHSIG = 1


def slots_of(launcher: Launcher, wanted: int | Literal["auto"]) -> int:
    """How many runs train at once; with "auto" one, where there is no room for two.

    Raises:
        UserError: more than there is room for.
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
    children: Children, launcher: Launcher, slots: int, console: Console
) -> bool:
    """Whether all are over; False when asked to stop. At the first failure none is begun any more;
    the others end first.

    Raises:
        LaunchError: a run failed; the line is its process's last.
        UserError: a run was refused.
    """
    going: dict[str, _Driven] = {}
    leaving = _Leaving(console)
    failed: Exception | None = None
    stopped = False
    with _stop_requests() as asked:
        while True:
            if asked():
                for each in going.values():
                    each.stop(at_once=asked() > 1)
            for name, each in list(going.items()):
                if not each.ended():
                    continue
                del going[name]
                failed = failed or each.failure()
                stopped = stopped or not children.is_over(
                    name
                )  # by somebody who asked this run alone
            is_waiting = False
            if not asked() and failed is None and not stopped:
                try:
                    is_waiting = _begin_more(children, launcher, slots, going, leaving, console)
                except (OSError, ValueError) as error:
                    failed = error
            if not going and not is_waiting:
                break
            time.sleep(_POLL_S)
    if failed is not None:
        raise failed
    return not children.left()


def _begin_more(
    children: Children,
    launcher: Launcher,
    slots: int,
    going: dict[str, _Driven],
    leaving: _Leaving,
    console: Console,
) -> bool:
    """Fill the free slots, in the suite's order; whether one is left to a run that somebody else
    still drives.

    Raises: OSError, ValueError for what is refused, or fails, on the way.
    """
    left_to_others = 0
    for recipe in children.left():
        if len(going) + left_to_others == slots:
            break
        if recipe.name in going or not children.can_begin(recipe):
            continue
        if leaving.drives(children.where[recipe.name], recipe.name):
            left_to_others += 1
        else:
            going[recipe.name] = _Driven(recipe, children.job(recipe), children, launcher, console)
    return left_to_others > 0


class _Leaving:
    """Another process that drives a run: most likely a child of a suite that was killed, which was
    asked to save.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._since: dict[str, float] = {}

    def drives(self, run: Path, name: str) -> bool:
        """Whether it still does, and is waited for.

        Raises:
            UserError: it has been for too long.
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


class _Driven:
    """One run, which nobody else drives, and the process that does."""

    def __init__(
        self, recipe: Recipe, job: Job, children: Children, launcher: Launcher, console: Console
    ) -> None:
        self.folder, self._is_over = Path(job.run), partial(children.is_over, recipe.name)
        self._files = RunFolder(self.folder)
        self._files.stop.unlink(missing_ok=True)
        self._shown = Shown(
            self.folder, console, store=tracking_uri(children.runs), name=recipe.name
        )
        words = ["resume", str(self.folder), "--runs", str(children.runs), *launcher.joining()]
        self._log = self._files.launch_log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *words, *trust_words(children.trust)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            # Ctrl-C in a terminal reaches the suite alone, which passes it on
            start_new_session=True,
            preexec_fn=_end_with_the_suite,
        )
        self._asked_at_once = False

    def ended(self) -> bool:
        if self._process.poll() is None:
            self._shown.look()
            return False
        self._shown.close()
        self._log.close()
        return True

    def stop(self, *, at_once: bool) -> None:
        """Save after the step at hand, or give up what came since the last checkpoint."""
        with suppress(OSError):  # asked anew at every turn, of storage that may be back
            self._files.stop.touch()
        if at_once and not self._asked_at_once:
            self._asked_at_once = True
            self._process.terminate()

    def failure(self) -> Exception | None:
        """None where it is over or was stopped; one that was refused was not, whoever has asked for
        that.
        """
        code = self._process.returncode
        if code == 0 or (code != 2 and was_stopped(self.folder)) or self._is_over():
            return None
        if code < 0:
            return LaunchError(
                f"{self.folder.name}: its process was killed by {signal.Signals(-code).name}"
            )
        lines = self._files.launch_log.read_text(errors="replace").strip().splitlines() or [
            f"exit status {code}"
        ]
        said = f"{self.folder.name}: {lines[-1]}"
        return UserError(said) if code == 2 else LaunchError(said)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], int]]:
    """How often somebody has asked to stop; what never means "at once" counts once."""
    asked = 0

    def hear(number: signal.Signals) -> None:
        nonlocal asked
        asked = max(1, asked) if number in PATIENT else asked + 1

    with wishes(hear):
        yield lambda: asked


_prctl = ctypes.CDLL(None).prctl  # now: between fork and exec nothing may be loaded


def _end_with_the_suite() -> None:
    """Ask the kernel for a signal when the suite's process dies: its run is saved, and can be gone
    on with.

    SIGUSR1 never means "at once": the suite may have asked this run to save already.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)
