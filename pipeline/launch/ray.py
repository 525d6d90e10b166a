"""Ray Train starts one worker process per accelerator and starts them again when one dies.

Ray is asked for processes and a process group, no more: checkpoints and metrics never pass through
it, because what it remembers of them lags behind the disk and is lost with one truncated file (ray
2.60). The run's own folder counts."""

from __future__ import annotations

import logging
import os
import platform
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from torch import distributed

from pipeline.core.cores import cores_here, cores_of_a_node, cores_of_machines
from pipeline.core.errors import UserError
from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.core.units import counted
from pipeline.launch.base import (
    Device,
    LaunchError,
    Silent,
    WorkersEnded,
    refuse_unusable_cards,
    takes_gpus,
)
from pipeline.launch.environment import of_worker
from pipeline.launch.nodes import NodeLoss, Nodes, waits_for
from pipeline.launch.ray_auth import TOKEN_ADVICE, draw_token, heard, knock, offer_token, reason
from pipeline.launch.ray_errors import innermost
from pipeline.launch.resizing import no_place
from pipeline.launch.shares import Share, share_of
from pipeline.launch.signals import withheld
from pipeline.measure.driver import unusable_cards
from pipeline.track.events import Checkpoint, Stopped
from pipeline.track.journal import last_event
from pipeline.train.backend.collectives import PATIENCE, Ranks
from pipeline.train.job import Job, Notice, RankInfo, asked_by, was_stopped
from pipeline.train.worker import run
from pipeline.train.writer_lock import journal

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": (
        "0.25"
    ),  # how soon a dead worker is noticed; 2 s by default
    "RAY_worker_niceness": (
        "0"
    ),  # 15 by default: any other process on the machine would slow training, and its measurement
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": (
        "0"
    ),  # the default of the next release, without the warning of this one
}
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""of a cluster of our own: its node is 127.0.0.1, as on those systems, and Ray's servers listen
there and nowhere else (2.60)
"""

ASKED_S = 30.0
"""in which each node says how many cores it has"""
MEETING_S = 600
"""in which workers have to find one another as they start; nobody watches them yet"""
AFTER_WATCHDOG_S = 600
"""which a worker that is well waits on, once a watchdog would have ended the one that it waits
for
"""


class Ray:
    """Workers on a Ray cluster: an existing one, or one of our own on this machine.

    Args:
        workers: processes that train together; of several numbers (ascending) as many as there is
        room for, from time to time. address: of an existing cluster (`auto`, `host:6379`,
        `ray://...`); None starts one here.
        device: whether each worker gets a GPU; see `takes_gpus`.
        cpus_per_worker: cores that Ray reserves for a worker; torch gets one thread for each. See
        `share_of` for `auto`. loader_threads: that read data in each worker; likewise.
        max_restarts: how often the workers are started again after one of them died, with nothing
        new between (`restarts.py`). node_loss: how long a node that says nothing is waited for.
        work: what a worker does with its job; benchmarks measure inside it.
    """

    def __init__(
        self,
        *,
        workers: int | tuple[int, ...],
        address: str | None = None,
        cpus_per_worker: int | Literal["auto"] = "auto",
        loader_threads: int | Literal["auto"] = "auto",
        device: Device = "auto",
        max_restarts: int = 3,
        node_loss: NodeLoss = "fast",
        work: Callable[[Job, RankInfo], dict[str, Any] | None] = run,
    ) -> None:
        self.work = work
        self.sizes = workers if isinstance(workers, tuple) else (workers,)
        self.workers = self.sizes[0]
        self.node_loss: NodeLoss = node_loss
        self.address = address
        self.cpus_per_worker: int | Literal["auto"] = cpus_per_worker
        self.loader_threads: int | Literal["auto"] = loader_threads
        self.device: Device = device
        self.max_restarts = max_restarts
        self.nodes = Nodes()
        self._owned = False

    def __enter__(self) -> Self:
        """Join the cluster, or start one: in the main thread, because Ray's servers end with the
        thread that started them.
        """
        of_own = ALONE if self.address is None else {}
        if self.address is None:
            refuse_unusable_cards(self.device)
        for name, value in {
            **SETTINGS,
            **of_own,
            **waits_for(self.node_loss, sizes=len(self.sizes)),
        }.items():
            os.environ.setdefault(name, value)
        say_stage(
            "starting Ray" if self.address is None else f"joining the Ray cluster at {self.address}"
        )
        (
            draw_token if self.address is None else offer_token
        )()  # Ray reads its settings when it is imported
        import ray
        from ray.exceptions import AuthenticationError

        self._owned = not ray.is_initialized()
        if self._owned:
            said: list[str] = []
            try:
                if self.address is None:
                    asked = 1 if self.cpus_per_worker == "auto" else self.cpus_per_worker
                    cores = max(self.workers * asked, cores_here())
                    # Not one that somebody else has started on this machine, which Ray would join
                    # if it were not told so.
                    here = {"address": "local", "num_cpus": cores, "include_dashboard": False}
                    with withheld(
                        signal.SIGHUP
                    ):  # a lost terminal tells all of its processes; workers have to save first
                        ray.init(**here, log_to_driver=False, logging_level=logging.ERROR)
                else:
                    knock(self.address)
                    with heard() as said:
                        ray.init(
                            address=self.address, log_to_driver=False, logging_level=logging.ERROR
                        )
            except (
                AuthenticationError
            ) as error:  # of this process's own, before it has asked anybody
                raise UserError(
                    f"ray: a token must be at hand; got none: {error.message}; {TOKEN_ADVICE}"
                ) from error
            except (OSError, RuntimeError) as error:  # a ConnectionError is an OSError
                raise UserError(
                    f"ray: no cluster let us in at {self.address!r}: {reason(error, said)}"
                ) from error
        try:
            self._refuse_too_few()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._owned:
            import ray

            ray.shutdown()
            self._owned = False

    def _refuse_too_few(self) -> None:
        """Raises: UserError where there are too few cores or GPUs, or GPUs that torch cannot
        use.
        """
        import ray

        gpus, there = self._takes_gpus(), ray.cluster_resources().get("CPU", 0)
        share = self._share(gpus=gpus)
        if there < (wanted := self.workers * share.cores):
            each = f"{counted(self.workers, 'worker')} x {counted(share.cores, 'cpu')}"
            raise UserError(
                f"launch: {each} need {counted(wanted, 'core')}; the cluster has {there:.0f}"
            )
        if gpus and self.address is not None:  # of this machine it is known
            told = self.nodes.on_each(
                _unusable_cards, lambda has: int(has.get("GPU", 0)), within_s=ASKED_S
            )
            for found in told:  # who is silent is found by whoever sends it a worker
                if isinstance(found, str):
                    raise UserError(f"launch: {found}")

    def _takes_gpus(self) -> bool:
        import ray

        return takes_gpus(self.device, self.workers, int(ray.cluster_resources().get("GPU", 0)))

    def _share(self, *, gpus: bool) -> Share:
        """Of one worker, on the nodes that are up now."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]] if gpus else []
        return share_of(
            nodes, gpus=gpus, cores=self.cpus_per_worker, loader_threads=self.loader_threads
        )

    def room(self) -> int:
        import ray

        there, gpus = ray.cluster_resources(), self._takes_gpus()
        of_a_run = self.workers * self._share(gpus=gpus).cores
        if gpus:
            return min(int(there.get("CPU", 0)) // of_a_run, int(there["GPU"]) // self.workers)
        return self._cores() // of_a_run

    def _cores(self) -> int:
        """Physical ones of all machines, as far as Ray may give them; a CPU of the user's own
        cluster may be half of one.
        """
        if self.address is None:
            return cores_here()
        told = self.nodes.on_each(
            cores_of_a_node, lambda has: int(has.get("CPU", 0)), within_s=ASKED_S
        )
        return cores_of_machines(
            each for each in told if not isinstance(each, Silent)
        )  # whoever is silent is given no run

    def joining(self) -> list[str]:
        return ["--address", self.address or self.found_at(), "--workers", str(self.workers)]

    def found_at(self) -> str:
        """The address by which others find this cluster, whatever there is in their environment."""
        import ray

        return (
            self.address
            if self.address not in (None, "auto")
            else ray.get_runtime_context().gcs_address
        )

    def run(self, job: Job, attempt: str) -> dict[str, Any] | None:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        from pipeline.launch.ray_trainer import HOST, OnLoopback, Trainer
        from pipeline.launch.resizing import LOOK_S
        from pipeline.launch.restarts import has_no_place, needs_the_user

        gpus = self._takes_gpus()
        share = self._share(gpus=gpus)
        if gpus:
            job = replace(job, threads=share.cores, loader_threads=share.loader_threads)
        elastic = len(self.sizes) > 1
        # In a cluster of our own, also of a suite's that this process has joined; it is asked for
        # its nodes, not this process for its address, which may be a client's of elsewhere.
        alone = all(node["NodeManagerAddress"] == HOST for node in ray.nodes() if node["Alive"])
        told = of_worker(
            threads=share.cores, loader_threads=job.loader_threads, gpus=gpus, alone=alone
        )
        trainer = Trainer(
            partial(_train, work=self.work, sizes=self.sizes),
            sizes=self.sizes,
            folder=Path(job.run),
            awaits_nodes=self.address is not None,
            train_loop_config=asdict(job),
            torch_config=(OnLoopback if alone else TorchConfig)(
                backend="nccl" if gpus else "gloo", timeout_s=MEETING_S
            ),
            scaling_config=ScalingConfig(
                num_workers=(self.sizes[0], self.sizes[-1]) if elastic else self.workers,
                elastic_resize_monitor_interval_s=LOOK_S,
                use_gpu=gpus,
                resources_per_worker={"CPU": share.cores, **({"GPU": 1} if gpus else {})},
            ),
            run_config=RunConfig(
                # a new name each time: nothing that Ray remembers can stand in the way
                name=f"attempt-{attempt}",
                storage_path=str(Path(job.run) / "ray"),
                failure_config=FailureConfig(
                    max_failures=self.max_restarts,
                    # Places that are not there in time: several numbers of workers wait as
                    # `Resizing` says, a fixed number as `Restarts` does.
                    controller_failure_limit=-1 if elastic else 1,
                ),
                worker_runtime_env={"env_vars": told},
            ),
        )
        try:
            outcome = trainer.fit().return_value
        except (
            Exception
        ) as error:  # Ray wraps whatever a worker raised in several layers of its own
            if has_no_place(error):
                if was_stopped(Path(job.run)):
                    return _stopped_without_workers(job)
                raise LaunchError(no_place(self.workers)) from error
            raise WorkersEnded(innermost(error), is_for_the_user=needs_the_user(error)) from error
        if outcome is not None and "refused" in outcome:
            raise UserError(outcome["refused"])
        return outcome


def _unusable_cards(gpus: int) -> str | None:
    """What keeps torch from the GPUs of the node that this runs on, which Ray counts so many of."""
    found = unusable_cards() if gpus else None
    return None if found is None else f"{platform.node()}: {found}"


def _wait_for_others(hang_minutes: float) -> None:
    """From now on in a collective of all workers: until long after a watchdog has ended one of
    them.

    A collective that gave up first would end a worker that is well, and Ray with it the one that
    hangs, before anybody has seen what that is at.
    """
    patience = (
        timedelta(minutes=hang_minutes, seconds=AFTER_WATCHDOG_S) if hang_minutes else PATIENCE
    )
    distributed.distributed_c10d._set_pg_timeout(patience, distributed.group.WORLD)


def _stopped_without_workers(job: Job) -> None:
    """Somebody asked to stop while there was no place for the workers, who would have said so."""
    folder = Path(job.run)
    saved = last_event(RunFolder(folder).journal, Checkpoint)
    with journal(folder, Ranks()) as tracker:
        tracker.write(
            Stopped(
                step=0 if saved is None else saved.step,
                reason=f"{asked_by(folder)} while its workers had no place",
                resume_command=job.resume_command,
            )
        )


def _train(
    config: dict[str, Any],
    *,
    work: Callable[[Job, RankInfo], dict[str, Any] | None],
    sizes: tuple[int, ...],
) -> dict[str, Any] | None:
    """Runs in every worker process."""
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    job = Job(**{**config, "trust": tuple(config["trust"])})
    place = RankInfo(
        context.get_world_rank(),
        context.get_world_size(),
        str(get_device()),
        context.get_local_rank(),
        sizes,
        _notice,
    )
    _wait_for_others(job.hang_minutes)
    try:
        return work(job, place)
    except UserError as error:  # returned, not raised: starting again would not help
        return {"refused": str(error)}


def _notice() -> Notice | None:
    """Ray's word to this worker that nodes of its run are being drained.

    `ray.train.get_preemption_info` (2.60) lets it have this once every other worker asks, too.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    return Notice(
        tuple(info.preempted_node_ids), None if info.deadline_ms is None else info.deadline_ms / 1e3
    )
