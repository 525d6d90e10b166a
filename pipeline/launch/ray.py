"""Ray Train starts one worker process per accelerator and starts them again when one dies.

Ray is asked for processes and a process group, no more: checkpoints and metrics never pass through it, because what it
remembers of them lags behind the disk and is lost with one truncated file (ray 2.60). The run's own folder counts.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from pipeline.cores import physical_cores
from pipeline.door import heard, knock, offer_token, reason
from pipeline.job import Job, Notice, Place
from pipeline.launch.base import Device, LaunchError, Silent, takes_gpus
from pipeline.launch.node_loss import NodeLoss, waits_for
from pipeline.malloc import environment
from pipeline.ports import free_port
from pipeline.refused import Refused
from pipeline.worker import run

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # how soon a dead worker is noticed; 2 s by default
    "RAY_worker_niceness": "0",  # 15 by default: any other process on the machine would slow training, and its measurement
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default of the next release, without the warning of this one
}


G = TypeVar("G")
R = TypeVar("R")

PASSED_ON = ("NCCL_", "GLOO_", "TORCH_", "UCX_", "FI_", "HF_")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
"""in the name of a variable that is not passed on: Ray writes the others down in its logs, and a machine has its own secrets"""


class Ray:
    """Workers on a Ray cluster: an existing one, or one of our own on this machine.

    Args:
        workers: processes that train together; of several numbers (ascending) as many as there is room for, from time to time.
        address: of an existing cluster (`auto`, `host:6379`, `ray://...`); None starts one here.
        device: whether each worker gets a GPU; see `takes_gpus`.
        cpus_per_worker: cores that Ray reserves for a worker; torch gets one thread for each.
        max_restarts: how often the workers are started again after one of them died, with nothing new between (`restarts.py`).
        node_loss: how long a node that says nothing is waited for.
        work: what a worker does with its job (None: train it); benchmarks measure inside it.
    """

    def __init__(
        self,
        *,
        workers: int | tuple[int, ...],
        address: str | None = None,
        cpus_per_worker: int = 1,
        device: Device = "auto",
        max_restarts: int = 3,
        node_loss: NodeLoss = "fast",
        work: Callable[[Job, Place], dict[str, Any] | None] = run,
    ) -> None:
        self.work = work
        self.sizes = workers if isinstance(workers, tuple) else (workers,)
        self.workers = self.sizes[0]
        self.node_loss: NodeLoss = node_loss
        self.address = address
        self.cpus_per_worker = cpus_per_worker
        self.device: Device = device
        self.max_restarts = max_restarts
        self._owned = False

    def __enter__(self) -> Self:
        """Join the cluster, or start one: in the main thread, because Ray's servers end with the thread that started them."""
        for name, value in {**SETTINGS, **waits_for(self.node_loss, sizes=len(self.sizes))}.items():
            os.environ.setdefault(name, value)
        if self.address is not None:
            offer_token()  # Ray reads its settings when it is imported
        import ray

        self._owned = not ray.is_initialized()
        if self._owned:
            said: list[str] = []
            try:
                if self.address is None:
                    cores = max(self.workers * self.cpus_per_worker, len(physical_cores(os.sched_getaffinity(0))))
                    # Not one that somebody else has started on this machine, which Ray would join if it were not told so.
                    here = {"address": "local", "num_cpus": cores, "include_dashboard": False}
                    ray.init(**here, log_to_driver=False, logging_level=logging.ERROR)
                else:
                    knock(self.address)
                    with heard() as said:
                        ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
            except (OSError, RuntimeError) as error:  # a ConnectionError is an OSError
                raise Refused(f"ray: no cluster let us in at {self.address!r}: {reason(error, said)}") from error
        wanted, there = self.workers * self.cpus_per_worker, ray.cluster_resources().get("CPU", 0)
        if there < wanted:
            self.__exit__()
            raise Refused(
                f"launch: {self.workers} workers x {self.cpus_per_worker} cpus need {wanted} cores; the cluster has {there:.0f}"
            )
        return self

    def __exit__(self, *exc: object) -> None:
        if self._owned:
            import ray

            ray.shutdown()
            self._owned = False

    def room(self) -> int:
        # A cluster of the user's own has the CPUs that it was started with: physical cores, where runs are to have their own.
        import ray

        there = ray.cluster_resources()
        cpus = int(there.get("CPU", 0)) // (self.workers * self.cpus_per_worker)
        gpus = int(there.get("GPU", 0))
        return min(cpus, gpus // self.workers) if takes_gpus(self.device, self.workers, gpus) else cpus

    def on_each_node(self, work: Callable[[G], R], given: G, *, within_s: float) -> list[R | Silent]:
        """What `work(given)` returns on each node that is up, the head first."""
        import ray

        run, nodes = ray.remote(work), self._nodes()
        there = {"num_cpus": 0, "max_retries": 0}
        asked = [run.options(**there, scheduling_strategy=_on(node)).remote(given) for node in nodes]
        ray.wait(asked, num_returns=len(asked), timeout=within_s)
        return [_answer(each, node, within_s=0) for each, node in zip(asked, nodes, strict=True)]

    def at_once(self, work: Callable[[G, int], R], given: Callable[[str, int, int, bool], G], *, within_s: float) -> list[R]:
        """What `work(given, rank)` returns of processes that run together as a training's do, in the order of ranks.

        One for each GPU of the cluster, or where it has none for each node that has cores. `given` is made of an address and
        a free port of the first one's node, how many there are, and whether they have a GPU each. Nothing, where there is one.

        Raises:
            LaunchError: one of them failed, or there was no room for all of them in time.
        """
        import ray
        from ray.exceptions import RayError

        nodes = [(_on(node), node["Resources"]) for node in self._nodes()]
        gpus = any(has.get("GPU") for _, has in nodes)
        places = [on for on, has in nodes for _ in range(int(has.get("GPU", 0)) if gpus else int(has.get("CPU", 0) > 0))]
        if len(places) < 2:
            return []
        known = {"env_vars": _passed_on()}
        there = {"num_cpus": 0, "num_gpus": int(gpus), "runtime_env": known, "max_retries": 0}
        started: list[Any] = []
        try:
            host, port = ray.get(
                ray.remote(_open_door).options(num_cpus=0, scheduling_strategy=places[0]).remote(), timeout=within_s
            )
            asked = given(host, port, len(places), gpus)
            run = ray.remote(work)
            started += [run.options(**there, scheduling_strategy=each).remote(asked, rank) for rank, each in enumerate(places)]
            return ray.get(started, timeout=within_s)
        except RayError as error:
            for each in started:
                ray.cancel(each, force=True)
            raise LaunchError(_innermost(getattr(error, "cause", None) or error)) from error

    def clocks(self, *, within_s: float) -> dict[str, tuple[float, float] | Silent]:
        """Of each node by its address: seconds that its clock is ahead of this one, and half the round trip that told so."""
        import ray

        found: dict[str, tuple[float, float] | Silent] = {}
        tell = ray.remote(_now)
        for node in self._nodes():
            told: list[tuple[float, float]] = []
            for _ in range(5):  # the first starts a process there
                sent = time.time()
                asked = tell.options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node)).remote()
                there = _answer(asked, node, within_s=within_s)
                back = time.time()
                if isinstance(there, Silent):
                    found[there.address] = there
                    break
                told.append(((back - sent) / 2, there - (sent + back) / 2))
            else:
                uncertain, ahead = min(told)
                found[node["NodeManagerAddress"]] = (ahead, uncertain)
        return found

    def _nodes(self) -> list[dict[str, Any]]:
        import ray

        there = [node for node in ray.nodes() if node["Alive"]]
        return sorted(there, key=lambda node: "node:__internal_head__" not in node["Resources"])

    def joining(self) -> list[str]:
        return ["--address", self.address or self.found_at(), "--workers", str(self.workers)]

    def found_at(self) -> str:
        """The address by which others find this cluster, whatever there is in their environment."""
        import ray

        return self.address if self.address not in (None, "auto") else ray.get_runtime_context().gcs_address

    def run(self, job: Job, attempt: str) -> dict[str, Any] | None:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        from pipeline.launch.resizing import LOOK_S
        from pipeline.launch.trainer import Trainer

        gpus = takes_gpus(self.device, self.workers, int(ray.cluster_resources().get("GPU", 0)))
        elastic = len(self.sizes) > 1
        trainer = Trainer(
            partial(_train, work=self.work, sizes=self.sizes),
            sizes=self.sizes,
            folder=Path(job.run),
            awaits_nodes=self.address is not None,
            train_loop_config=asdict(job),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=600),
            scaling_config=ScalingConfig(
                num_workers=(self.sizes[0], self.sizes[-1]) if elastic else self.workers,
                elastic_resize_monitor_interval_s=LOOK_S,
                use_gpu=gpus,
                resources_per_worker={"CPU": self.cpus_per_worker, **({"GPU": 1} if gpus else {})},
            ),
            run_config=RunConfig(
                name=f"attempt-{attempt}",  # a new name each time: nothing that Ray remembers can stand in the way
                storage_path=str(Path(job.run) / "ray"),
                failure_config=FailureConfig(
                    max_failures=self.max_restarts,
                    # Places that are not there in time: several numbers of workers wait for as long as there is room for none,
                    # a fixed number as `Restarts` says.
                    controller_failure_limit=-1 if elastic else 1,
                ),
                worker_runtime_env={"env_vars": self._environment(job, gpus)},
            ),
        )
        try:
            outcome = trainer.fit().return_value
        except Exception as error:  # Ray wraps whatever a worker raised in several layers of its own
            raise LaunchError(_innermost(error)) from error
        if outcome is not None and "refused" in outcome:
            raise Refused(outcome["refused"])
        return outcome

    def _environment(self, job: Job, gpus: bool) -> dict[str, str]:
        """What reaches every worker: Ray passes on a fixed list of its own, and forces OMP_NUM_THREADS to 1 by itself."""
        threads = str(self.cpus_per_worker)
        return {
            **_passed_on(),
            # A worker starts in a folder of its own; a package that the user trusts lies beside the recipe or on the path.
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(str(Path(entry).absolute()) for entry in sys.path)),
            **environment(),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads beside a busy process were nine times slower
            "NUMBA_NUM_THREADS": str(job.loader_threads),
            # What the workers have, not what this process sees; and workers without a GPU each must not meet the few there are.
            **({"DS_ACCELERATOR": "cuda"} if gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}),
        }


def _passed_on() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    return {name: value for name, value in own.items() if not any(word in name.upper() for word in SECRET)}


def _on(node: dict[str, Any]) -> Any:
    """On this node, and on no other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _answer(asked: Any, node: dict[str, Any], *, within_s: float) -> Any:
    """What comes of a task on this node; Silent where it fails, or takes too long, and is ended."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(asked, timeout=within_s)
    except GetTimeoutError:
        ray.cancel(asked, force=True)
        why = "it does not answer in time"
    except RayError as error:
        why = _innermost(getattr(error, "cause", None) or error)
    return Silent(node["NodeManagerAddress"], why)


def _now() -> float:
    return time.time()  # by itself it is no function that Ray takes


def _open_door() -> tuple[str, int]:
    """This node's address, and a port of it that nobody uses."""
    import ray

    return ray.util.get_node_ip_address(), free_port("")


def _train(
    config: dict[str, Any], *, work: Callable[[Job, Place], dict[str, Any] | None], sizes: tuple[int, ...]
) -> dict[str, Any] | None:
    """Runs in every worker process."""
    from ray import train
    from ray.train.torch import get_device

    context = train.get_context()
    job = Job(**{**config, "trust": tuple(config["trust"])})
    place = Place(context.get_world_rank(), context.get_world_size(), str(get_device()), context.get_local_rank(), sizes, _notice)
    try:
        return work(job, place)
    except Refused as error:  # returned, not raised: starting again would not help
        return {"refused": str(error)}


def _notice() -> Notice | None:
    """Ray's word that nodes of this run are being drained; collective."""
    from ray.train import get_preemption_info

    info = get_preemption_info()
    if info is None:
        return None
    return Notice(tuple(info.preempted_node_ids), None if info.deadline_ms is None else info.deadline_ms / 1e3)


def _innermost(error: BaseException) -> str:
    """The line that a user can act on, out of Ray's nested exceptions."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = sorted(failures.items())[0]
        text = str(getattr(first, "cause", None) or first).strip().splitlines()
        return f"worker {rank}: {text[-1] if text else type(first).__name__}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}"
