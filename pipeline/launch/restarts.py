"""How often the workers of a run are started again: so many times without getting on, as decided in
Ray Train's controller.

Ray's own policy (2.60) counts over the whole of a run, so that the fourth worker that dies in days
of training would end it; and it ends a run whose workers have no place for two minutes, where a
machine may take ten to replace.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2.api.exceptions import ControllerError

from pipeline.core.files import lasts
from pipeline.core.run_folder import RunFolder
from pipeline.launch.ray_errors import cause, innermost
from pipeline.launch.resizing import PLACES_S, NoPlace, tell_waiting
from pipeline.measure.memory import is_out_of_memory
from pipeline.track.events import Checkpoint, Start
from pipeline.track.journal import last_event
from pipeline.train.guards.deaths import note_death
from pipeline.train.job import was_stopped


class Restarts(DefaultFailurePolicy):
    """One death more than `max_failures` ends the run in `folder` where there is nothing new
    between them.

    So does a death of what the user alone can change, at once.

    New is a checkpoint of a step that none was of before, and a smaller micro-batch. The death that
    brings the latter counts for nothing: by it several workers begin again, where one does so by
    itself (worker.py).

    Workers that had places before and have none now, their node being gone, count for nothing while
    `awaits_nodes`: they wait up to an hour.
    """

    def __init__(self, config: FailureConfig, *, folder: Path, awaits_nodes: bool) -> None:
        super().__init__(config)
        self.folder, self.awaits_nodes = folder, awaits_nodes
        self._saved, self._changed, self._start = (
            self._newest(),
            self._changes(),
            self._newest_start(),
        )
        self._first = self._start
        self._waits: tuple[str | None, float] | None = None
        """since which start of the workers, and when, there has been no place for them"""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        with suppress(OSError):  # storage that is away: the journal goes without it then
            self._note_death(getattr(training_failed_error, "worker_failures", None))
        if needs_the_user(training_failed_error):
            return FailureDecision.RAISE
        has_saved, has_changed = self._news()
        if has_saved or has_changed:
            self._worker_group_failures = self._controller_failures = 0
        if has_no_place(training_failed_error):
            with suppress(OSError):
                if was_stopped(self.folder):  # nobody is there to save, and whoever asked waits
                    return FailureDecision.RAISE
            if self._may_wait(training_failed_error.controller_failure):
                return FailureDecision.RETRY
        else:
            self._waits = None
            if has_changed:
                return FailureDecision.RETRY
        return super().make_decision(training_failed_error)

    def _note_death(self, failures: Mapping[int, Exception] | None) -> None:
        """For the journal, which is not the controller's; what worker 0 raised it has told there
        itself.
        """
        if failures:
            worker, error = cause(failures)
            # Refusals and micro-batches that are too large have notes of their own.
            is_noted = isinstance(error, ValueError) or is_out_of_memory(error)
            if isinstance(error, WorkerHealthCheckFailedError) or (worker and not is_noted):
                note_death(self.folder, worker=worker, error=innermost(error))

    def _news(self) -> tuple[bool, bool]:
        """Whether there is a new checkpoint, and whether the run has changed, since it was asked
        last.

        Storage that is away tells of nothing.
        """
        try:
            saved, changes, self._start = self._newest(), self._changes(), self._newest_start()
        except OSError:
            return False, False
        news = saved > self._saved, changes != self._changed
        self._saved, self._changed = max(saved, self._saved), changes
        return news

    def _may_wait(self, failure: Any) -> bool:
        """Before the first start there is nothing to wait for: who launches counts the places, and
        is told at once.
        """
        if not self.awaits_nodes or self._start == self._first:
            return False
        if self._waits is None or self._waits[0] != self._start:
            self._waits = (self._start, time.monotonic())
            with suppress(
                OSError
            ):  # storage that is away for a moment: what is waited for comes all the same
                tell_waiting(self.folder, failure.num_workers)
        return time.monotonic() - self._waits[1] < PLACES_S

    def _newest_start(self) -> str | None:
        """The last start of the workers, told apart from others."""
        event = last_event(RunFolder(self.folder).journal, Start)
        return None if event is None else f"{event.attempt} {event.time}"

    def _newest(self) -> int:
        event = last_event(RunFolder(self.folder).journal, Checkpoint)
        return -1 if event is None else event.step

    def _changes(self) -> bytes:
        file = RunFolder(self.folder).micro_batch
        return file.read_bytes() if file.exists() else b""


def has_no_place(error: Exception) -> bool:
    """Whether Ray Train, or `Resizing` in it, gave up because there was no room for the workers in
    time.
    """
    return isinstance(error, ControllerError) and isinstance(
        error.controller_failure, (WorkerGroupStartupTimeoutError, NoPlace)
    )


def needs_the_user(error: Exception) -> bool:
    """Whether a worker died of a full disk, or of what is closed to it: started again, it would
    find the same.
    """
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return False
    _, found = cause(failures)
    return isinstance(found, OSError) and lasts(found)
