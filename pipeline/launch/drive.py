"""The driver's part while the workers of a run train.

It trains nothing. It holds `RUN/driver.lock`, follows the run's journal to draw the progress and to feed MLflow, and passes
Ctrl-C or SIGTERM on: the first asks the workers to save and stop after the step they are in (`RUN/stop`), the second ends at
once. SIGUSR1, which schedulers send ahead of their time limit, asks to save and stop however often it comes.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from pipeline.code import commit
from pipeline.job import REFUSAL, SAVE, STOP, Job, raise_refusal
from pipeline.launch.base import Launcher, LaunchError
from pipeline.launch.lock import driver_lock
from pipeline.launch.prepare import write_job
from pipeline.launch.watch import Watch
from pipeline.ranks import Ranks
from pipeline.refused import Refused
from pipeline.track.connect import without_password
from pipeline.track.exposition import Exposed
from pipeline.track.jsonl import Follower
from pipeline.track.mlflow import Mirror
from pipeline.weights import place_of
from pipeline.writer import journal

POLL_S = 0.25
MLFLOW_PATIENCE_S = 30.0
# One wish may come as several signals: to a process and to its group, or for each thread of a parent that dies (Linux 6).
ECHO_S = 0.3


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
