"""The driver of a run: the process that checks the recipe, makes the run's folder, starts the
workers and watches them. It does not train, except with `--inline`.

The driver holds `RUN/driver.lock`. It follows the run's journal to show progress and to fill
MLflow. It passes requests from signals to the workers, as files in the run's folder:

Ctrl-C, SIGTERM     The run saves after the current step and stops. If another signal came before,
                    the run stops at once.
SIGUSR1, SIGHUP     The run saves and stops, and never stops at once. A scheduler sends SIGUSR1
                    before its time limit. A terminal that closes sends SIGHUP.
"""

import math
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn, Self, cast

import torch
from rich.console import Console

from pipeline.core.checks import require
from pipeline.core.code_version import commit
from pipeline.core.cpu_affinity import cores_here
from pipeline.core.errors import UserError
from pipeline.core.files import lock_within
from pipeline.core.printing import new_console, say
from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.core.torch_settings import keep_freed_memory
from pipeline.core.units import first_few
from pipeline.launch.cluster import (
    RAY_FIELDS,
    Cluster,
    CountOrAuto,
    Device,
    cores_and_loader_threads,
    option_name,
    refuse_unusable_gpus,
    workers_use_gpus,
)
from pipeline.launch.prepare import prepare, write_job
from pipeline.launch.progress import ProgressDisplay
from pipeline.launch.ray import LaunchError, Ray, WorkersEnded
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import command, refuse_references
from pipeline.track.journal import read_events
from pipeline.track.mlflow import Mirror, tracking_uri
from pipeline.track.mlflow_store import without_password
from pipeline.track.prometheus import MetricsFile
from pipeline.train.backend.collectives import Ranks, group_of_one
from pipeline.train.build import check_recipe
from pipeline.train.checkpoint import claim, store_at
from pipeline.train.elastic import format_sizes
from pipeline.train.guards.storage_outage import retry_during_outage
from pipeline.train.guards.watchdog import unreported_hangs
from pipeline.train.job import Job, RankInfo, raise_refusal, was_stopped
from pipeline.train.tasks import Loaders, fingerprint_of, tasks_of
from pipeline.train.worker import run
from pipeline.train.writer_lock import PATIENCE_S, journal

POLL_S = 0.25
MLFLOW_TIMEOUT_S = 30.0
# `spiketrain runs` holds the lock for less than this time, to check for a driver.
LOCK_CHECK_S = 1.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Inline:
    """Runs the only worker of a job in the calling thread, without Ray (`--inline`), for debugging.

    Raises:
        UserError: `device` is `gpu` without a GPU, or torch cannot use this machine's GPUs.
    """

    def __init__(self, *, device: Device = "auto", loader_threads: CountOrAuto = "auto") -> None:
        refuse_unusable_gpus(device)
        self.device = "cuda" if workers_use_gpus(device, 1, torch.cuda.device_count()) else "cpu"
        self.loader_threads: CountOrAuto = loader_threads
        self._group = ExitStack()

    def __enter__(self) -> Self:
        keep_freed_memory()  # before the thread that trains starts
        self._group.enter_context(group_of_one(self.device))
        return self

    def __exit__(self, *exc: object) -> None:
        self._group.close()

    def max_parallel_runs(self) -> int:
        return 1 if self.device == "cuda" else cores_here()

    def resume_options(self) -> list[str]:
        return ["--inline"]

    def run(self, job: Job, attempt: str) -> dict[str, Any] | None:
        del attempt
        if self.device == "cuda":
            cores, loader_threads = cores_and_loader_threads(
                [{"CPU": float(cores_here()), "GPU": float(torch.cuda.device_count())}],
                uses_gpus=True,
                loader_threads=self.loader_threads,
            )
            job = replace(job, threads=cores, loader_threads=loader_threads)
        return run(job, RankInfo(device=self.device))


# A launcher starts the workers of one run after another and waits for them. It is a context
# manager, which the main thread of the process enters and exits.
Launcher = Ray | Inline


def launcher_of(cluster: Cluster) -> Launcher:
    """The launcher that the options of a cluster ask for.

    Raises:
        ValueError: the options have `inline` and one that only Ray uses.
        UserError: with `inline`, the device is `gpu` without a GPU, or torch cannot use this
            machine's GPUs.
    """
    if not cluster.inline:
        return Ray(cluster)
    for name in RAY_FIELDS:
        got = format_sizes(cluster.sizes) if name == "workers" else getattr(cluster, name)
        require(
            getattr(cluster, name) == getattr(Cluster, name),
            "cluster: --inline trains one worker in this process, so options of Ray must not be"
            f" given; got {option_name(name)} {got}",
        )
    return Inline(device=cluster.device, loader_threads=cluster.loader_threads)


def launch_run(
    recipe: Recipe,
    cluster: Cluster,
    runs: Path,
    *,
    name: str | None = None,
    adopt_checkpoints: bool = False,
    trust: tuple[str, ...] = (),
) -> Path:
    """Train a recipe. Returns the run's folder. `prepare` explains `adopt_checkpoints`."""
    refuse_references(recipe)
    launcher = launcher_of(cluster)
    say_stage("checking the recipe and its data")
    check_launch(recipe, cluster, trust=trust)
    with launcher:
        return train_alone(
            prepare(
                recipe, cluster, runs, name=name, adopt_checkpoints=adopt_checkpoints, trust=trust
            ),
            launcher,
            address=cluster.address,
        )


def check_launch(recipe: Recipe, cluster: Cluster, *, trust: tuple[str, ...]) -> None:
    """Check a recipe and its data before a file is written.

    Raises:
        ValueError: the recipe or its data is refused.
    """
    # Each call raises an error if it refuses the recipe. The results are not needed.
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


def end_stopped(console: Console, resume_command: str) -> NoReturn:
    """Print the command that resumes a stopped run or suite, and end the process with exit code
    130.
    """
    say(console, f"stopped; resume with: {resume_command}", whole=[resume_command])
    raise SystemExit(130)


def drive(
    job: Job, launcher: Launcher, console: Console, *, address: str | None = None
) -> dict[str, Any] | None:
    """Train the run of one job to its end. Show its progress, mirror it to MLflow, and stop it on
    signals.

    Args:
        address: the `--address` of the command that resumes the run.

    Returns: the summary, or None if the run was asked to stop.

    Raises:
        UserError: the user has to change something, or another driver trains the run.
        LaunchError: the workers failed more often than allowed, or there were no resources for
            them.
        OSError: the storage of the checkpoints or of the run's folder failed.
    """
    folder = Path(job.run)
    uri, resume_command = tracking_uri(folder.parent), command("resume", folder, address=address)
    job = replace(job, resume_command=resume_command, commit=commit())
    ignore_lost_terminal(console)
    print_line = partial(say, console)
    with driver_lock(folder):
        job = _with_checkpoint_token(job, print_line)
        files = RunFolder(folder)
        for file in (
            files.stop_request,
            files.save_request,
            files.refusal,
        ):  # left by an earlier attempt
            file.unlink(missing_ok=True)
        write_job(job)
        display = ProgressDisplay(
            folder,
            console,
            mlflow_uri=uri,
            resume_command=resume_command,
            on_events=MetricsFile(folder, print_line).show,
        )
        request = StopRequest(folder, print_line)
        with _mirrored(folder, uri, print_line), closing(display):
            try:
                with on_stop_signals(request.on_signal):
                    return _in_thread(
                        lambda: launcher.run(job, attempt=uuid.uuid4().hex[:8]),
                        while_waiting=(request.report, display.update),
                    )
            except LaunchError as failure:
                hang_message = _journal_end_of_workers(folder, failure)
                if isinstance(failure, WorkersEnded) and failure.is_for_the_user:
                    raise UserError(str(failure)) from failure
                if isinstance(failure, WorkersEnded) and hang_message:
                    raise LaunchError(hang_message) from failure
                raise


@contextmanager
def _mirrored(folder: Path, uri: str, print_line: Callable[[str], None]) -> Iterator[None]:
    """Deliver the run's journal to MLflow during and after the block."""
    mirror = Mirror(folder, uri=uri)
    try:
        yield
    finally:
        if not mirror.close(timeout=MLFLOW_TIMEOUT_S):
            print_line(
                f"MLflow at {without_password(uri)} has not answered; `spiketrain sync"
                f" {folder}` delivers the rest later"
            )


def _with_checkpoint_token(job: Job, print_line: Callable[[str], None]) -> Job:
    """Claim the store of the checkpoints, if it is outside the run's folder, and give its token to
    the job. An earlier driver can then no longer write to the store.
    """
    if not job.checkpoints:
        return job
    store = store_at(job.checkpoints, Path(job.run))
    return replace(
        job,
        store_token=retry_during_outage(
            Ranks(),
            lambda: claim(store, run=job.run, run_id=job.run_id, study=job.study),
            on_wait=lambda error: print_line(
                f"{store.address('')} does not answer; waiting for it: {error}"
            ),
        ),
    )


def _journal_end_of_workers(folder: Path, failure: LaunchError) -> str:
    """Journal the workers' hangs and deaths that are not in the journal yet.

    Returns: the message about the hangs, for the user; empty if there are none. Ray and the other
    workers report only a lost connection.

    Raises:
        UserError: a worker refused to continue, for a reason that the user can change.
    """
    hung: dict[str, int] = {}
    try:
        hung = unreported_hangs(folder, read_events(RunFolder(folder).journal))
        # No worker is left that could write the journal. `journal` writes the hangs and deaths at
        # its beginning, and the refusal at its end.
        with journal(folder, Ranks()):
            raise_refusal(folder)
    except OSError as error:  # a full disk, which may have caused the failure itself
        failure.add_note(f"the journal could not be written: {error}")
    if not hung:
        return ""
    # A worker that waits for a hung worker makes no progress either, and may be ended first.
    ranks = ", ".join(map(str, sorted(set(hung.values()))))
    return (
        f"worker {ranks}, or a worker that it waited for, hung for longer than --hang-minutes; the"
        " stacks of its threads are in"
        f" {first_few([str(folder / file) for file in hung], max_names=4)}"
    )


def _in_thread(
    work: Callable[[], dict[str, Any] | None], *, while_waiting: tuple[Callable[[], None], ...]
) -> dict[str, Any] | None:
    """Run `work` in a daemon thread. The main thread handles signals and calls `while_waiting`
    repeatedly. If `work` ran in the main thread, a signal would end Ray's `fit`.
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
        for act in while_waiting:
            act()
    return outcome.result()


# ---------------------------------------------------------------------------------------- the lock


@contextmanager
def driver_lock(folder: Path) -> Iterator[None]:
    """Lock the folder of a run or suite against every other driver, on any machine.

    The kernel releases the lock of a process that dies. If a machine dies, the file system releases
    its locks minutes later, and a scheduler may already have started the same command on another
    machine. So the file holds the name of the machine that locks it. If a driver on this machine
    holds the lock for a second, this driver is refused. If a driver on another machine holds it,
    this driver waits for up to ten minutes.

    Raises:
        UserError: another driver holds the lock.
    """
    with RunFolder(folder).driver_lock.open("a+") as handle:
        _acquire(handle, folder)
        handle.truncate(0)
        handle.write(this_machine())
        handle.flush()
        os.fsync(handle.fileno())
        yield


def this_machine() -> str:
    """The host's name and the id of its boot. After a reboot the host counts as another machine:
    no driver on it holds the lock any more.
    """
    return f"{socket.gethostname()} {_BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ''}"


def _acquire(handle: IO[str], folder: Path) -> None:
    if lock_within(handle, LOCK_CHECK_S):
        return
    handle.seek(0)
    holder = handle.read()
    host = holder.partition(" ")[0]
    error_prefix = f"{folder.name}: is being trained by another process on"
    if holder == this_machine() or not host:
        raise UserError(f"{error_prefix} this machine")
    print(
        f"{folder.name}: is locked by a process on {host}: waiting for up to {PATIENCE_S:.0f} s; if"
        " the machine is dead, its lock ends in that time",
        flush=True,
    )
    if not lock_within(handle, PATIENCE_S):
        raise UserError(
            f"{error_prefix} {host}, which still holds the lock after {PATIENCE_S:.0f} s"
        )


# ------------------------------------------------------------------------------------ the terminal


def ignore_lost_terminal(console: Console) -> None:
    """Let this console ignore errors of its output: a full disk, a broken pipe, or a closed
    terminal.

    The first error is reported on stderr. After that nothing is printed.
    """
    if not isinstance(console.file, _OutputUntilError):
        console.file = cast(IO[str], _OutputUntilError(console.file))


class _OutputUntilError:
    """Writes to `file`. After the first error it drops all text. rich (15.0) would end the process
    at a broken pipe.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, text: str) -> int:
        with self._dropping_output_after_error():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping_output_after_error():
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    @contextmanager
    def _dropping_output_after_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            lost, self._file = self._file, Path(os.devnull).open("w")  # noqa: SIM115
            with suppress(OSError):
                os.write(
                    2,
                    f"the output has ended: {error.strerror or error}; training continues, and its"
                    " journal has all events\n".encode(),
                )
            # Python 3.11 would try to write the buffered text at exit, and end with exit code 120.
            with suppress(OSError, ValueError):  # the file may have no descriptor
                os.dup2(self._file.fileno(), lost.fileno())


# ------------------------------------------------------------------------------------------ signals


SAVING_SIGNALS = (signal.SIGUSR1, signal.SIGHUP)  # They never stop a run at once.
AT_ONCE = "a second signal to the suite"  # the text of a request to end a run without saving
# One request may arrive as several signals: one to the process and one to its group, or one for
# each thread of a parent that dies (Linux 6). A signal within this time after another is ignored.
ECHO_S = 0.3


@contextmanager
def on_stop_signals(on_signal: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Inside, call `on_signal` once for each request. The call interrupts the main thread.

    SIGHUP stays ignored if it was ignored when this process started (nohup).
    """
    last_at = -math.inf

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal last_at
        now = time.monotonic()
        is_echo = now - last_at < ECHO_S
        last_at = now
        if not is_echo:
            on_signal(signal.Signals(number))

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    earlier_handlers = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)


class StopRequest:
    """Passes signals to the workers of a run, as a file in the run's folder."""

    def __init__(self, folder: Path, print_line: Callable[[str], None]) -> None:
        self._folder, self._print_line = folder, print_line
        self._signal_name, self._is_printed = "", False

    def on_signal(self, number: signal.Signals) -> None:
        """At the first signal, ask the workers to stop. At a later signal, or if the suite of the
        run has asked to end at once, end this process, unless the signal is one of SAVING_SIGNALS.

        The request is not printed here: the main thread may be in the middle of a line.
        """
        if not self._signal_name and not self._is_to_end_at_once():
            self._signal_name = number.name
            self._write_request()
        elif number not in SAVING_SIGNALS:
            try:
                self._print_line("stopped at once; a resume continues from the last checkpoint")
            finally:
                os._exit(130)

    def _is_to_end_at_once(self) -> bool:
        with suppress(OSError):
            return RunFolder(self._folder).stop_request.read_text() == AT_ONCE
        return False

    def report(self) -> None:
        """Print the request once. If the storage did not take the request, write it again. The
        driver calls this method repeatedly.
        """
        if not self._signal_name:
            return
        self._write_request()
        if not self._is_printed:
            self._is_printed = True
            self._print_line(
                f"{self._signal_name}: saving after this step; another Ctrl-C or SIGTERM stops at"
                " once"
            )

    def _write_request(self) -> None:
        with suppress(OSError):
            if not was_stopped(self._folder):
                RunFolder(self._folder).stop_request.write_text(self._signal_name)
