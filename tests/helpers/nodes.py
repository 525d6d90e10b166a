"""A Ray cluster whose nodes a test kills, drains and adds.

It is a `ray.cluster_utils.Cluster` in a process with an environment of its own. Every node is on
this machine, with one CPU: room for one worker.
"""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from typing import Any

import psutil

from tests.helpers.waiting import end_with_parent

# What a process needs in its environment to join: a cluster without it would not be answered by
# drivers that have one
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


class Nodes:
    """What a test has that process do."""

    def __init__(self, pool: ProcessPoolExecutor, environment: Mapping[str, str]) -> None:
        self._pool = pool
        self.address: str = pool.submit(_begin, dict(environment)).result()

    def add(self) -> int:
        """One node more; its number."""
        return self._pool.submit(_add).result()

    def kill(self, number: int) -> None:
        """With SIGKILL, and all that runs on it."""
        self._pool.submit(_kill, number).result()

    def drain(self, number: int, *, seconds: float) -> None:
        """Let the node's workers know that it is taken away in so many seconds; nobody takes it."""
        self._pool.submit(_drain, number, seconds).result()


@contextmanager
def nodes(environment: Mapping[str, str]) -> Iterator[Nodes]:
    """A head with room for one worker, in this environment beside the process's own."""
    # The place is short: Ray's sockets lie in it.
    with (
        tempfile.TemporaryDirectory() as place,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        process = psutil.Process(pool.submit(os.getpid).result())
        try:
            yield Nodes(pool, {"RAY_TMPDIR": place, **TOKEN, **environment})
        finally:  # never `ray stop`, which ends every Ray there is
            family = [*process.children(recursive=True), process]
            for each in family:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(family, timeout=20)


# in that process: the cluster, and the nodes by their numbers
_there: dict[str, Any] = {}


def _begin(environment: dict[str, str]) -> str:
    end_with_parent()
    os.environ.update(environment)
    import ray  # noqa: F401  (before cluster_utils)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False}
    _there.update(cluster=Cluster(initialize_head=True, head_node_args=head), nodes=[])
    return _there["cluster"].address


def _add() -> int:
    _there["nodes"].append(_there["cluster"].add_node(num_cpus=1))
    return len(_there["nodes"]) - 1


def _kill(number: int) -> None:
    _there["cluster"].remove_node(_there["nodes"][number], allow_graceful=False)


def _drain(number: int, seconds: float) -> None:
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # Cython

    deadline = int((time.time() + seconds) * 1e3)
    reason = 2  # DRAIN_NODE_REASON_PREEMPTION of autoscaler.proto (ray 2.60)
    node = _there["nodes"][number].node_id
    gcs = GcsClient(address=_there["cluster"].address)
    accepted, refusal = gcs.drain_node(node, reason, "taken away", deadline)
    assert accepted, refusal


def free_port() -> int:
    """A port at which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def join_without_token(address: str) -> str:
    """Try to join a Ray cluster from a process without its token: refused, joined or no answer."""
    join = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False)"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as stderr:
        environment = kept | {"HOME": home, "RAY_AUTH_MODE": "disabled"}  # no token in that home
        command = [sys.executable, "-c", join, address]
        with subprocess.Popen(command, env=environment, stderr=stderr) as process:
            deadline, code, said = time.monotonic() + 60, None, b""
            # Ray would go on trying for a minute after a refusal.
            while code is None and b"InvalidAuthToken" not in said and time.monotonic() < deadline:
                time.sleep(0.2)
                code = process.poll()
                said = os.pread(stderr.fileno(), 1 << 20, 0)
            process.kill()
    if b"InvalidAuthToken" in said:
        return "refused"
    return "joined" if code == 0 else f"no answer: {said.decode(errors='replace')}"
