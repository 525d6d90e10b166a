"""A Ray cluster: its settings for node loss, its nodes, the environment of its workers, its errors
and its token.

Two profiles of node loss (`--node-loss`) decide when a node that does not answer counts as lost. A
cluster has one of them.

    fast       A dead node is noticed within about 4 s. The run continues with fewer workers, or
               waits up to an hour for another node. A node whose link is cut for about 4 s counts
               as dead too. Ray does not let it join again, so its operator has to restart it.
               This profile is for nodes that are killed: preemptible machines, autoscalers.
    patient    A silent node counts as lost after half a minute or more. If its link is mended
               before that time, the workers continue or are restarted on the same nodes. Otherwise
               the run continues as with `fast`. This profile is for machines that stay, on an
               unreliable network.

A profile consists of environment variables. `NODE_SETTINGS` are for the processes that start the
cluster's nodes (`ray start`, the `env` of a manifest). `worker_start_timeout` is for the process
that launches. A cluster that a launch starts is one machine, and needs no profile. Source: measured
with ray 2.60 on two hosts made of network namespaces and on clusters of one machine. From the kill
of a node to the next step, `fast` took 16 s and Ray's defaults took 40 s.
"""

import os
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pipeline.core.secrets import is_secret
from pipeline.core.torch_settings import EXACT, malloc_environment

NodeLoss = Literal["fast", "patient"]

NODE_SETTINGS: dict[NodeLoss, dict[str, str]] = {
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

# Prefixes of the variables that workers inherit: networks, caches, allocators, compilers.
INHERITED_PREFIXES = (
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
    "NUMBA_CACHE_",
    "XDG_CACHE_",
)


def worker_start_timeout(node_loss: NodeLoss, *, n_sizes: int) -> dict[str, str]:
    """Ray Train's setting for its wait for the resources of all workers.

    If the run may have several numbers of workers (`n_sizes` > 1), Ray Train then asks for fewer.
    """
    if node_loss == "fast" and n_sizes == 1:
        return {}
    return {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120" if node_loss == "patient" else "8"}


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's description of each node that is up. The head comes first."""
    import ray

    return sorted(
        (node for node in ray.nodes() if node["Alive"]),
        key=lambda node: "node:__internal_head__" not in node["Resources"],
    )


def worker_environment(
    *, threads: int, loader_threads: int, uses_gpus: bool, on_loopback: bool
) -> dict[str, str]:
    """The environment variables of every worker.

    By itself Ray passes only a fixed list of variables, and sets OMP_NUM_THREADS to 1. Secrets are
    left out: Ray writes these variables to its logs, and each machine has its own secrets.

    Args:
        threads: torch's threads.
        on_loopback: all workers are on one machine, and no other machine may reach them.
    """
    return {
        # Defaults come first: the user's variables replace them.
        **({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if on_loopback else {}),
        **(EXACT if uses_gpus else {}),  # NCCL reads it when it first connects
        **{
            name: value
            for name, value in os.environ.items()
            if name.startswith(INHERITED_PREFIXES) and not is_secret(name)
        },
        # On this path, workers find the packages that the user trusts. Workers start in another
        # folder, so the path is absolute.
        "PYTHONPATH": os.pathsep.join(
            dict.fromkeys(str(Path(entry).absolute()) for entry in sys.path)
        ),
        **malloc_environment(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # active waiting beside a busy process was nine times slower
        "NUMBA_NUM_THREADS": str(loader_threads),
        # These depend on the GPUs of the workers, not on the GPUs that this process sees. If
        # workers train on CPUs, they must not use the GPUs of their node.
        "DS_ACCELERATOR": "cuda" if uses_gpus else "cpu",
        **({} if uses_gpus else {"CUDA_VISIBLE_DEVICES": ""}),
    }


# Parts of the error messages of a worker that has lost its connection to another worker (torch
# 2.13).
LOST_PEER_MESSAGES = (
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
    "ray removed its process group",
)


def innermost(error: BaseException) -> str:
    """The last line of the error that a worker raised, after `worker RANK: `. If no worker raised
    one, the last line of `error`, after its type. Ray nests errors.
    """
    subject, raised = type(error).__name__, error
    if failures := getattr(error, "worker_failures", None):
        rank, raised = cause(failures)
        subject = f"worker {rank}"
    lines = str(raised).strip().splitlines()
    return f"{subject}: {lines[-1] if lines else type(raised).__name__}"


def cause(failures: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """The rank and the error that caused the failures of several workers.

    This is the lowest rank whose error is not the loss of another worker. If all workers lost
    another worker, it is the lowest rank.
    """
    errors = {rank: getattr(error, "cause", None) or error for rank, error in failures.items()}
    # A failed collective raises a RuntimeError. A lost connection to storage raises an OSError with
    # a similar message.
    ranks_that_lost_a_peer = {
        rank
        for rank, error in errors.items()
        if isinstance(error, RuntimeError)
        and any(part in str(error).lower() for part in LOST_PEER_MESSAGES)
    }
    rank = min(errors, key=lambda rank: (rank in ranks_that_lost_a_peer, rank))
    return rank, errors[rank]


# --------------------------------------------------------------------------------------- the token

TOKEN_ADVICE = "set RAY_AUTH_TOKEN to its token, or RAY_AUTH_TOKEN_PATH to the token's file"
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def draw_token() -> None:
    """Draw a token for the cluster that this process starts, unless the user has set one.

    The token stays in the environment of this process and its children, which no other user can
    read. Ray 2.60 would write its own token to ~/.ray/auth_token.
    """
    if not any(name in os.environ for name in _TOKEN_VARIABLES):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def offer_token() -> None:
    """Let this process send the user's token, if there is one. Ray 2.60 sends a token only if
    RAY_AUTH_MODE is "token".
    """
    file = Path("~/.ray/auth_token").expanduser()
    if any(name in os.environ for name in _TOKEN_VARIABLES) or file.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Inside the block, drop all text of this process on stderr, also the text of C++ code."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextmanager
def blocked_signal(number: signal.Signals) -> Iterator[None]:
    """Block a signal in this thread and in the processes that it starts inside the block."""
    earlier_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier_mask)
