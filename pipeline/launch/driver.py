"""The driver's part while the workers of a run train.

It trains nothing. It holds `RUN/driver.lock`, follows the run's journal to show how it goes and to
feed MLflow, and passes on what signals ask (`signals.py`), through files in the run's folder.

One driver for the folder of a run or a suite, whichever machine another one is started on.

The kernel lets go of a process's lock when it dies. That of a machine which dies stays until the
file system gives it up, and by then a scheduler has started the same words elsewhere: so the lock
says whose it is, and another machine's is waited for.

A terminal that may be lost while a run trains: a full disk beneath a log, a pipe that nobody
reads, an ssh that ended.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console

from pipeline.core.code_version import commit
from pipeline.core.errors import UserError
from pipeline.core.printing import say
from pipeline.launch.base import Launcher, LaunchError, WorkersEnded
from pipeline.launch.prepare import write_job
from pipeline.launch.progress import Shown
from pipeline.launch.signals import stops_on_signal
from pipeline.track.connect import without_password
from pipeline.track.exposition import Exposed
from pipeline.track.journal import read
from pipeline.track.mlflow import Mirror
from pipeline.train.backend.collectives import Ranks
from pipeline.train.checkpoint import claim, place_at
from pipeline.train.guards.storage import patiently
from pipeline.train.guards.watchdog import untold
from pipeline.train.job import REFUSAL, SAVE, STOP, Job, raise_refusal
from pipeline.train.writer_lock import PATIENCE_S, journal

POLL_S = 0.25
MLFLOW_PATIENCE_S = 30.0


def drive(
    job: Job, launcher: Launcher, console: Console, *, uri: str, resume_command: str
) -> dict[str, Any] | None:
    """Run one job to its end, watched, mirrored to MLflow at `uri` and stoppable.

    See `Launcher.run` for what comes back or is raised.
    """
    folder = Path(job.run)
    job = replace(job, resume_command=resume_command, commit=commit())
    ignore_lost_terminal(console)
    tell = partial(say, console)
    exposed = Exposed(folder, tell)
    with driver_lock(folder):
        job = _owning(job, tell)
        for note in (STOP, SAVE, REFUSAL):
            (folder / note).unlink(missing_ok=True)
        write_job(job)
        with (
            _mirrored(folder, uri, tell),
            closing(
                Shown(folder, console, store=uri, resume_command=resume_command, also=exposed.show)
            ) as shown,
        ):
            try:
                with stops_on_signal(folder, tell) as request:
                    return _in_thread(
                        lambda: launcher.run(job, attempt=uuid.uuid4().hex[:8]),
                        meanwhile=(request.tell, shown.look),
                    )
            except LaunchError as failure:
                hung = _tell_what_ended(folder, failure)
                if not isinstance(failure, WorkersEnded):
                    raise
                if failure.is_for_the_user:
                    raise UserError(str(failure)) from failure
                if hung:
                    raise LaunchError(_in_words(hung, job)) from failure
                raise


def _owning(job: Job, say: Callable[[str], None]) -> Job:
    """The job with a token for its workers, where its checkpoints lie elsewhere: that place is this
    driver's from now on.
    """
    if not job.checkpoints:
        return job
    place = place_at(job.checkpoints, Path(job.run))
    token = patiently(
        Ranks(),
        lambda: claim(place, run=job.run, run_id=job.run_id, study=job.study),
        on_wait=lambda error: say(
            f"{place.address('')} does not answer, and is waited for: {error}"
        ),
    )
    return replace(job, place_token=token)


@contextmanager
def _mirrored(folder: Path, uri: str, say: Callable[[str], None]) -> Iterator[None]:
    """MLflow is filled from the journal inside, and at the end has some time for the rest."""
    mirror = Mirror(folder, uri=uri)
    try:
        yield
    finally:
        if not mirror.close(timeout=MLFLOW_PATIENCE_S):
            say(
                f"MLflow at {without_password(uri)} has not answered; `spiketrain sync {folder}`"
                " delivers the rest later"
            )


def _tell_what_ended(folder: Path, failure: LaunchError) -> dict[str, int]:
    """Write down what ended the workers, for which no attempt is left; the hangs among it (see
    `untold`).

    Raises:
        UserError: a rank that found why the run cannot go on died of it.
    """
    hung: dict[str, int] = {}
    try:
        hung = untold(folder, read(folder / "journal.jsonl"))
        with journal(folder, Ranks()):  # the workers are gone: nobody else writes it
            raise_refusal(folder)
    except OSError as unwritten:  # a full disk, which may be the very error that is told
        failure.add_note(f"the journal could not be told of it: {unwritten}")
    return hung


def _in_words(hung: dict[str, int], job: Job) -> str:
    """Of which Ray, and the workers that waited for these, know no more than that a connection was
    lost.

    Who waits for another gives no sign of life either, and may be the first to be ended.
    """
    files, ranks = [str(Path(job.run) / file) for file in hung], sorted(set(hung.values()))
    more = f" and {len(files) - 4} more" if len(files) > 4 else ""
    return (
        f"worker {', '.join(map(str, ranks))}, or one that was waited for: no sign of life for too"
        f" long (--hang-minutes); what its threads were at is in {', '.join(files[:4])}{more}"
    )


def _in_thread(
    work: Callable[[], dict[str, Any] | None], *, meanwhile: tuple[Callable[[], None], ...]
) -> dict[str, Any] | None:
    """Work in a daemon thread while the main thread stays free for signals (Ray's `fit` in the main
    thread would die of them).
    """
    outcome: dict[str, Any] = {}

    def target() -> None:
        try:
            outcome["value"] = work()
        except BaseException as error:  # handed to the main thread, which raises it
            outcome["error"] = error

    thread = threading.Thread(target=target, daemon=True, name="launcher")
    thread.start()
    while thread.is_alive():
        thread.join(POLL_S)
        for act in meanwhile:
            act()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


INSTANT_S = 1.0
"""`spiketrain runs` holds it for an instant, to see whether anybody does"""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def driver_lock(folder: Path) -> Iterator[None]:
    """Hold the folder against every other driver; one on this machine is refused at once, one
    elsewhere has ten minutes to go.

    Raises:
        UserError: somebody else holds it.
    """
    with (folder / "driver.lock").open("a+") as handle:
        _take(handle, folder)
        handle.truncate(0)
        handle.write(this_machine())
        handle.flush()
        os.fsync(handle.fileno())
        yield


def this_machine() -> str:
    """Its name, and which of its starts this is: what it held before the last one is a dead
    machine's, too.
    """
    return f"{socket.gethostname()} {_BOOT.read_text().strip() if _BOOT.exists() else ''}"


def _take(handle: IO[str], folder: Path) -> None:
    begun, is_told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited_s = time.monotonic() - begun
        if waited_s > INSTANT_S:
            host = _other_machine(handle)
            if host is None:
                raise UserError(
                    f"{folder.name}: is being trained by another process on this machine"
                )
            if waited_s > PATIENCE_S:
                told = (
                    f"is being trained by another process on {host}, which still holds it after"
                    f" {waited_s:.0f} s"
                )
                raise UserError(f"{folder.name}: {told}")
            if not is_told:
                told = (
                    f"is held by {host}: waiting for up to {PATIENCE_S:.0f} s, in which a dead"
                    " machine loses it"
                )
                print(f"{folder.name}: {told}", flush=True)
                is_told = True
        time.sleep(0.5 if is_told else 0.05)


def _other_machine(handle: IO[str]) -> str | None:
    """The name of the one that holds it; None: it is this one, or nobody can tell."""
    handle.seek(0)
    holder = handle.read()
    return None if holder == this_machine() else holder.partition(" ")[0] or None


_STDERR = 2


def ignore_lost_terminal(console: Console) -> None:
    """From here on nothing that is printed on it raises: once it takes no more, that is said on
    stderr, and all is quiet.
    """
    if not isinstance(console.file, _LosableFile):
        console.file = cast(IO[str], _LosableFile(console.file))


class _LosableFile:
    """Writes to `file` until it fails. So rich (15.0), too, never meets a broken pipe, of which it
    ends the process.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file, self._is_lost = file, False

    def write(self, text: str) -> int:
        self._unless_lost(lambda: self._file.write(text))
        return len(text)

    def flush(self) -> None:
        self._unless_lost(self._file.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _unless_lost(self, act: Callable[[], object]) -> None:
        if self._is_lost:
            return
        try:
            act()
        except OSError as error:
            self._is_lost = True
            with suppress(OSError):
                told = (
                    f"shown no more: {error.strerror or error}; training goes on, and its journal"
                    " has everything\n"
                )
                os.write(_STDERR, told.encode())
            self._empty()

    def _empty(self) -> None:
        """What its buffer holds goes nowhere: the interpreter would try again as it ends, and end
        with 120 (Python 3.11).
        """
        with suppress(OSError, ValueError):  # it may have no descriptor
            descriptor, nowhere = self._file.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
