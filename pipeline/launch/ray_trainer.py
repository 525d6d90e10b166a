"""Ray's TorchTrainer with our policies for restarts and for the number of workers, and with torch's
store on loopback.

Other machines must not reach the cluster that a launch starts. A setting makes Ray listen on
loopback only. gloo and NCCL listen there if the name of the interface is set. torch's store (2.13)
has no option for its host, and no token. So `_open_store` gives the store a socket on loopback.

Ray's own policies (2.60) do not fit long runs:

- They count restarts over the whole run, so a fourth death in days of training ends the run.
- They end a run that has no resources for its workers for two minutes. Replacing a machine may
  take ten minutes.
- They use any number of workers within a range, and count a lost node for up to 20 s. If a run can
  grow, they end its workers at once, before the run saves.

`Restarts` counts only deaths without progress. `Resizing` uses only the numbers of workers that the
run may have, counts only nodes that stay, and asks the run to save first.
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
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
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

# The store of worker 0. Without this reference, the store's server would end.
_store: list[TCPStore] = []


class Trainer(TorchTrainer):
    """A TorchTrainer whose controller uses our policies for failures and for the number of workers.

    Args:
        sizes: the numbers of workers that the run may have, ascending.
        folder: the folder of the run.
        waits_for_nodes: whether the run waits until lost nodes come back or are replaced.
    """

    def __init__(
        self, *args: Any, sizes: Sequence[int], folder: Path, waits_for_nodes: bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        is_elastic = len(sizes) > 1
        self._policies: dict[str, Any] = {
            "failure_policy": Restarts(
                self.run_config.failure_config or FailureConfig(),
                folder=folder,
                waits_for_nodes=waits_for_nodes and not is_elastic,  # else Resizing waits
            )
        }
        if is_elastic:
            self._policies["scaling_policy"] = Resizing(
                self.scaling_config, sizes=sizes, folder=folder
            )

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        return super()._initialize_and_run_controller(**{**options, **self._policies})

    def _create_default_callbacks(self) -> list[Any]:
        # This one starts a process at each attempt, for data sets of Ray's (2.60).
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, DatasetsCallback)]


class LoopbackConfig(TorchConfig):
    """A TorchConfig for workers that all run on this machine. torch's store is on loopback."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_set_store_address, worker_group.execute_single(0, _open_store))
        worker_group.execute(_set_torch_distributed_env_vars)
        options = {
            "backend": backend_config.backend,
            "init_method": "env://",
            "timeout_s": backend_config.timeout_s,
            "world_size": len(worker_group),
        }
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _setup_torch_process_group, world_rank=rank, **options
                )
                for rank in range(len(worker_group))
            ]
        )


def _open_store() -> int:
    """Open the server of the store in worker 0, and return its port.

    torch in worker 0 then opens a store at that port. With `multi_tenant`, that store uses this
    server.
    """
    listener = socket.create_server((HOST, 0))
    port = listener.getsockname()[1]
    _store[:] = [
        TCPStore(
            HOST,
            port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
        )
    ]
    return port


def _set_store_address(port: int) -> None:
    os.environ |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(port)}


# Maximum time in which a run waits for resources, if a node may come back or be replaced.
RESOURCES_TIMEOUT_S = 3600.0
# Time between two checks for resources for another number of workers.
CHECK_INTERVAL_S = 10.0
# Maximum wait for the checkpoint before the number of workers changes. The next step may take long.
SAVE_TIMEOUT_S = 300.0


class NoResources(Exception):
    """There were no resources for the workers within RESOURCES_TIMEOUT_S."""


class Restarts(DefaultFailurePolicy):
    """Ends the run in `folder` after more than `max_failures` deaths of workers without progress.

    Progress is a checkpoint of a later step, or a decision of recovery (a rollback, a smaller
    micro-batch). The death that led to a decision does not count: several workers always restart
    after a decision. A single worker continues by itself (worker.py). If only the user can remove
    the cause of a death, the run ends at once.

    With `waits_for_nodes`, a run that has lost a node after its workers started waits for resources
    for up to an hour. This wait does not count as a death.
    """

    def __init__(self, config: FailureConfig, *, folder: Path, waits_for_nodes: bool) -> None:
        super().__init__(config)
        self.folder, self.waits_for_nodes = folder, waits_for_nodes
        self._last_start, self._saved_step, self._decisions = self._read()
        self._first_start = self._last_start
        # The last start before the current wait for resources, and the time when the wait began.
        self._wait: tuple[str | None, float] | None = None

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        with suppress(OSError):  # storage does not answer: the journal will lack this death
            self._note_death(getattr(training_failed_error, "worker_failures", None))
        if needs_the_user(training_failed_error):
            return FailureDecision.RAISE
        has_saved, has_decided = self._progress()
        if has_saved or has_decided:
            self._worker_group_failures = self._controller_failures = 0
        if is_lack_of_resources(training_failed_error):
            with suppress(OSError):
                if was_stopped(self.folder):  # no worker is left that could save
                    return FailureDecision.RAISE
            if self._may_wait(training_failed_error.controller_failure):
                return FailureDecision.RETRY
        else:
            self._wait = None
            if has_decided:
                return FailureDecision.RETRY
        return super().make_decision(training_failed_error)

    def _note_death(self, failures: Mapping[int, Exception] | None) -> None:
        """Write a note of the death, which the next attempt copies to the journal.

        An error that worker 0 raised, a refusal and a lack of memory get no note here, because they
        are already in the journal or in another note.
        """
        if failures:
            worker, error = cause(failures)
            has_note = isinstance(error, ValueError) or is_out_of_memory(error)
            if isinstance(error, WorkerHealthCheckFailedError) or (worker and not has_note):
                note_death(self.folder, worker=worker, error=innermost(error))

    def _progress(self) -> tuple[bool, bool]:
        """Whether there is a later checkpoint, and whether there is another decision of recovery,
        since the last call. Both are False if storage does not answer.
        """
        try:
            self._last_start, saved_step, decisions = self._read()
        except OSError:
            return False, False
        progress = saved_step > self._saved_step, decisions != self._decisions
        self._saved_step, self._decisions = max(saved_step, self._saved_step), decisions
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
        """Whether the run may wait longer for resources. Before the first start it does not wait:
        the launch has checked the number of cores, so Ray's limit of failures applies.
        """
        if not self.waits_for_nodes or self._last_start == self._first_start:
            return False
        if self._wait is None or self._wait[0] != self._last_start:
            self._wait = (self._last_start, time.monotonic())
            with suppress(OSError):  # the run waits, even if storage does not answer
                journal_waiting(self.folder, failure.num_workers)
        return time.monotonic() - self._wait[1] < RESOURCES_TIMEOUT_S


class Resizing(ElasticScalingPolicy):
    """Gives the run in `folder` the largest number of workers of `sizes` for which there are
    resources.
    """

    def __init__(
        self, scaling_config: ScalingConfig, *, sizes: Sequence[int], folder: Path
    ) -> None:
        super().__init__(scaling_config)
        self.sizes, self.folder, self.files = tuple(sizes), folder, RunFolder(folder)
        self._pending: ResizeDecision | None = None  # it waits for the checkpoint
        self._requested_at = self._recomputed_at = 0.0
        self._no_workers_since: float | None = None  # None: there are workers

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        staying = {node["NodeID"] for node in alive_nodes()} - set(state.get_draining_nodes())
        possible = super()._count_possible_workers(
            {node: value for node, value in reserved_resources.items() if node in staying}
        )
        return max((size for size in self.sizes if size <= possible), default=0)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start workers, or wait for resources.

        Raises:
            WorkerGroupStartupTimeoutError: the user asked the run to stop while it waited.
            NoResources: no workers have started within an hour, even if there were resources for
                them at times.
        """
        self._pending = None
        decision = super().make_decision_for_non_running_worker_group()
        is_waiting = isinstance(decision, NoopDecision)
        if is_waiting and _exists(self.files.stop_request, on_error=False):
            raise WorkerGroupStartupTimeoutError(self.sizes[0])
        if self._no_workers_since is None:
            self._no_workers_since = time.monotonic()
            self._is_journaled = False
        waited_s = time.monotonic() - self._no_workers_since
        if waited_s > RESOURCES_TIMEOUT_S:
            raise NoResources
        if is_waiting and waited_s > CHECK_INTERVAL_S and not self._is_journaled:
            with suppress(OSError):  # the next call tries again
                journal_waiting(self.folder, self.sizes[0])
                self._is_journaled = True
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """If the number of workers has to change, ask the run for a checkpoint. Change the number
        when the checkpoint exists, or after SAVE_TIMEOUT_S.
        """
        self._no_workers_since = None
        if self._pending is None:
            if time.monotonic() - self._recomputed_at > CHECK_INTERVAL_S / 2:
                # By itself Ray's coordinator checks the cluster only every 20 s.
                self._recomputed_at = time.monotonic()
                coordinator: Any = self._autoscaling_coordinator
                coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            decision = super().make_decision_for_running_worker_group(
                worker_group_state, worker_group_status
            )
            if not isinstance(decision, ResizeDecision):
                return decision
            with suppress(OSError):  # the next call asks again
                write_json(self.files.save_request, asdict(_drain_notice(worker_group_state)))
                self._pending, self._requested_at = decision, time.monotonic()
            return NoopDecision()
        if (
            _exists(self.files.save_request, on_error=True)
            and time.monotonic() - self._requested_at < SAVE_TIMEOUT_S
        ):
            return NoopDecision()
        decision, self._pending = self._pending, None
        with suppress(OSError):  # if the request stays, the next workers save once
            self.files.save_request.unlink(missing_ok=True)
        return decision


def _exists(file: Path, *, on_error: bool) -> bool:
    """Whether a file exists; `on_error` if its storage does not answer.

    An exception here would end the launch: Ray (2.60) treats it as a failure of its controller.
    """
    try:
        return file.exists()
    except OSError:
        return on_error


def _drain_notice(worker_group_state: Any) -> Notice:

    nodes = {worker.metadata.node_id for worker in worker_group_state.workers}
    draining = {node: ms for node, ms in state.get_draining_nodes().items() if node in nodes}
    return Notice(
        tuple(sorted(draining)), min((ms / 1e3 for ms in draining.values() if ms), default=None)
    )


def is_lack_of_resources(error: Exception) -> bool:
    """Whether Ray Train or `Resizing` gave up because there were no resources in time."""
    return isinstance(error, ControllerError) and isinstance(
        error.controller_failure, (WorkerGroupStartupTimeoutError, NoResources)
    )


def needs_the_user(error: Exception) -> bool:
    """Whether a worker died of a full disk or a missing permission. A restart would fail again."""
    if not (failures := getattr(error, "worker_failures", None)):
        return False
    _, death = cause(failures)
    return isinstance(death, OSError) and is_permanent(death)


def journal_waiting(folder: Path, workers: int) -> None:
    """Write to the journal that the run in `folder` waits for resources. The driver shows this.

    Raises:
        OSError: the journal cannot be written.
    """
    with Journal(RunFolder(folder).journal, attempt=NO_ATTEMPT) as journal:
        journal.write(
            Waiting(what=f"resources for {counted(workers, 'worker')}", most_s=RESOURCES_TIMEOUT_S)
        )
