"""The Ray launcher: Ray Train starts the worker processes and restarts dead workers.

Ray provides processes and a process group, and nothing else. Checkpoints and metrics do not pass
through Ray: Ray's record of them (2.60) lags behind the disk, and one truncated file makes the
record unreadable. The run's folder is the only record.
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
    cores_and_loader_threads,
    refuse_unusable_gpus,
    workers_use_gpus,
)
from pipeline.launch.ray_cluster import (
    TOKEN_ADVICE,
    alive_nodes,
    blocked_signal,
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
from pipeline.train.job import Job, Notice, RankInfo, stop_reason, was_stopped
from pipeline.train.worker import run
from pipeline.train.writer_lock import journal

Work = Callable[[Job, RankInfo], dict[str, Any] | None]

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Seconds between two checks for dead workers; 2 by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # At the default of 15, other processes slow down training and falsify measurements.
    "RAY_worker_niceness": "0",
    # 0 is the default of Ray's next release. Without this setting, Ray 2.60 prints a warning.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Only for a cluster that a launch starts.
OWN_CLUSTER_SETTINGS = {
    # Its node is 127.0.0.1, and Ray's servers listen only there. This is Ray's default on Windows
    # and macOS (2.60).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Nobody drains its node, so no process has to look for notices at each attempt.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}

CONNECT_TIMEOUT_S = 600  # Starting workers connect within this time. No watchdog runs yet.
# The watchdog ends a worker that hangs. The other workers wait this much longer than the watchdog.
AFTER_WATCHDOG_S = 600


class LaunchError(RuntimeError):
    """A run failed. The message is one line."""


class WorkersEnded(LaunchError):
    """The workers died and are not restarted.

    `is_for_the_user`: the cause stays until a user changes something.
    """

    def __init__(self, message: str, *, is_for_the_user: bool = False) -> None:
        super().__init__(message)
        self.is_for_the_user = is_for_the_user


@dataclass
class Ray:
    """Starts workers on an existing Ray cluster, or on a new one on this machine.

    Args:
        cluster: the options of the launch.
        work: the function that each worker calls with its job and its rank. Benchmarks pass a
            function that measures.
        needs_cores: whether to refuse a cluster that now has too few cores or GPUs for the workers.
    """

    cluster: Cluster
    work: Work = run
    needs_cores: bool = True

    def __post_init__(self) -> None:
        self.min_workers = self.cluster.sizes[0]

    def __enter__(self) -> Self:
        """Join the cluster, or start one.

        This must happen in the main thread: Ray's servers end with the thread that started them.

        Raises:
            UserError: no cluster can be joined, the cluster has too few cores or GPUs, or this
                machine's GPUs cannot be used.
        """
        address, n_sizes = self.cluster.address, len(self.cluster.sizes)
        settings = SETTINGS | worker_start_timeout(self.cluster.node_loss, n_sizes=n_sizes)
        if address is None:
            refuse_unusable_gpus(self.cluster.device)
            settings |= OWN_CLUSTER_SETTINGS
            say_stage("starting Ray")
            draw_token()
        else:
            say_stage(f"joining the Ray cluster at {address}")
            offer_token()
        for name, value in settings.items():  # Ray reads the settings when it is imported
            os.environ.setdefault(name, value)
        try:
            self._connect()
            if self.needs_cores:
                self._refuse_too_few_cores()
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
                cores = max(
                    self.min_workers * self.cluster.worker_settings["threads"], cores_here()
                )
                # A terminal that closes sends SIGHUP to all its processes. SIGHUP must not end
                # Ray: workers have to save first.
                with blocked_signal(signal.SIGHUP):
                    # Without "local", Ray would join a cluster that runs on this machine.
                    ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
            else:
                # If nothing listens at the address, Ray 2.60 would try for minutes.
                host, colon, port = address.rpartition("://")[2].rpartition(":")
                if colon and port.isdigit():
                    socket.create_connection((host, int(port)), timeout=5).close()
                with silent_stderr():  # Ray's C++ code writes a line for each attempt to join
                    ray.init(address=address, **quiet)
        except AuthenticationError as error:  # this process has no token
            raise UserError(
                f"ray: the cluster's token must be set; got none: {error.message}; {TOKEN_ADVICE}"
            ) from error
        # Ray 2.60 raises an Exception of no class of its own if a start takes more than 30 s.
        except Exception as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            if address is None:
                raise UserError(
                    f"ray: a cluster must start on this machine; got: {reason}; try again when the"
                    " machine is less busy, or train with one worker and without Ray by --inline"
                ) from error
            # Ray 2.60 raises "no cluster found" also if a cluster refused the token.
            raise UserError(
                f"ray: the cluster at {address} must run and accept this process; got: {reason}; if"
                f" it runs, {TOKEN_ADVICE}"
            ) from error

    def __exit__(self, *exc: object) -> None:
        import ray

        ray.shutdown()

    def _refuse_too_few_cores(self) -> None:
        import ray

        _, cores, _ = self._worker_resources()
        available = ray.cluster_resources().get("CPU", 0)
        if available < (required := self.min_workers * cores):
            raise UserError(
                f"launch: {counted(self.min_workers, 'worker')} x {counted(cores, 'cpu')} need"
                f" {counted(required, 'core')}; the cluster has {available:.0f}"
            )

    def _worker_resources(self) -> tuple[bool, int, int]:
        """Whether a worker gets a GPU, and the numbers of its cores and its loader threads, on the
        nodes that are up now.

        Raises:
            UserError: workers use GPUs, and there are too few.
        """
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0))
        uses_gpus = workers_use_gpus(self.cluster.device, self.min_workers, gpus)
        cores, loader_threads = cores_and_loader_threads(
            [node["Resources"] for node in alive_nodes()] if uses_gpus else [],
            uses_gpus=uses_gpus,
            cores=self.cluster.cpus_per_worker,
            loader_threads=self.cluster.loader_threads,
        )
        return uses_gpus, cores, loader_threads

    def max_parallel_runs(self) -> int | None:
        """The number of runs that can train at the same time, each on its own cores and GPUs.

        None: unknown, because a joined cluster without GPUs may count logical cores, and workers
        reserve physical cores.
        """
        import ray

        resources = ray.cluster_resources()
        uses_gpus, cores, _ = self._worker_resources()
        if not uses_gpus and self.cluster.address is not None:
            return None
        all_cores = int(resources.get("CPU", 0)) if uses_gpus else cores_here()
        runs = all_cores // (self.min_workers * cores)
        return min(runs, int(resources["GPU"]) // self.min_workers) if uses_gpus else runs

    def resume_options(self) -> list[str]:
        """Options of `spiketrain resume` that let another process train on the same cluster."""
        import ray

        return [
            "--address",
            self.cluster.address or ray.get_runtime_context().gcs_address,
            "--workers",
            str(self.min_workers),
        ]

    def run(self, job: Job, attempt: str) -> dict[str, Any] | None:
        """Train to the end. Returns the summary, or None if the run was asked to stop.

        Raises:
            UserError: a worker refused to continue until the user changes something.
            LaunchError: the workers died and are not restarted (`WorkersEnded`), or there were no
                resources for them.
        """
        from pipeline.launch.ray_trainer import is_lack_of_resources, needs_the_user

        try:
            result = self._trainer(job, attempt).fit().return_value
        except Exception as error:  # Ray wraps a worker's error in several layers
            if not is_lack_of_resources(error):
                raise WorkersEnded(
                    innermost(error), is_for_the_user=needs_the_user(error)
                ) from error
            folder = Path(job.run)
            if not was_stopped(folder):
                raise LaunchError(
                    f"launch: there were no resources for {counted(self.min_workers, 'worker')} in"
                    " time: other jobs use them, or a node was lost and not replaced"
                ) from error
            saved = last_event(RunFolder(folder).journal, Checkpoint)
            with journal(folder, Ranks()) as tracker:
                tracker.write(
                    Stopped(
                        step=0 if saved is None else saved.step,
                        reason=f"{stop_reason(folder)} while it waited for resources",
                        resume_command=job.resume_command,
                    )
                )
            return None
        if result is not None and "refused" in result:
            raise UserError(result["refused"])
        return result

    def _trainer(self, job: Job, attempt: str) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        from pipeline.launch.ray_trainer import CHECK_INTERVAL_S, HOST, LoopbackConfig, Trainer

        uses_gpus, cores, loader_threads = self._worker_resources()
        if uses_gpus:
            job = replace(job, threads=cores, loader_threads=loader_threads)
        sizes = self.cluster.sizes
        is_elastic = len(sizes) > 1
        # True if this launch, or the launch of the run's suite, has started the cluster. The
        # addresses of the nodes show this. The address of the cluster does not.
        on_loopback = all(node["NodeManagerAddress"] == HOST for node in alive_nodes())
        return Trainer(
            partial(_train, work=self.work, sizes=sizes),
            sizes=sizes,
            folder=Path(job.run),
            waits_for_nodes=self.cluster.address is not None,
            train_loop_config=asdict(job),
            torch_config=(LoopbackConfig if on_loopback else TorchConfig)(
                backend="nccl" if uses_gpus else "gloo", timeout_s=CONNECT_TIMEOUT_S
            ),
            scaling_config=ScalingConfig(
                num_workers=(sizes[0], sizes[-1]) if is_elastic else self.min_workers,
                elastic_resize_monitor_interval_s=CHECK_INTERVAL_S,
                use_gpu=uses_gpus,
                resources_per_worker={"CPU": cores, **({"GPU": 1} if uses_gpus else {})},
            ),
            run_config=RunConfig(
                name=f"attempt-{attempt}",  # a new name, so that Ray restores no earlier state
                storage_path=str(Path(job.run) / "ray"),
                failure_config=FailureConfig(
                    max_failures=self.cluster.max_restarts,
                    # `Resizing` (-1: Ray sets no limit) or `Restarts` decides how long the run
                    # waits for resources.
                    controller_failure_limit=-1 if is_elastic else 1,
                ),
                worker_runtime_env={
                    "env_vars": worker_environment(
                        threads=cores,
                        loader_threads=job.loader_threads,
                        uses_gpus=uses_gpus,
                        on_loopback=on_loopback,
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
    rank_info = RankInfo(
        context.get_world_rank(),
        context.get_world_size(),
        str(get_device()),
        context.get_local_rank(),
        sizes,
        _drain_notice,
    )
    # A collective must wait longer than the watchdog of a worker that hangs. Otherwise the
    # collective first ends a healthy worker, and Ray then ends the hung worker before its watchdog
    # writes the stacks.
    after_watchdog = timedelta(minutes=job.hang_minutes, seconds=AFTER_WATCHDOG_S)
    distributed.distributed_c10d._set_pg_timeout(
        after_watchdog if job.hang_minutes else COLLECTIVE_TIMEOUT, distributed.group.WORLD
    )
    try:
        return work(job, rank_info)
    except UserError as error:  # returned, not raised: a restart would not help
        return {"refused": str(error)}


def _drain_notice() -> Notice | None:
    """Ray's notice that nodes of this run are being drained.

    `ray.train.get_preemption_info` is not used, because it returns only after every worker has
    called it (2.60).
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    return Notice(
        tuple(info.preempted_node_ids), None if info.deadline_ms is None else info.deadline_ms / 1e3
    )
