"""The Ray launcher: Ray Train starts one worker process per accelerator, and restarts dead workers.

Ray provides processes and a process group, and nothing else. Checkpoints and metrics do not pass
through it: Ray's own record of them (2.60) lags behind the disk, and one truncated file loses it.
The run's own folder is the only record.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import distributed

from pipeline.core.cpu_affinity import cores_here
from pipeline.core.errors import UserError
from pipeline.core.run_folder import RunFolder
from pipeline.core.stages import say_stage
from pipeline.core.units import counted
from pipeline.launch.cluster import (
    Cluster,
    LaunchError,
    WorkersEnded,
    refuse_unusable_cards,
    share_of,
    takes_gpus,
)
from pipeline.launch.driver_signals import blocked_signal
from pipeline.launch.ray_cluster import (
    TOKEN_ADVICE,
    alive_nodes,
    draw_token,
    innermost,
    offer_token,
    silent_stderr,
    worker_environment,
    worker_start_timeout,
)
from pipeline.track.events import Checkpoint, Stopped
from pipeline.track.journal import last_event
from pipeline.train.backend.collectives import COLLECTIVE_TIMEOUT, Ranks
from pipeline.train.job import Job, Notice, RankInfo, stop_requester, was_stopped
from pipeline.train.worker import run
from pipeline.train.writer_lock import journal

Work = Callable[[Job, RankInfo], dict[str, Any] | None]

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # The time after which a dead worker is noticed; 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # 15 by default: other processes would slow down training, and falsify what is measured.
    "RAY_worker_niceness": "0",
    # The default of the next release, without the warning of this one.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# For a cluster of our own: the node is 127.0.0.1, as on those systems, and Ray's servers listen
# nowhere else (2.60).
OWN_CLUSTER = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

MEETING_S = 600  # Longest wait for starting workers to connect. No watchdog runs yet.
# Additional time that a healthy worker waits for another one, after the watchdog should have ended
# that worker.
AFTER_WATCHDOG_S = 600


@dataclass
class Ray:
    """Workers on a Ray cluster: an existing one, or one of our own on this machine.

    Args:
        cluster: the options of the launch.
        work: a worker calls it with its job. Benchmarks measure inside it.
        needs_room: refuse a cluster that has too few cores for the workers now.
    """

    cluster: Cluster
    work: Work = run
    needs_room: bool = True

    def __post_init__(self) -> None:
        self.least = self.cluster.sizes[0]

    def __enter__(self) -> Self:
        """Join the cluster, or start one.

        This must happen in the main thread: Ray's servers end with the thread that started them.
        """
        address, sizes = self.cluster.address, len(self.cluster.sizes)
        settings = SETTINGS | worker_start_timeout(self.cluster.node_loss, sizes=sizes)
        if address is None:
            refuse_unusable_cards(self.cluster.device)
            settings |= OWN_CLUSTER
            say_stage("starting Ray")
            draw_token()
        else:
            say_stage(f"joining the Ray cluster at {address}")
            offer_token()
        for name, value in settings.items():  # Ray reads them when it is imported
            os.environ.setdefault(name, value)
        try:
            self._connect()
            if self.needs_room:
                self._refuse_too_few()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _connect(self) -> None:
        import ray
        from ray.exceptions import AuthenticationError

        address = self.cluster.address
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address is None:
                cores = max(self.least * self.cluster.worker_settings["threads"], cores_here())
                # A terminal that closes sends SIGHUP to all its processes. Workers have to save
                # first. "local": Ray would otherwise join a cluster that runs on this machine.
                with blocked_signal(signal.SIGHUP):
                    ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
            else:
                # If nothing listens there, Ray 2.60 would try for minutes.
                host, colon, port = address.rpartition("://")[2].rpartition(":")
                if colon and port.isdigit():
                    socket.create_connection((host, int(port)), timeout=5).close()
                with silent_stderr():  # Ray's C++ code writes a line for each attempt to join
                    ray.init(address=address, **quiet)
        except AuthenticationError as error:  # this process has no token
            raise UserError(
                f"ray: a token must be at hand; got none: {error.message}; {TOKEN_ADVICE}"
            ) from error
        except (OSError, RuntimeError) as error:  # a ConnectionError is an OSError
            # Ray 2.60 raises "no cluster found" also if a cluster refused the token.
            raise UserError(
                f"ray: no cluster let us in at {address!r}: {str(error).splitlines()[0]}; is it"
                f" running, and has this client its token? {TOKEN_ADVICE}"
            ) from error

    def __exit__(self, *exc: object) -> None:
        import ray

        ray.shutdown()

    def _refuse_too_few(self) -> None:
        import ray

        _, cores_each, _ = self._share()
        cores = ray.cluster_resources().get("CPU", 0)
        if cores < (wanted := self.least * cores_each):
            raise UserError(
                f"launch: {counted(self.least, 'worker')} x {counted(cores_each, 'cpu')} need"
                f" {counted(wanted, 'core')}; the cluster has {cores:.0f}"
            )

    def _share(self) -> tuple[bool, int, int]:
        """Whether each worker gets a GPU, and its cores and loader threads on the nodes that are up
        now.
        """
        import ray

        has, asked = ray.cluster_resources(), self.cluster
        gpus = takes_gpus(asked.device, self.least, int(has.get("GPU", 0)))
        cores, loader_threads = share_of(
            [node["Resources"] for node in alive_nodes()] if gpus else [],
            gpus=gpus,
            cores=asked.cpus_per_worker,
            loader_threads=asked.loader_threads,
        )
        return gpus, cores, loader_threads

    def room(self) -> int | None:
        """The number of runs of this size that can train at the same time on cores and GPUs of
        their own. None: unknown, since the CPUs of a cluster that was joined may be logical cores,
        and workers reserve physical ones.
        """
        import ray

        has = ray.cluster_resources()
        gpus, cores, _ = self._share()
        if not gpus and self.cluster.address is not None:
            return None
        there = int(has.get("CPU", 0)) if gpus else cores_here()
        runs = there // (self.least * cores)
        return min(runs, int(has["GPU"]) // self.least) if gpus else runs

    def resume_options(self) -> list[str]:
        """Options of `spiketrain resume` that make another process train on the same machines."""
        import ray

        # The address of our own cluster is the one by which other processes find it.
        return [
            "--address",
            self.cluster.address or ray.get_runtime_context().gcs_address,
            "--workers",
            str(self.least),
        ]

    def run(self, job: Job, attempt: str) -> dict[str, Any] | None:
        """Train to the end. Returns the summary, or None when the run was asked to stop.

        Raises:
            UserError: the user has to change something.
            LaunchError: the workers failed more often than allowed.
        """
        from pipeline.launch.ray_trainer import has_no_place, needs_the_user, no_place

        try:
            outcome = self._trainer(job, attempt).fit().return_value
        except Exception as error:  # Ray wraps what a worker raised in several layers
            if not has_no_place(error):
                raise WorkersEnded(
                    innermost(error), is_for_the_user=needs_the_user(error)
                ) from error
            folder = Path(job.run)
            if not was_stopped(folder):
                raise LaunchError(no_place(self.least)) from error
            saved = last_event(RunFolder(folder).journal, Checkpoint)
            with journal(folder, Ranks()) as tracker:
                tracker.write(
                    Stopped(
                        step=0 if saved is None else saved.step,
                        reason=f"{stop_requester(folder)} while its workers had no place",
                        resume_command=job.resume_command,
                    )
                )
            return None
        if outcome is not None and "refused" in outcome:
            raise UserError(outcome["refused"])
        return outcome

    def _trainer(self, job: Job, attempt: str) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        from pipeline.launch.ray_trainer import HOST, LOOK_S, OnLoopback, Trainer

        gpus, cores, loader_threads = self._share()
        if gpus:
            job = replace(job, threads=cores, loader_threads=loader_threads)
        sizes = self.cluster.sizes
        elastic = len(sizes) > 1
        # Whether the cluster is ours, or belongs to a suite of ours that this process has joined.
        # Only the nodes show this: the address may be that of a client elsewhere.
        alone = all(node["NodeManagerAddress"] == HOST for node in alive_nodes())
        return Trainer(
            partial(_train, work=self.work, sizes=sizes),
            sizes=sizes,
            folder=Path(job.run),
            awaits_nodes=self.cluster.address is not None,
            train_loop_config=asdict(job),
            torch_config=(OnLoopback if alone else TorchConfig)(
                backend="nccl" if gpus else "gloo", timeout_s=MEETING_S
            ),
            scaling_config=ScalingConfig(
                num_workers=(sizes[0], sizes[-1]) if elastic else self.least,
                elastic_resize_monitor_interval_s=LOOK_S,
                use_gpu=gpus,
                resources_per_worker={"CPU": cores, **({"GPU": 1} if gpus else {})},
            ),
            run_config=RunConfig(
                name=f"attempt-{attempt}",  # always new: nothing that Ray remembers applies
                storage_path=str(Path(job.run) / "ray"),
                failure_config=FailureConfig(
                    max_failures=self.cluster.max_restarts,
                    # No room in time: `Resizing` and `Restarts` decide how long to wait.
                    controller_failure_limit=-1 if elastic else 1,
                ),
                worker_runtime_env={
                    "env_vars": worker_environment(
                        threads=cores,
                        loader_threads=job.loader_threads,
                        gpus=gpus,
                        alone=alone,
                    )
                },
            ),
        )


# Runs in every worker process.
def _train(config: dict[str, Any], *, work: Work, sizes: tuple[int, ...]) -> dict[str, Any] | None:
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    job = Job(**{**config, "trust": tuple(config["trust"])})
    rank = RankInfo(
        context.get_world_rank(),
        context.get_world_size(),
        str(get_device()),
        context.get_local_rank(),
        sizes,
        _notice,
    )
    # Collectives of all workers wait longer than a watchdog does. A collective that gave up earlier
    # would end a healthy worker. Ray would then end the one that hangs, before its stacks are
    # written.
    watched = timedelta(minutes=job.hang_minutes, seconds=AFTER_WATCHDOG_S)
    distributed.distributed_c10d._set_pg_timeout(
        watched if job.hang_minutes else COLLECTIVE_TIMEOUT, distributed.group.WORLD
    )
    try:
        return work(job, rank)
    except UserError as error:  # returned, not raised: a restart would not help
        return {"refused": str(error)}


def _notice() -> Notice | None:
    """Ray's notice to this worker that nodes of its run are being drained.

    `ray.train.get_preemption_info` (2.60) would give it only once every other worker asks, too.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    return Notice(
        tuple(info.preempted_node_ids), None if info.deadline_ms is None else info.deadline_ms / 1e3
    )
