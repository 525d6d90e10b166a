"""The driver of a run: the process that checks the recipe, makes the run's folder, starts the
workers and watches them. It does not train.

It holds `RUN/driver.lock`, follows the journal of the run to show progress and to fill MLflow, and
passes requests from signals (`driver_signals.py`) to the workers through files in the run's folder.
"""

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from rich.console import Console

from pipeline.core.checks import require
from pipeline.core.code_version import commit
from pipeline.core.errors import UserError
from pipeline.core.printing import new_console, say
from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.core.units import first_few
from pipeline.launch.cluster import OF_RAY, Cluster, LaunchError, WorkersEnded, option_name
from pipeline.launch.driver_signals import StopRequest, on_stop_signals
from pipeline.launch.in_process import Inline
from pipeline.launch.prepare import prepare, write_job
from pipeline.launch.progress import Shown
from pipeline.launch.ray import Ray
from pipeline.recipe.printed_commands import command
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import refuse_references
from pipeline.track.journal import read_events
from pipeline.track.mlflow import Mirror, tracking_uri
from pipeline.track.mlflow_store import without_password
from pipeline.track.prometheus import MetricsFile
from pipeline.train.backend.collectives import Ranks
from pipeline.train.build import check_recipe
from pipeline.train.checkpoint import claim, store_at
from pipeline.train.elastic import format_sizes
from pipeline.train.guards.storage_outage import retry_during_outage
from pipeline.train.guards.watchdog import unreported_hangs
from pipeline.train.job import Job, raise_refusal
from pipeline.train.tasks import Loaders, fingerprint_of, tasks_of
from pipeline.train.writer_lock import PATIENCE_S, journal

POLL_S = 0.25
MLFLOW_PATIENCE_S = 30.0
INSTANT_S = 1.0  # `spiketrain runs` takes the lock for an instant, to check for a driver
_BOOT = Path("/proc/sys/kernel/random/boot_id")
# Starts the workers of one run after another and waits for them. It is entered and left in the main
# thread of its process.
Launcher = Ray | Inline


def launcher_of(cluster: Cluster) -> Launcher:
    """Raises: ValueError if one worker in this process has an option that only Ray uses."""
    if not cluster.inline:
        return Ray(cluster)
    for name in OF_RAY:
        got = format_sizes(cluster.sizes) if name == "workers" else getattr(cluster, name)
        require(
            getattr(cluster, name) == getattr(Cluster, name),
            "cluster: --inline is one worker in this process, without Ray; got"
            f" {option_name(name)} {got}",
        )
    return Inline(device=cluster.device, loader_threads=cluster.loader_threads)


def launch_run(
    recipe: Recipe,
    cluster: Cluster,
    runs: Path,
    *,
    name: str | None = None,
    adopts: bool = False,
    trust: tuple[str, ...] = (),
) -> Path:
    """Train a recipe. Returns the run's folder. `prepare` explains `adopts`."""
    refuse_references(recipe)
    launcher = launcher_of(cluster)
    say_stage("checking the recipe and its data")
    check(recipe, cluster, trust=trust)
    with launcher:
        return train_alone(
            prepare(recipe, cluster, runs, name=name, adopts=adopts, trust=trust),
            launcher,
            address=cluster.address,
        )


def check(recipe: Recipe, cluster: Cluster, *, trust: tuple[str, ...]) -> None:
    """Refuse whatever can be refused before a file is written."""
    Recipe.from_json(recipe.to_json(), trust=trust)
    check_recipe(recipe, *cluster.sizes)
    fingerprint_of(recipe)
    Loaders(tasks_of(recipe), recipe, recipe.split(cluster.sizes[-1]))


def train_alone(job: Job, launcher: Launcher, *, address: str | None) -> Path:
    """Train one run on its own, not as a part of a suite. Returns its folder."""
    console, folder = new_console(), Path(job.run)
    if drive(job, launcher, console, address=address) is None:
        end_stopped(console, command("resume", folder, address=address))
    return folder


def end_stopped(console: Console, resume: str) -> NoReturn:
    """End the process with exit code 130 after a run or suite that was asked to stop.

    `resume` is the command that resumes it, which is printed.
    """
    say(console, f"stopped; resume with: {resume}", whole=[resume])
    raise SystemExit(130)


def drive(
    job: Job, launcher: Launcher, console: Console, *, address: str | None = None
) -> dict[str, Any] | None:
    """Run one job to its end, show it, mirror it to MLflow, and stop it on signals.

    Returns and raises what `Ray.run` does. `address` is the `--address` of the command that
    resumes it.
    """
    folder = Path(job.run)
    uri, resume = tracking_uri(folder.parent), command("resume", folder, address=address)
    job = replace(job, resume_command=resume, commit=commit())
    ignore_lost_terminal(console)
    print_line = partial(say, console)
    with driver_lock(folder):
        job = _with_checkpoint_token(job, print_line)
        files = RunFolder(folder)
        for message in (files.stop, files.save, files.refusal):
            message.unlink(missing_ok=True)
        write_job(job)
        shown = Shown(
            folder,
            console,
            store=uri,
            resume_command=resume,
            also=MetricsFile(folder, print_line).show,
        )
        request = StopRequest(folder, print_line)
        with _mirrored(folder, uri, print_line), closing(shown):
            try:
                with on_stop_signals(request.hear):
                    return _in_thread(
                        lambda: launcher.run(job, attempt=uuid.uuid4().hex[:8]),
                        meanwhile=(request.report, shown.look),
                    )
            except LaunchError as failure:
                hung = _journal_failure(folder, failure)
                if isinstance(failure, WorkersEnded) and failure.is_for_the_user:
                    raise UserError(str(failure)) from failure
                if isinstance(failure, WorkersEnded) and hung:
                    raise LaunchError(hung) from failure
                raise


@contextmanager
def _mirrored(folder: Path, uri: str, print_line: Callable[[str], None]) -> Iterator[None]:
    """Deliver the run to MLflow while the block runs, and the rest at its end."""
    mirror = Mirror(folder, uri=uri)
    try:
        yield
    finally:
        if not mirror.close(timeout=MLFLOW_PATIENCE_S):
            print_line(
                f"MLflow at {without_password(uri)} has not answered; `spiketrain sync"
                f" {folder}` delivers the rest later"
            )


def _with_checkpoint_token(job: Job, say: Callable[[str], None]) -> Job:
    """Claim the place of the checkpoints, if it is not the run's folder, and give the job the
    token. An earlier driver can then no longer write there.
    """
    if not job.checkpoints:
        return job
    place = store_at(job.checkpoints, Path(job.run))
    return replace(
        job,
        store_token=retry_during_outage(
            Ranks(),
            lambda: claim(place, run=job.run, run_id=job.run_id, study=job.study),
            on_wait=lambda error: say(
                f"{place.address('')} does not answer, and is waited for: {error}"
            ),
        ),
    )


def _journal_failure(folder: Path, failure: LaunchError) -> str:
    """Journal the cause of the workers' end.

    Returns: the message for workers that hung since the last call; empty if none did. Ray and the
    other workers report a lost connection only.

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
    if not hung:
        return ""
    # A worker that waits for a hung one gives no sign of life either, and may be ended first.
    ranks = ", ".join(map(str, sorted(set(hung.values()))))
    return (
        f"worker {ranks}, or one that was waited for: no sign of life for too long"
        " (--hang-minutes); what its threads were at is in"
        f" {first_few([str(folder / file) for file in hung], most=4)}"
    )


def _in_thread(
    work: Callable[[], dict[str, Any] | None], *, meanwhile: tuple[Callable[[], None], ...]
) -> dict[str, Any] | None:
    """Run `work` in a daemon thread, while the main thread handles signals. In the main thread, a
    signal would end Ray's `fit`.
    """
    outcome: Future[dict[str, Any] | None] = Future()

    def target() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # the main thread raises it
            outcome.set_exception(error)

    threading.Thread(target=target, daemon=True, name="launcher").start()
    while not outcome.done():
        wait([outcome], POLL_S)
        for act in meanwhile:
            act()
    return outcome.result()


# ---------------------------------------------------------------------------------------- the lock


@contextmanager
def driver_lock(folder: Path) -> Iterator[None]:
    """Lock the folder of a run or suite against every other driver, on any machine.

    The kernel releases the lock of a process that dies. The lock of a machine that dies stays until
    the file system releases it. By then a scheduler may have started the same command elsewhere.
    So the lock names its machine. If a driver on this machine holds it, this driver is refused at
    once. If a driver elsewhere holds it, this driver waits for up to ten minutes.

    Raises:
        UserError: another driver holds it.
    """
    with RunFolder(folder).driver_lock.open("a+") as handle:
        _acquire(handle, folder)
        handle.truncate(0)
        handle.write(this_machine())
        handle.flush()
        os.fsync(handle.fileno())
        yield


def this_machine() -> str:
    """The host's name and its boot: a lock from before the last boot is another machine's."""
    return f"{socket.gethostname()} {_BOOT.read_text().strip() if _BOOT.exists() else ''}"


def _acquire(handle: IO[str], folder: Path) -> None:
    begun, is_printed = time.monotonic(), False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited_s = time.monotonic() - begun
        if waited_s > INSTANT_S:
            handle.seek(0)
            holder = handle.read()
            host = holder.partition(" ")[0]
            rule = f"{folder.name}: is being trained by another process on"
            if holder == this_machine() or not host:
                raise UserError(f"{rule} this machine")
            if waited_s > PATIENCE_S:
                raise UserError(f"{rule} {host}, which still holds it after {waited_s:.0f} s")
            if not is_printed:
                print(
                    f"{folder.name}: is held by {host}: waiting for up to {PATIENCE_S:.0f} s, in"
                    " which a dead machine loses it",
                    flush=True,
                )
                is_printed = True
        time.sleep(0.5 if is_printed else 0.05)


# ------------------------------------------------------------------------------------ the terminal


def ignore_lost_terminal(console: Console) -> None:
    """Keep later prints on this console from raising. The disk of a log may be full, the reader of
    a pipe gone, or an ssh session closed.

    The first error is reported on stderr. After that nothing is printed.
    """
    if not isinstance(console.file, _LosableFile):
        console.file = cast(IO[str], _LosableFile(console.file))


class _LosableFile:
    """Writes to `file` until that fails, then to nowhere. rich (15.0) would end the process at a
    broken pipe.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            lost, self._file = self._file, Path(os.devnull).open("w")  # noqa: SIM115
            with suppress(OSError):
                os.write(
                    2,
                    f"shown no more: {error.strerror or error}; training goes on, and its journal"
                    " has everything\n".encode(),
                )
            # Python 3.11 would try to write the buffered text at exit, and end with exit code 120.
            with suppress(OSError, ValueError):  # the file may have no descriptor
                os.dup2(self._file.fileno(), lost.fileno())
