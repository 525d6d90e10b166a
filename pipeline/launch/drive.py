"""From a recipe to a run's folder, and the driver's part while the workers train.

The driver trains nothing. It holds `RUN/driver.lock`, follows the run's journal to draw the progress and to feed MLflow,
and passes Ctrl-C or SIGTERM on: the first asks the workers to save and stop after the step they are in (`RUN/stop`), the
second ends at once. SIGUSR1, which schedulers send ahead of their time limit, asks to save and stop however often it comes.
"""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from pipeline.checkpoint import place_at
from pipeline.counts import refuse_unless_counts
from pipeline.data.base import Data
from pipeline.job import REFUSAL, SAVE, STOP, Job
from pipeline.launch.base import Launcher, LaunchError
from pipeline.launch.cluster import Cluster
from pipeline.launch.folder import named, numbered, whole_folder
from pipeline.launch.watch import Watch
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe, read_json, write_json
from pipeline.refused import Refused
from pipeline.spec import arguments_of
from pipeline.track.connect import without_password
from pipeline.track.exposition import Exposed
from pipeline.track.jsonl import Follower
from pipeline.track.mlflow import Mirror
from pipeline.weights import place_of, study_inputs
from pipeline.worker import raise_refusal
from pipeline.writer import journal

POLL_S = 0.25
MLFLOW_PATIENCE_S = 30.0
# One wish may come as several signals: to a process and to its group, or for each thread of a parent that dies (Linux 6).
ECHO_S = 0.3


def prepare(
    recipe: Recipe,
    cluster: Cluster,
    runs: Path,
    *,
    name: str | None = None,
    parent: str | None = None,
    suite: str | None = None,
    family: str | None = None,
    adopts: bool = False,
    trust: tuple[str, ...] = (),
) -> Job:
    """Make the run's folder, with all that it takes to resume it: its recipe, its job and where it trains.

    `parent`, `suite` (its folder's name) and `family` are those of the suite that it belongs to. `adopts`: checkpoints that a run
    of this name has left in the cluster's place for them, whose folder is gone, are gone on with.

    Raises:
        ValueError: the data set is missing, the weights that `init` names are missing, or the name is taken.
    """
    recipe = recipe.resolved()
    data: Data = recipe.data.build()
    fingerprint = data.fingerprint()
    study = recipe.study_key(study_inputs(recipe, fingerprint))
    folder = named(runs.absolute(), f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}" if name is None else name)
    if name is None:
        folder = next(path for path in numbered(folder) if not path.exists())
    job = Job(
        run=str(folder),
        study=study,
        data_fingerprint=fingerprint,
        commit=commit(),
        parent=parent,
        suite=suite,
        family=family or recipe.family or recipe.name,
        run_id=uuid.uuid4().hex,
        trust=trust,
        threads=cluster.cpus_per_worker,
        loader_threads=cluster.loader_threads,
        hang_minutes=cluster.hang_minutes,
        verify=cluster.verify,
        own_cores=cluster.side_by_side != 1,
    )
    if cluster.checkpoints is not None:
        job = replace(job, checkpoints=_own_place(cluster.checkpoints, folder, study if adopts else None))
    with whole_folder(folder) as hidden:
        write_json(hidden / "recipe.json", recipe.to_json())
        write_json(hidden / "cluster.json", asdict(cluster))
        write_json(hidden / "job.json", _to_json(job))
    return job


def _own_place(place: str, run: Path, study: str | None) -> str:
    """The address of a run's checkpoints, beneath `place`; there are none, or those of `study`.

    Raises:
        ValueError: there are others, or the address cannot be opened.
    """
    address = f"{place.rstrip('/')}/{run.name}" if "://" in place else str(Path(place).absolute() / run.name)
    found = place_at(address, run)
    try:
        names = found.names()
    except Exception as error:  # each store has errors of its own
        raise ValueError(f"launch: {address} must be open to this user; got {type(error).__name__}: {error}") from error
    for name in reversed(names):
        if study is None:
            raise ValueError(
                f"launch: {address} must hold no checkpoints yet; got {name}: another --name, or --or-resume to go on with them"
            )
        try:
            theirs = found.trainer(name).get("study")
        except (OSError, ValueError):
            continue  # damaged: moved away by whoever trains
        if theirs != study:
            raise ValueError(f"launch: --or-resume goes on with checkpoints of the same study; got {theirs} in {address}/{name}")
    return address


def write_job(job: Job) -> None:
    """Beside the recipe, for a resume."""
    write_json(Path(job.run) / "job.json", _to_json(job))


def _to_json(job: Job) -> dict[str, Any]:
    """Whom the user trusts is not written down: the next user says it anew."""
    return {name: value for name, value in asdict(job).items() if name not in ("run", "trust")}


def read_job(folder: Path, *, trust: tuple[str, ...] = ()) -> Job:
    """What `write_job` wrote; a folder that was moved is where it is now.

    Raises:
        ValueError: it is missing or damaged, or its suite would lie in another folder of runs.
    """
    file = folder / "job.json"
    told = arguments_of(Job, read_json(file), who=str(file), besides=("run", "trust"))
    job = Job(**told, run=str(folder.absolute()), trust=trust)
    refuse_unless_counts(str(file), {"threads": job.threads, "loader_threads": job.loader_threads})
    if job.suite is not None and (job.suite == ".." or Path(job.suite).name != job.suite):
        raise ValueError(f"{file}: suite must be the name of a folder beside this one; got {job.suite!r}")
    return job


def drive(job: Job, launcher: Launcher, console: Console, *, uri: str, resume_command: str) -> dict[str, Any] | None:
    """Run one job to its end, watched, mirrored to MLflow at `uri` and stoppable.

    See `Launcher.run` for what comes back or is raised.
    """
    folder = Path(job.run)
    job = replace(job, resume_command=resume_command, commit=commit())
    exposed = Exposed(folder, console.print)
    with driver_lock(folder):
        for note in (STOP, SAVE, REFUSAL):
            (folder / note).unlink(missing_ok=True)
        write_job(job)
        journal = folder / "journal.jsonl"
        offset = journal.stat().st_size if journal.exists() else 0
        mirror = Mirror(folder, uri=uri, kept_of=place_of)
        watch = Watch(console, run_dir=folder, store=uri, resume_command=resume_command)
        follower = Follower(journal, offset=offset)

        def look() -> None:
            events = follower.poll()
            watch.show(events)
            exposed.show(events)

        try:
            with stops_on_signal(folder, console):
                outcome = _in_thread(
                    lambda: launcher.run(job, attempt=uuid.uuid4().hex[:8]),
                    meanwhile=look,
                )
        except LaunchError:
            _raise_what_a_rank_noted(folder)
            raise
        finally:
            look()
            watch.close()
            if not mirror.close(timeout=MLFLOW_PATIENCE_S):
                console.print(
                    f"MLflow at {without_password(uri)} has not answered; `spiketrain sync {folder}` delivers the rest later"
                )
        return outcome


def _raise_what_a_rank_noted(folder: Path) -> None:
    """A rank that found why the run cannot go on died of it, and no attempt was left to tell the others."""
    try:
        raise_refusal(folder)
    except Refused as refusal:
        with journal(folder, Ranks()):  # the workers are gone: nobody else writes it
            raise refusal


def _in_thread(work: Callable[[], dict[str, Any] | None], *, meanwhile: Callable[[], None]) -> dict[str, Any] | None:
    """Work in a daemon thread while the main thread stays free for signals (Ray's `fit` in the main thread would die of them)."""
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
        meanwhile()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def was_stopped(folder: Path) -> bool:
    """Whether somebody asked this run to stop since it was last launched or resumed."""
    return (folder / STOP).exists()


@contextmanager
def stops_on_signal(folder: Path, console: Console) -> Iterator[None]:
    """Inside, signals ask the run in this folder to stop, as the module says."""
    heard = -math.inf

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        echo, heard = time.monotonic() - heard < ECHO_S, time.monotonic()
        if echo:
            return
        if (folder / STOP).exists():
            if number == signal.SIGUSR1:
                return
            console.print("stopped at once; the last checkpoint counts")
            os._exit(130)
        (folder / STOP).write_text(signal.Signals(number).name)
        console.print(f"{signal.Signals(number).name}: saving after this step; once more to stop at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def driver_lock(folder: Path) -> Iterator[None]:
    """Hold the folder of a run, or of a suite, against every other driver on this machine.

    Raises:
        Refused: somebody else holds it.
    """
    with (folder / "driver.lock").open("a") as handle:
        deadline = time.monotonic() + 1.0  # `spiketrain runs` holds it for an instant, to see whether anybody does
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Refused(f"{folder.name}: is being trained by another process on this machine") from None
                time.sleep(0.05)
        yield


def commit() -> str:
    """The commit of the code that trains, with `+` when the tree has changes; outside a checkout what SPIKETRAIN_COMMIT says."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SPIKETRAIN_COMMIT", "unknown")
