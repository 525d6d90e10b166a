"""Ray's TorchTrainer with our policies for restarts and sizes, and with torch's store on loopback.

A cluster that a launch starts itself must not be reachable from other machines. A setting makes Ray
listen on loopback. For gloo and NCCL the name of the interface does so. torch's store accepts no
host (2.13) and no token, so it gets a socket that we open.

Ray's own policies (2.60) do not fit long runs:

- They count restarts over the whole run, so that a fourth death in days of training ends it.
- They end a run whose workers find no room for two minutes. Replacing a machine may take ten.
- They use any number of workers within a range, count a lost node for up to 20 s, and end the
  workers at once if a run is to grow.

`Restarts` counts deaths without progress. `Resizing` uses only numbers of workers that the run may
have, counts only nodes that stay, and asks the run to save first.
"""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)
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
from torch.distributed import TCPStore

from pipeline.core.files import is_permanent
from pipeline.core.run_folder import RunFolder
from pipeline.core.units import counted
from pipeline.launch.ray_cluster import alive_nodes, cause, innermost
from pipeline.measure.memory import is_out_of_memory
from pipeline.recipe.recipe import write_json
from pipeline.track.events import NO_ATTEMPT, Checkpoint, Start, Waiting
from pipeline.track.journal import Journal, last_event
from pipeline.train.job import Notice, note_death, was_stopped

HOST = "127.0.0.1"

_store: list[TCPStore] = []  # The store of worker 0. Its server ends with its last client.


class Trainer(TorchTrainer):
    """A TorchTrainer whose controller uses our policies for failures and for the number of workers.

    Args:
        sizes: the numbers of workers that the run may have, ascending.
        folder: the folder of the run.
        awaits_nodes: whether workers wait for lost nodes to come back or to be replaced.
    """

    def __init__(
        self, *args: Any, sizes: Sequence[int], folder: Path, awaits_nodes: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        several = len(sizes) > 1  # then Resizing waits for nodes
        self._policies: dict[str, Any] = {
            "failure_policy": Restarts(
                self.run_config.failure_config or FailureConfig(),
                folder=folder,
                awaits_nodes=awaits_nodes and not several,
            )
        }
        if several:
            self._policies["scaling_policy"] = Resizing(
                self.scaling_config, sizes=sizes, folder=folder
            )

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        return super()._initialize_and_run_controller(**{**parts, **self._policies})


class OnLoopback(TorchConfig):
    """A TorchConfig for workers that all run on this machine."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_set_address, worker_group.execute_single(0, _open_store))
        worker_group.execute(_set_torch_distributed_env_vars)
        given = {
            "backend": backend_config.backend,
            "init_method": "env://",
            "timeout_s": backend_config.timeout_s,
            "world_size": len(worker_group),
        }
        setup, start = _setup_torch_process_group, worker_group.execute_single_async
        ray.get([start(rank, setup, world_rank=rank, **given) for rank in range(len(worker_group))])


def _open_store() -> int:
    """Serve the store in worker 0. Returns its port.

    With `multi_tenant` the worker itself joins this store when it asks for one at that port.
    """
    listening = socket.create_server((HOST, 0))
    port = listening.getsockname()[1]
    _store[:] = [
        TCPStore(
            HOST,
            port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listening.detach(),
        )
    ]
    return port


def _set_address(port: int) -> None:
    os.environ |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(port)}


PLACES_S = 3600.0  # How long workers wait for room, if a node may come back or be replaced
# Seconds between two checks for room for another number of workers. A new node has to stay for this
# time.
LOOK_S = 10.0
PATIENCE_S = 300.0  # Wait for the checkpoint before a change of size. The next step may take long.


class NoPlace(Exception):
    """There was no room for the workers within PLACES_S."""


class Restarts(DefaultFailurePolicy):
    """Ends the run in `folder` after more than `max_failures` deaths of workers without progress.

    Progress is a checkpoint of a later step, or a decision of recovery (a rollback, a smaller
    micro-batch). The death that led to a decision does not count: several workers restart after it,
    while a single worker continues by itself (worker.py). If only the user can remove the cause of
    a death, the run ends at once.

    If `awaits_nodes`, workers that have started before may wait for room for up to an hour when
    their node is gone. This does not count as a death.
    """

    def __init__(self, config: FailureConfig, *, folder: Path, awaits_nodes: bool) -> None:
        super().__init__(config)
        self.folder, self.awaits_nodes = folder, awaits_nodes
        self._start, self._saved, self._decisions = self._read()
        self._first_start = self._start
        # The last start before the workers found no room, and the time when the wait began.
        self._waits: tuple[str | None, float] | None = None

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        with suppress(OSError):  # storage is away: the journal lacks this death
            self._note_death(getattr(training_failed_error, "worker_failures", None))
        if needs_the_user(training_failed_error):
            return FailureDecision.RAISE
        has_saved, has_decided = self._progress()
        if has_saved or has_decided:
            self._worker_group_failures = self._controller_failures = 0
        if has_no_place(training_failed_error):
            with suppress(OSError):
                if was_stopped(self.folder):  # no worker is left to save
                    return FailureDecision.RAISE
            if self._may_wait(training_failed_error.controller_failure):
                return FailureDecision.RETRY
        else:
            self._waits = None
            if has_decided:
                return FailureDecision.RETRY
        return super().make_decision(training_failed_error)

    def _note_death(self, failures: Mapping[int, Exception] | None) -> None:
        """Leave a note of the death for the next workers, which write the journal. Worker 0 writes
        its own errors; refusals and too large micro-batches have notes of their own.
        """
        if failures:
            worker, error = cause(failures)
            is_noted = isinstance(error, ValueError) or is_out_of_memory(error)
            if isinstance(error, WorkerHealthCheckFailedError) or (worker and not is_noted):
                note_death(self.folder, worker=worker, error=innermost(error))

    def _progress(self) -> tuple[bool, bool]:
        """Whether there is a later checkpoint, and another decision of recovery, such as a smaller
        micro-batch, since the last call.

        Neither if storage is away.
        """
        try:
            self._start, saved, decisions = self._read()
        except OSError:
            return False, False
        progress = saved > self._saved, decisions != self._decisions
        self._saved, self._decisions = max(saved, self._saved), decisions
        return progress

    def _read(self) -> tuple[str | None, int, bytes]:
        """The workers' last start, the step of the last checkpoint, and the file of decisions."""
        files = RunFolder(self.folder)
        start, saved = last_event(files.journal, Start), last_event(files.journal, Checkpoint)
        return (
            None if start is None else f"{start.attempt} {start.time}",
            -1 if saved is None else saved.step,
            files.decisions.read_bytes() if files.decisions.exists() else b"",
        )

    def _may_wait(self, failure: Any) -> bool:
        """Whether workers may still wait for room. They never wait before the first start: the
        launch has counted the cores, and the run is refused at once.
        """
        if not self.awaits_nodes or self._start == self._first_start:
            return False
        if self._waits is None or self._waits[0] != self._start:
            self._waits = (self._start, time.monotonic())
            with suppress(OSError):  # storage is away for a moment: the node may come all the same
                journal_waiting(self.folder, failure.num_workers)
        return time.monotonic() - self._waits[1] < PLACES_S


class Resizing(ElasticScalingPolicy):
    """Gives the run in `folder` the largest number of workers of `sizes` that there is room for."""

    def __init__(
        self, scaling_config: ScalingConfig, *, sizes: Sequence[int], folder: Path
    ) -> None:
        super().__init__(scaling_config)
        self.sizes, self.folder, self.files = tuple(sizes), folder, RunFolder(folder)
        self._wanted: ResizeDecision | None = None
        self._asked = self._ticked = 0.0
        self._none_since: float | None = None  # When the workers were gone; None: there are workers

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        staying = {node["NodeID"] for node in alive_nodes()} - set(state.get_draining_nodes())
        room = super()._count_possible_workers(
            {node: has for node, has in reserved_resources.items() if node in staying}
        )
        return max((size for size in self.sizes if size <= room), default=0)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """A request to stop ends the wait for nodes as if its time were over (`Restarts`).

        Raises:
            NoPlace: no workers have started within an hour, even if there was room for them at
                times.
        """
        self._wanted = None
        decision = super().make_decision_for_non_running_worker_group()
        is_waiting = isinstance(decision, NoopDecision)
        if is_waiting and _exists(self.files.stop, if_away=False):
            raise WorkerGroupStartupTimeoutError(self.sizes[0])
        if self._none_since is None:
            self._none_since = time.monotonic()
            self._is_journalled = False
        without_s = time.monotonic() - self._none_since
        if without_s > PLACES_S:
            raise NoPlace(no_place(self.sizes[0]))
        if is_waiting and without_s > LOOK_S and not self._is_journalled:
            with suppress(OSError):  # tried again at the next look
                journal_waiting(self.folder, self.sizes[0])
                self._is_journalled = True
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Ask the run for a checkpoint first. The decision follows once the checkpoint exists."""
        self._none_since = None
        if self._wanted is None:
            if time.monotonic() - self._ticked > LOOK_S / 2:
                # The coordinator looks at the cluster now instead of in up to 20 s.
                self._ticked = time.monotonic()
                coordinator: Any = self._autoscaling_coordinator
                coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            decision = super().make_decision_for_running_worker_group(
                worker_group_state, worker_group_status
            )
            if not isinstance(decision, ResizeDecision):
                return decision
            with suppress(OSError):  # the next look asks again
                write_json(self.files.save, asdict(_leaving(worker_group_state)))
                self._wanted, self._asked = decision, time.monotonic()
            return NoopDecision()
        if _exists(self.files.save, if_away=True) and time.monotonic() - self._asked < PATIENCE_S:
            return NoopDecision()
        decision, self._wanted = self._wanted, None
        with suppress(OSError):  # a request that stays is answered by the next workers
            self.files.save.unlink(missing_ok=True)
        return decision


def _exists(file: Path, *, if_away: bool) -> bool:
    """Whether a file exists; `if_away` if its storage does not answer.

    An exception here would end the launch: Ray (2.60) treats it as a failure of its controller.
    """
    try:
        return file.exists()
    except OSError:
        return if_away


def _leaving(worker_group_state: Any) -> Notice:
    nodes = {worker.metadata.node_id for worker in worker_group_state.workers}
    leaving = {node: ms for node, ms in state.get_draining_nodes().items() if node in nodes}
    return Notice(
        tuple(sorted(leaving)), min((ms / 1e3 for ms in leaving.values() if ms), default=None)
    )


def has_no_place(error: Exception) -> bool:
    """Whether Ray Train or `Resizing` gave up because there was no room for the workers in time."""
    return isinstance(error, ControllerError) and isinstance(
        error.controller_failure, (WorkerGroupStartupTimeoutError, NoPlace)
    )


def no_place(workers: int) -> str:
    """The message of a launch that found no room."""
    return (
        f"launch: {counted(workers, 'worker')} found no place in time: others have it, or a node is"
        " gone and none came in its stead"
    )


def needs_the_user(error: Exception) -> bool:
    """Whether a worker died of a full disk or a missing permission. A restart would fail again."""
    if not (failures := getattr(error, "worker_failures", None)):
        return False
    _, death = cause(failures)
    return isinstance(death, OSError) and is_permanent(death)


def journal_waiting(folder: Path, workers: int) -> None:
    """Journal that the run in `folder` has no workers and waits for room. The driver shows it.

    Raises: OSError.
    """
    with Journal(RunFolder(folder).journal, attempt=NO_ATTEMPT) as journal:
        journal.write(Waiting(what=f"a place for {counted(workers, 'worker')}", most_s=PLACES_S))
