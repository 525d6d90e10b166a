"""The driver of a run: the process that checks the recipe, makes the run's folder, starts the
workers and watches them. It does not train.

It holds `RUN/driver.lock`, follows the journal of the run to show progress and to fill MLflow, and
passes on what signals ask (`signals.py`) through files in the run's folder.
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
from pipeline.core.printing import new_console, say
from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.launch.base import Launcher, LaunchError, WorkersEnded
from pipeline.launch.cluster import Cluster
from pipeline.launch.prepare import prepare, write_job
from pipeline.launch.progress import Shown
from pipeline.launch.signals import stops_on_signal
from pipeline.recipe.command_line import command
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import refuse_references
from pipeline.track.connect import without_password
from pipeline.track.exposition import Exposed
from pipeline.track.journal import read_events
from pipeline.track.mlflow import Mirror, tracking_uri
from pipeline.train.backend.collectives import Ranks
from pipeline.train.build import check_recipe
from pipeline.train.checkpoint import claim, place_at
from pipeline.train.guards.storage import patiently
from pipeline.train.guards.watchdog import unreported_hangs
from pipeline.train.job import Job, raise_refusal
from pipeline.train.part_checks import fingerprint_of
from pipeline.train.tasks import Loaders, build_data, tasks_of
from pipeline.train.writer_lock import PATIENCE_S, journal

POLL_S = 0.25
MLFLOW_PATIENCE_S = 30.0
INSTANT_S = 1.0
"""`spiketrain runs` takes a lock for an instant, to see whether a driver holds it."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_STDERR = 2


def launch_run(
    recipe: Recipe,
    cluster: Cluster,
    runs: Path,
    *,
    name: str | None = None,
    adopts: bool = False,
    trust: tuple[str, ...] = (),
) -> Path | None:
    """Train a recipe. Returns the run's folder, or None if it was asked to stop.

    `prepare` explains `adopts`.
    """
    refuse_references(recipe)
    launcher = cluster.launcher()
    say_stage("checking the recipe and its data")
    check(recipe, cluster, trust=trust)
    with launcher:
        job = prepare(recipe, cluster, runs, name=name, adopts=adopts, trust=trust)
        return train_to_end(job, launcher, runs, address=cluster.address)


def check(recipe: Recipe, cluster: Cluster, *, trust: tuple[str, ...]) -> None:
    """Refuse whatever can be refused before a file is written."""
    Recipe.from_json(recipe.to_json(), trust=trust)
    check_recipe(recipe, *cluster.sizes)
    fingerprint_of(build_data(recipe))
    Loaders(tasks_of(recipe), recipe, recipe.split(cluster.sizes[-1]))


def train_to_end(job: Job, launcher: Launcher, runs: Path, *, address: str | None) -> Path | None:
    """Train a run that the user has asked for alone. Returns its folder, or None if it was asked to
    stop; then the command that resumes it is printed.
    """
    console, folder = new_console(), Path(job.run)
    if train(job, launcher, runs, console, address=address):
        return folder
    resume = command("resume", runs / folder.name, address=address)
    say(console, f"stopped; resume with: {resume}", whole=[resume])
    return None


def train(
    job: Job, launcher: Launcher, runs: Path, console: Console, *, address: str | None
) -> bool:
    """Train a run to its end. Returns False if it was asked to stop before.

    `address` is the `--address` of the command that resumes it.
    """
    resume = command("resume", runs / Path(job.run).name, address=address)
    return drive(job, launcher, console, uri=tracking_uri(runs), resume_command=resume) is not None


def drive(
    job: Job, launcher: Launcher, console: Console, *, uri: str, resume_command: str
) -> dict[str, Any] | None:
    """Run one job to its end. It is shown, mirrored to MLflow at `uri`, and stops on signals.

    Returns and raises what `Launcher.run` does.
    """
    folder = Path(job.run)
    job = replace(job, resume_command=resume_command, commit=commit())
    ignore_lost_terminal(console)
    tell = partial(say, console)
    exposed = Exposed(folder, tell)
    with driver_lock(folder):
        job = _with_checkpoint_token(job, tell)
        files = RunFolder(folder)
        for message in (files.stop, files.save, files.refusal):
            message.unlink(missing_ok=True)
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
                        meanwhile=(request.report, shown.look),
                    )
            except LaunchError as failure:
                hung = _journal_failure(folder, failure)
                if not isinstance(failure, WorkersEnded):
                    raise
                if failure.is_for_the_user:
                    raise UserError(str(failure)) from failure
                if hung:
                    raise LaunchError(_describe_hang(hung, job)) from failure
                raise


def _with_checkpoint_token(job: Job, say: Callable[[str], None]) -> Job:
    """Claim the place of the checkpoints, if that is not the run's folder, and give the job its
    token. An earlier driver may no longer write there.
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
    """Fill MLflow from the journal meanwhile. At the end it gets some time for the rest."""
    mirror = Mirror(folder, uri=uri)
    try:
        yield
    finally:
        if not mirror.close(timeout=MLFLOW_PATIENCE_S):
            say(
                f"MLflow at {without_password(uri)} has not answered; `spiketrain sync {folder}`"
                " delivers the rest later"
            )


def _journal_failure(folder: Path, failure: LaunchError) -> dict[str, int]:
    """Write to the journal what ended the workers. Returns the hangs among it (`unreported_hangs`).

    Raises:
        UserError: a worker refused to continue, for a reason that the user can change.
    """
    hung: dict[str, int] = {}
    try:
        hung = unreported_hangs(folder, read_events(RunFolder(folder).journal))
        with journal(folder, Ranks()):  # the workers are gone: nobody else writes it
            raise_refusal(folder)
    except OSError as error:  # a full disk, which may have caused the failure itself
        failure.add_note(f"the journal could not be written: {error}")
    return hung


def _describe_hang(hung: dict[str, int], job: Job) -> str:
    """The message for workers that hung. Ray and the other workers report a lost connection only.

    A worker that waits for a hung one gives no sign of life either, and may be ended first.
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
    """Run `work` in a daemon thread. The main thread handles signals, which would end Ray's `fit`
    there.
    """
    outcome: dict[str, Any] = {}

    def target() -> None:
        try:
            outcome["value"] = work()
        except BaseException as error:  # the main thread raises it
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


# ---------------------------------------------------------------------------------------- the lock


@contextmanager
def driver_lock(folder: Path) -> Iterator[None]:
    """Hold the folder of a run or suite against every other driver, on any machine.

    The kernel frees the lock of a process that dies. The lock of a machine that dies stays until
    the file system gives it up. By then a scheduler may have started the same command elsewhere.
    So the lock names its machine: a driver on this machine is refused at once, one elsewhere is
    waited for, up to ten minutes.

    Raises:
        UserError: another driver holds it.
    """
    with RunFolder(folder).driver_lock.open("a+") as handle:
        _take(handle, folder)
        handle.truncate(0)
        handle.write(this_machine())
        handle.flush()
        os.fsync(handle.fileno())
        yield


def this_machine() -> str:
    """The host's name and its boot: a lock from before the last boot is another machine's."""
    return f"{socket.gethostname()} {_BOOT.read_text().strip() if _BOOT.exists() else ''}"


def _take(handle: IO[str], folder: Path) -> None:
    begun, is_said = time.monotonic(), False
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
                raise UserError(
                    f"{folder.name}: is being trained by another process on {host}, which still"
                    f" holds it after {waited_s:.0f} s"
                )
            if not is_said:
                print(
                    f"{folder.name}: is held by {host}: waiting for up to {PATIENCE_S:.0f} s, in"
                    " which a dead machine loses it",
                    flush=True,
                )
                is_said = True
        time.sleep(0.5 if is_said else 0.05)


def _other_machine(handle: IO[str]) -> str | None:
    """The host that holds the lock; None if it is this one or unknown."""
    handle.seek(0)
    holder = handle.read()
    return None if holder == this_machine() else holder.partition(" ")[0] or None


# ------------------------------------------------------------------------------------ the terminal


def ignore_lost_terminal(console: Console) -> None:
    """Let no later print on this console raise: the disk of a log may be full, the reader of a pipe
    gone, an ssh session closed.

    The first error is reported on stderr. After that nothing is printed.
    """
    if not isinstance(console.file, _LosableFile):
        console.file = cast(IO[str], _LosableFile(console.file))


class _LosableFile:
    """Writes to `file` until that fails.

    rich (15.0) would end the process at a broken pipe.
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
            line = (
                f"shown no more: {error.strerror or error}; training goes on, and its journal"
                " has everything\n"
            )
            with suppress(OSError):
                os.write(_STDERR, line.encode())
            self._discard_buffer()

    def _discard_buffer(self) -> None:
        """Send the buffered text to /dev/null. Python 3.11 would try to write it at exit, and end
        with exit code 120.
        """
        with suppress(OSError, ValueError):  # the file may have no descriptor
            descriptor, nowhere = self._file.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
