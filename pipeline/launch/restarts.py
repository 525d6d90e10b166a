"""How often the workers of a run are started again: so many times without getting on, as decided in
Ray Train's controller.

Ray's own policy (2.60) counts over the whole of a run, so that the fourth worker that dies in days
of training would end it; and it ends a run whose workers have no place for two minutes, where a
machine may take ten to replace.

How many workers a run has from time to time, on a cluster whose nodes come and go: decided in
Ray Train's controller.

Ray's own policy (2.60) takes any number between two, counts nodes that are gone until its
coordinator looks again (20 s), and ends the workers of a run that is to grow wherever they are.
This one takes numbers that the run may have, on nodes that are there and stay, and asks the run to
save first.

Places for the workers of a run whose node is gone: how long they are waited for, and that
somebody is told of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.exceptions import ControllerError

from pipeline.core.files import lasts
from pipeline.core.units import counted
from pipeline.launch.ray_cluster import cause, innermost
from pipeline.measure.memory import is_out_of_memory
from pipeline.recipe.recipe import write_json
from pipeline.track.journal import OF_NONE, Journal, last
from pipeline.train.guards.deaths import note_death
from pipeline.train.guards.oom import FILE as MICRO_BATCH
from pipeline.train.job import SAVE, STOP, Notice, was_stopped


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
                journal_waiting(self.folder, failure.num_workers)
        return time.monotonic() - self._waits[1] < PLACES_S

    def _newest_start(self) -> str | None:
        """The last start of the workers, told apart from others."""
        event = last(self.folder / "journal.jsonl", "start")
        return None if event is None else f"{event['attempt']} {event['time']}"

    def _newest(self) -> int:
        event = last(self.folder / "journal.jsonl", "checkpoint")
        return -1 if event is None else int(event["step"])

    def _changes(self) -> bytes:
        file = self.folder / MICRO_BATCH
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


LOOK_S = 10.0
"""between two looks at whether there is room for another number of workers; a new node has to be
there for so long
"""
PATIENCE_S = 300.0
"""for the save that comes before, which may have far to go"""


def _leaving(worker_group_state: Any) -> Notice:
    """The nodes of the run that are being drained."""
    nodes = {worker.metadata.node_id for worker in worker_group_state.workers}
    leaving = {node: ms for node, ms in state.get_draining_nodes().items() if node in nodes}
    return Notice(
        tuple(sorted(leaving)), min((ms / 1e3 for ms in leaving.values() if ms), default=None)
    )


class Resizing(ElasticScalingPolicy):
    """As many workers of `sizes` (ascending) as there is room for, of the run in `folder`."""

    def __init__(
        self, scaling_config: ScalingConfig, *, sizes: Sequence[int], folder: Path
    ) -> None:
        super().__init__(scaling_config)
        self.sizes, self.folder = tuple(sizes), folder
        self._wanted: ResizeDecision | None = None
        self._asked = self._ticked = 0.0
        self._none_since: float | None = None
        """when no worker was left, or none had begun"""
        self._is_told = self._is_tried_late = False

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        leaving = state.get_draining_nodes()
        there = {
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] not in leaving
        }
        room = super()._count_possible_workers(
            {node: has for node, has in reserved_resources.items() if node in there}
        )
        return max((size for size in self.sizes if size <= room), default=0)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Whoever asks to stop meanwhile waits for no node: as if places had not come in time
        (`restarts.py`).

        Raises:
            NoPlace: no workers have begun within an hour, whether there was room for some of them
                now and then or not. Room that comes later than that is tried once.
        """
        self._wanted = None
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision) and self._is_there(STOP, if_away=False):
            raise WorkerGroupStartupTimeoutError(self.sizes[0])
        if self._none_since is None:
            self._none_since, self._is_told, self._is_tried_late = time.monotonic(), False, False
        without_s = time.monotonic() - self._none_since
        if without_s > PLACES_S:
            if isinstance(decision, NoopDecision) or self._is_tried_late:
                raise NoPlace(no_place(self.sizes[0]))
            self._is_tried_late = True
        if isinstance(decision, NoopDecision) and without_s > LOOK_S and not self._is_told:
            with suppress(OSError):  # else it is told at the next look
                journal_waiting(self.folder, self.sizes[0])
                self._is_told = True
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """First a save is asked for; the decision follows it."""
        self._none_since = None
        if self._wanted is None:
            if (
                time.monotonic() - self._ticked > LOOK_S / 2
            ):  # the coordinator looks at the cluster now, not in up to 20 s
                self._ticked = time.monotonic()
                coordinator: Any = self._autoscaling_coordinator
                coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            decision = super().make_decision_for_running_worker_group(
                worker_group_state, worker_group_status
            )
            if not isinstance(decision, ResizeDecision):
                return decision
            with suppress(OSError):  # else it is asked for at the next look
                write_json(self.folder / SAVE, asdict(_leaving(worker_group_state)))
                self._wanted, self._asked = decision, time.monotonic()
            return NoopDecision()
        if self._is_there(SAVE, if_away=True) and time.monotonic() - self._asked < PATIENCE_S:
            return NoopDecision()
        decision, self._wanted = self._wanted, None
        with suppress(OSError):  # one that stays is answered by the next workers
            (self.folder / SAVE).unlink(missing_ok=True)
        return decision

    def _is_there(self, name: str, *, if_away: bool) -> bool:
        """Whether the run's folder has this file, or what is to be taken for the answer while its
        storage is away.

        What is raised here ends the launch: Ray (2.60) takes it for a failure of its controller.
        """
        try:
            return (self.folder / name).exists()
        except OSError:
            return if_away


PLACES_S = 3600.0
"""that places for all workers are waited for, where a node may come back or be replaced"""


class NoPlace(Exception):
    """They have been waited for in vain."""


def no_place(workers: int) -> str:
    found = f"launch: {counted(workers, 'worker')} found no place in time"
    return f"{found}: others have it, or a node is gone and none came in its stead"


def journal_waiting(folder: Path, workers: int) -> None:
    """Write down that no worker of the run in `folder` is left, and what is waited for; the driver
    shows it.

    Raises: OSError.
    """
    with Journal(folder / "journal.jsonl", attempt=OF_NONE) as journal:
        journal.event(
            "waiting", sync=True, what=f"a place for {counted(workers, 'worker')}", most_s=PLACES_S
        )
