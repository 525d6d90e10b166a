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
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pipeline.core.secrets import is_secret
from pipeline.core.torch_settings import EXACT, environment

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

    Ray passes on a fixed list of its own, and forces OMP_NUM_THREADS to 1. Secrets are left out:
    Ray writes these variables to its logs, and each machine has its own secrets.

    Args:
        threads: torch's threads.
        alone: the workers are on one machine, and no other machine may reach them.
    """
    # A worker starts in another folder. Packages that the user trusts lie beside the recipe or on
    # the path.
    return {
        # Defaults first: the variables that are passed on hold the user's own values.
        **({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if alone else {}),
        **(EXACT if gpus else {}),  # NCCL reads it when it first connects
        **{
            name: value
            for name, value in os.environ.items()
            if name.startswith(PASSED_ON) and not is_secret(name)
        },
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
    # A failed collective raises a RuntimeError, a lost connection to storage an OSError.
    lost_peer = {
        rank
        for rank, error in errors.items()
        if isinstance(error, RuntimeError)
        and any(words in str(error).lower() for words in LOST_PEER)
    }
    rank = min(errors, key=lambda rank: (rank in lost_peer, rank))
    return rank, errors[rank]


# --------------------------------------------------------------------------------------- the token

TOKEN_ADVICE = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that has it"


_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def draw_token() -> None:
    """Draw a token for our own cluster, unless the user has named one.

    The token stays in the environment of our processes, which no other user can read. Ray 2.60
    would write its own token to ~/.ray/auth_token.
    """
    if not any(name in os.environ for name in _TOKENS):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def offer_token() -> None:
    """Let this driver show its token. A driver of Ray 2.60 shows it only in this mode."""
    file = Path("~/.ray/auth_token").expanduser()
    if any(name in os.environ for name in _TOKENS) or file.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Inside, drop what C++ code of this process writes to stderr."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
