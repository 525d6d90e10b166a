"""The Ray cluster that this process has joined: tasks on its nodes, the environment of workers, and
the error that a user can act on.

Two profiles of node loss (`--node-loss`) say when a node that does not answer counts as lost. They
exclude each other.

    fast       A dead node is noticed within about 4 s. The run continues with fewer workers, or
               waits up to an hour for another node. A node whose link is cut for about 4 s counts
               as dead too, and Ray does not let it join again: its operator has to restart it. For
               nodes that are killed: preemptible machines, autoscalers.
    patient    The run waits through a cut of half a minute or more. No node is lost, and the
               workers continue or are restarted on the same nodes. It waits as long for a dead
               node, before it continues without it. For machines that stay, on an unreliable
               network.

A profile sets two environments: `NODES` of the processes that start the cluster's nodes
(`ray start`, the `env` of a manifest) and `worker_start_timeout` of the process that launches. A
cluster that a launch starts by itself is one machine, and needs neither. Source: measured with ray
2.60 on two hosts made of network namespaces and on clusters of one machine. From the kill of a node
to the next step `fast` took 16 s, Ray's defaults 40 s.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.core.secrets import is_secret
from pipeline.core.torch_settings import EXACT, environment
from pipeline.launch.base import NoAnswer

G = TypeVar("G")
R = TypeVar("R")
NodeLoss = Literal["fast", "patient"]

NODES: dict[NodeLoss, dict[str, str]] = {
    "fast": {
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
    },
    "patient": {
        "RAY_grpc_keepalive_time_ms": "60000",
        "RAY_grpc_keepalive_timeout_ms": "120000",
        "RAY_grpc_client_keepalive_timeout_ms": "120000",
    },
}

PASSED_ON = ("NCCL_", "GLOO_", "TORCH_", "UCX_", "FI_", "HF_", "PYTORCH_", "CUBLAS_", "TRITON_")
PASSED_ON += ("TORCHINDUCTOR_",)
"""Prefixes of variables that workers inherit: networks, caches, allocators, compilers."""


def worker_start_timeout(node_loss: NodeLoss, *, sizes: int) -> dict[str, str]:
    """Ray Train's setting of how long it waits for room for all workers.

    After that it asks for fewer workers, if the run has several sizes.
    """
    seconds = "120" if node_loss == "patient" else "8" if sizes > 1 else None
    return {} if seconds is None else {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": seconds}


def run_on_each(
    work: Callable[[G], R], given: Callable[[Mapping[str, float]], G], *, within_s: float
) -> list[R | NoAnswer]:
    """Run `work(given(resources))` on each node that is up, the head first."""
    import ray

    run, nodes = ray.remote(work), alive_nodes()
    options = {"num_cpus": 0, "max_retries": 0}
    tasks = [
        run.options(**options, scheduling_strategy=_only_on(node)).remote(given(node["Resources"]))
        for node in nodes
    ]
    ray.wait(tasks, num_returns=len(tasks), timeout=within_s)
    return [_answer(task, node) for task, node in zip(tasks, nodes, strict=True)]


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's description of each node that is up, the head first."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: "node:__internal_head__" not in node["Resources"])


def _only_on(node: dict[str, Any]) -> Any:
    """A scheduling strategy that allows this node only."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _answer(task: Any, node: dict[str, Any]) -> Any:
    """The result of a task whose time is over; NoAnswer if it failed or still runs."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(task, timeout=0)
    except GetTimeoutError:
        ray.cancel(task, force=True)
        why = "it does not answer in time"
    except RayError as error:
        why = innermost(getattr(error, "cause", None) or error)
    return NoAnswer(node["NodeManagerAddress"], why)


def worker_environment(
    *, threads: int, loader_threads: int, gpus: bool, alone: bool
) -> dict[str, str]:
    """The environment variables of every worker.

    Ray passes on a fixed list of its own, and forces OMP_NUM_THREADS to 1.

    Args:
        threads: torch's threads.
        alone: the workers are on one machine, and no other machine may reach them.
    """
    # Defaults first: passed_on() holds the user's own values.
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if alone else {}
    exact = EXACT if gpus else {}  # NCCL reads it when it first connects
    # It depends on the workers' GPUs, not on those that this process sees. If not each worker has a
    # GPU, none of them may use the few that exist.
    no_gpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # A worker starts in another folder. Packages that the user trusts lie beside the recipe or on
    # the path.
    path = dict.fromkeys(str(Path(entry).absolute()) for entry in sys.path)
    return {
        **loopback,
        **exact,
        **passed_on(),
        "PYTHONPATH": os.pathsep.join(path),
        **environment(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning beside a busy process was nine times slower
        "NUMBA_NUM_THREADS": str(loader_threads),
        **({"DS_ACCELERATOR": "cuda"} if gpus else no_gpu),
    }


def passed_on() -> dict[str, str]:
    """The variables of this process with the prefixes PASSED_ON.

    Secrets are left out: Ray writes these variables to its logs, and each machine has its own
    secrets.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON) and not is_secret(name)
    }


_GLOO = ("connection closed by peer", "connection reset by peer", "timed out waiting")
_GLOO += ("timeout caused pair closure",)
_NCCL = ("remote process exit", "communicator was aborted", "collective operation timeout")
_TORCH_STORE = ("connection was likely closed",)
_OURS = ("process group was taken away",)  # Ranks.raise_if_gone
LOST_PEER = _GLOO + _NCCL + _TORCH_STORE + _OURS
"""Parts of the messages of a worker that has lost another worker (torch 2.13)."""


def innermost(error: BaseException) -> str:
    """The one line of Ray's nested exceptions that a user can act on."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = cause(failures)
        text = str(first).strip().splitlines()
        return f"worker {rank}: {text[-1] if text else type(first).__name__}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}"


def cause(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """The rank and the error that caused the other failures, if workers failed together.

    This is the lowest rank that did not fail because it lost another worker, or the lowest rank if
    all did.
    """
    errors = {rank: getattr(error, "cause", None) or error for rank, error in failures.items()}
    rank = min(errors, key=lambda rank: (_lost_peer(errors[rank]), rank))
    return rank, errors[rank]


def _lost_peer(error: BaseException) -> bool:
    """Whether the error is that of a failed collective: a RuntimeError. A lost connection to
    storage raises an OSError.
    """
    return isinstance(error, RuntimeError) and any(
        words in str(error).lower() for words in LOST_PEER
    )
