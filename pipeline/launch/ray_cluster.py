"""A Ray cluster: the token to join it, tasks on its nodes, the environment of workers, and the
error that a user can act on.

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
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

# Prefixes of variables that workers inherit: networks, caches, allocators, compilers.
PASSED_ON = (
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "UCX_",
    "FI_",
    "HF_",
    "PYTORCH_",
    "CUBLAS_",
    "TRITON_",
    "TORCHINDUCTOR_",
)


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
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    run, nodes = ray.remote(work), alive_nodes()
    tasks = [
        run.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(given(node["Resources"]))
        for node in nodes
    ]
    ray.wait(tasks, num_returns=len(tasks), timeout=within_s)
    answers: list[R | NoAnswer] = []
    for task, node in zip(tasks, nodes, strict=True):
        try:
            answers.append(ray.get(task, timeout=0))
        except GetTimeoutError:
            ray.cancel(task, force=True)
            answers.append(NoAnswer(node["NodeManagerAddress"], "it does not answer in time"))
        except RayError as error:
            why = innermost(getattr(error, "cause", None) or error)
            answers.append(NoAnswer(node["NodeManagerAddress"], why))
    return answers


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's description of each node that is up, the head first."""
    import ray

    return sorted(
        (node for node in ray.nodes() if node["Alive"]),
        key=lambda node: "node:__internal_head__" not in node["Resources"],
    )


def worker_environment(
    *, threads: int, loader_threads: int, gpus: bool, alone: bool
) -> dict[str, str]:
    """The environment variables of every worker.

    Ray passes on a fixed list of its own, and forces OMP_NUM_THREADS to 1.

    Args:
        threads: torch's threads.
        alone: the workers are on one machine, and no other machine may reach them.
    """
    # A worker starts in another folder. Packages that the user trusts lie beside the recipe or on
    # the path.
    return {
        # Defaults first: passed_on() holds the user's own values.
        **({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if alone else {}),
        **(EXACT if gpus else {}),  # NCCL reads it when it first connects
        **passed_on(),
        "PYTHONPATH": os.pathsep.join(
            dict.fromkeys(str(Path(entry).absolute()) for entry in sys.path)
        ),
        **environment(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning beside a busy process was nine times slower
        "NUMBA_NUM_THREADS": str(loader_threads),
        # It depends on the workers' GPUs, not on those that this process sees. If not each worker
        # has a GPU, none of them may use the few that exist.
        "DS_ACCELERATOR": "cuda" if gpus else "cpu",
        **({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}),
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


# Parts of the messages of a worker that has lost another worker (torch 2.13).
LOST_PEER = (
    # gloo
    "connection closed by peer",
    "connection reset by peer",
    "timed out waiting",
    "timeout caused pair closure",
    # NCCL
    "remote process exit",
    "communicator was aborted",
    "collective operation timeout",
    # torch's store
    "connection was likely closed",
    # train/worker.py
    "process group was taken away",
)


def innermost(error: BaseException) -> str:
    """The one line of Ray's nested exceptions that a user can act on."""
    who, first = type(error).__name__, error
    if failures := getattr(error, "worker_failures", None):
        rank, first = cause(failures)
        who = f"worker {rank}"
    text = str(first).strip().splitlines()
    return f"{who}: {text[-1] if text else type(first).__name__}"


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


# --------------------------------------------------------------------------------------- the token

TOKEN_ADVICE = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that has it"


def draw_token() -> None:
    """Draw a token for our own cluster, unless the user has named one.

    The token stays in the environment of our processes, which no other user can read. Ray 2.60
    would write its own token to ~/.ray/auth_token.
    """
    if not _is_in_environment():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def offer_token() -> None:
    """Let this driver show its token. A driver of Ray 2.60 shows it only in this mode."""
    if _is_in_environment() or Path("~/.ray/auth_token").expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _is_in_environment() -> bool:
    return any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))


def refuse_silent_address(address: str) -> None:
    """Raises: OSError within seconds if nothing listens at the address. Ray 2.60 would try for
    minutes.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


@contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Capture what Ray's C++ code writes to stderr, which is one line for each attempt to join.

    The list has the lines after the `with` block. They are also printed if no exception was raised.
    """
    lines: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
    for line in lines:
        print(line, file=sys.stderr)


def reason(error: Exception, stderr: Sequence[str]) -> str:
    """The reason why the cluster could not be joined, in one line.

    Ray 2.60 raises "no cluster found" also if a cluster refused the token.
    """
    if any("InvalidAuthToken" in line for line in stderr):  # of Ray's C++ code
        shown = "shows another" if os.environ.get("RAY_AUTH_MODE") == "token" else "shows none"
        return f"it wants its token and this client {shown}; {TOKEN_ADVICE}"
    return f"{str(error).splitlines()[0]}; is it running?"
