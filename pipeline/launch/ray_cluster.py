"""The nodes of the Ray cluster that this process has joined: each is asked, or all at once.

A port to listen at.

When a node that says nothing counts as lost: two answers, of which a cluster needs one, as they
exclude each other.

    fast       a dead node is found within some 4 s, and the run goes on with fewer workers, or
               waits an hour for another. A node whose link is cut for as long counts as dead too,
               and Ray lets it join no more: whoever starts the nodes has to start that one again.
               For nodes that are killed: preemptible machines, autoscalers.
    patient    a cut of half a minute and more is waited out: no node is lost, and the workers go on
               where they are or are started again on the same nodes. A node that is dead is waited
               for as long, before the run goes on without it. For machines that stay, on a network
               that may not.

A profile is the environment of two: `NODES` of whatever starts the cluster's head and its nodes
(`ray start`, a manifest's `env`) and `waits_for` of the process that launches, which `--node-loss`
sets. A cluster that a launch starts by itself is one machine, and needs none of it. Source:
measured with ray 2.60 on two hosts made of network namespaces and on clusters of one machine; 16 s
from the kill of a node to the next step with `fast`, 40 s with Ray's defaults.

The environment variables of worker processes. Ray passes on a fixed list of its own, and forces
OMP_NUM_THREADS to 1.

The line that a user can act on, out of Ray's nested exceptions.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.core.allocator import environment
from pipeline.core.secrets import is_secret
from pipeline.core.torch_settings import EXACT
from pipeline.launch.base import LaunchError, NoAnswer

G = TypeVar("G")
R = TypeVar("R")


class Nodes:
    def run_on_each(
        self, work: Callable[[G], R], given: Callable[[Mapping[str, float]], G], *, within_s: float
    ) -> list[R | NoAnswer]:
        """What `work` returns on each node that is up, the head first; it has what `given` makes of
        the node's resources.
        """
        import ray

        run, nodes = ray.remote(work), _alive()
        there = {"num_cpus": 0, "max_retries": 0}
        asked = [
            run.options(**there, scheduling_strategy=_on(node)).remote(given(node["Resources"]))
            for node in nodes
        ]
        ray.wait(asked, num_returns=len(asked), timeout=within_s)
        return [_answer(each, node) for each, node in zip(asked, nodes, strict=True)]

    def at_once(
        self,
        work: Callable[[G, int], R],
        given: Callable[[str, int, int, bool], G],
        *,
        within_s: float,
    ) -> list[R]:
        """What `work(given, rank)` returns of processes that run together as a training's do, in
        the order of ranks.

        One for each GPU of the cluster, or where it has none for each node that has cores. `given`
        is made of an address and a free port of the first one's node, how many there are, and
        whether they have a GPU each. Nothing, where there is one.

        Raises:
            LaunchError: one of them failed, or there was no room for all of them in time.
        """
        import ray
        from ray.exceptions import RayError

        nodes = [(_on(node), node["Resources"]) for node in _alive()]
        gpus = any(has.get("GPU") for _, has in nodes)
        places = [
            on
            for on, has in nodes
            for _ in range(int(has.get("GPU", 0)) if gpus else int(has.get("CPU", 0) > 0))
        ]
        if len(places) < 2:
            return []
        there = {
            "num_cpus": 0,
            "num_gpus": int(gpus),
            "runtime_env": {"env_vars": passed_on()},
            "max_retries": 0,
        }
        started: list[Any] = []
        try:
            host, port = ray.get(
                ray.remote(_open_door).options(num_cpus=0, scheduling_strategy=places[0]).remote(),
                timeout=within_s,
            )
            asked = given(host, port, len(places), gpus)
            run = ray.remote(work)
            started += [
                run.options(**there, scheduling_strategy=each).remote(asked, rank)
                for rank, each in enumerate(places)
            ]
            return ray.get(started, timeout=within_s)
        except RayError as error:
            for each in started:
                ray.cancel(each, force=True)
            raise LaunchError(innermost(getattr(error, "cause", None) or error)) from error


def _alive() -> list[dict[str, Any]]:
    import ray

    there = [node for node in ray.nodes() if node["Alive"]]
    return sorted(there, key=lambda node: "node:__internal_head__" not in node["Resources"])


def _on(node: dict[str, Any]) -> Any:
    """On this node, and on no other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _answer(asked: Any, node: dict[str, Any]) -> Any:
    """The result of a task that has had its time; NoAnswer where it failed or has not ended."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(asked, timeout=0)
    except GetTimeoutError:
        ray.cancel(asked, force=True)
        why = "it does not answer in time"
    except RayError as error:
        why = innermost(getattr(error, "cause", None) or error)
    return NoAnswer(node["NodeManagerAddress"], why)


def _open_door() -> tuple[str, int]:
    """This node's address, and a port of it that nobody uses."""
    import ray

    return ray.util.get_node_ip_address(), free_port("")


def free_port(host: str = "127.0.0.1") -> int:
    """One that nobody listens at on `host` ("" for every address of this machine), until somebody
    else is as quick.
    """
    with socket.socket() as door:
        door.bind((host, 0))
        return door.getsockname()[1]


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

_PLACES = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


def waits_for(node_loss: NodeLoss, *, sizes: int) -> dict[str, str]:
    """How long the places of all workers are waited for; after that fewer are asked for, where the
    run has several sizes.
    """
    if node_loss == "patient":
        return {_PLACES: "120"}
    return {_PLACES: "8"} if sizes > 1 else {}


PASSED_ON = (
    *("NCCL_", "GLOO_", "TORCH_", "UCX_", "FI_", "HF_"),
    *(
        "PYTORCH_",
        "CUBLAS_",
        "TRITON_",
        "TORCHINDUCTOR_",
    ),  # allocator, workspaces, and where compiled kernels are kept
)


def worker_environment(
    *, threads: int, loader_threads: int, gpus: bool, alone: bool
) -> dict[str, str]:
    """What reaches every worker; `threads` of torch's; `alone`: on one machine, which nobody else
    is to reach them on.
    """
    return {
        **(
            {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if alone else {}
        ),  # unless the user says otherwise
        **(EXACT if gpus else {}),  # likewise; NCCL reads it when it first meets the others
        **passed_on(),
        # A worker starts in a folder of its own; a package that the user trusts lies beside the
        # recipe or on the path.
        "PYTHONPATH": os.pathsep.join(
            dict.fromkeys(str(Path(entry).absolute()) for entry in sys.path)
        ),
        **environment(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": (
            "PASSIVE"
        ),  # spinning threads beside a busy process were nine times slower
        "NUMBA_NUM_THREADS": str(loader_threads),
        # What the workers have, not what this process sees; and workers without a GPU each must not
        # meet the few there are.
        **(
            {"DS_ACCELERATOR": "cuda"}
            if gpus
            else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        ),
    }


def passed_on() -> dict[str, str]:
    """What this process has been told of networks, caches and compilers.

    No secrets: Ray writes these variables down in its logs, and a machine has its own.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON) and not is_secret(name)
    }


_LOST = (
    *(
        "connection closed by peer",
        "connection reset by peer",
        "timed out waiting",
        "timeout caused pair closure",
    ),  # gloo
    *("remote process exit", "communicator was aborted", "collective operation timeout"),  # NCCL
    *(
        "connection was likely closed",
        "process group was taken away",
    ),  # torch's store, and Ranks.raise_if_gone
)
"""what a worker says that has lost another one (torch 2.13)"""


def innermost(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = cause(failures)
        text = str(first).strip().splitlines()
        return f"worker {rank}: {text[-1] if text else type(first).__name__}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}"


def cause(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """Of workers that failed together the lowest rank that has not only lost another one, and what
    it failed of.
    """
    found = {rank: getattr(error, "cause", None) or error for rank, error in failures.items()}
    rank = min(found, key=lambda rank: (_has_lost_another(found[rank]), rank))
    return rank, found[rank]


def _has_lost_another(error: BaseException) -> bool:
    """By a collective's error, which is a RuntimeError: a connection of its own, to storage say,
    fails with an OSError.
    """
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST)
