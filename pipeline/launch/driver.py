"""The driver's part while the workers of a run train.

It trains nothing. It holds `RUN/driver.lock`, follows the run's journal to show how it goes and to
feed MLflow, and passes on what signals ask (`signals.py`), through files in the run's folder.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.core.code_version import commit
from pipeline.core.errors import UserError
from pipeline.core.printing import say
from pipeline.core.run_folder import RunFolder
from pipeline.launch.base import Launcher, LaunchError, WorkersEnded
from pipeline.launch.lock import driver_lock
from pipeline.launch.prepare import write_job
from pipeline.launch.progress import Shown
from pipeline.launch.signals import stops_on_signal
from pipeline.launch.terminal import outlive
from pipeline.track.connect import without_password
from pipeline.track.exposition import Exposed
from pipeline.track.journal import read_events
from pipeline.track.mlflow import Mirror
from pipeline.train.backend.collectives import Ranks
from pipeline.train.checkpoint import claim, place_at
from pipeline.train.guards.storage import patiently
from pipeline.train.guards.watchdog import untold
from pipeline.train.job import Job, raise_refusal
from pipeline.train.writer_lock import journal

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
    outlive(console)
    tell = partial(say, console)
    exposed = Exposed(folder, tell)
    with driver_lock(folder):
        job = _owning(job, tell)
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
        hung = untold(folder, read_events(RunFolder(folder).journal))
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
