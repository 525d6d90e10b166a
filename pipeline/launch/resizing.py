"""How many workers a run has from time to time, on a cluster whose nodes come and go: decided in
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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from pipeline.core.run_folder import RunFolder
from pipeline.core.units import counted
from pipeline.recipe.recipe import write_json
from pipeline.track.events import OF_NONE, Waiting
from pipeline.track.journal import Journal
from pipeline.train.job import Notice

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
        self.sizes, self.folder, self.files = tuple(sizes), folder, RunFolder(folder)
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
        if isinstance(decision, NoopDecision) and _exists(self.files.stop, if_away=False):
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
                tell_waiting(self.folder, self.sizes[0])
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
                write_json(self.files.save, asdict(_leaving(worker_group_state)))
                self._wanted, self._asked = decision, time.monotonic()
            return NoopDecision()
        if _exists(self.files.save, if_away=True) and time.monotonic() - self._asked < PATIENCE_S:
            return NoopDecision()
        decision, self._wanted = self._wanted, None
        with suppress(OSError):  # one that stays is answered by the next workers
            self.files.save.unlink(missing_ok=True)
        return decision


def _exists(file: Path, *, if_away: bool) -> bool:
    """Whether a file exists; `if_away` while its storage does not answer.

    An error must not be raised: Ray (2.60) takes it for a failure of its controller and ends the
    launch.
    """
    try:
        return file.exists()
    except OSError:
        return if_away


PLACES_S = 3600.0
"""that places for all workers are waited for, where a node may come back or be replaced"""


class NoPlace(Exception):
    """They have been waited for in vain."""


def no_place(workers: int) -> str:
    found = f"launch: {counted(workers, 'worker')} found no place in time"
    return f"{found}: others have it, or a node is gone and none came in its stead"


def tell_waiting(folder: Path, workers: int) -> None:
    """Write down that no worker of the run in `folder` is left, and what is waited for; the driver
    shows it.

    Raises: OSError.
    """
    with Journal(RunFolder(folder).journal, attempt=OF_NONE) as journal:
        journal.write(Waiting(what=f"a place for {counted(workers, 'worker')}", most_s=PLACES_S))
