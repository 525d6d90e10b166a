"""A Ray cluster whose nodes a test kills, drains and adds.

It is a `ray.cluster_utils.Cluster` in a process with an environment of its own. Every node is on
this machine, with one CPU: room for one worker.
"""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
"""what a process needs in its environment to join: a cluster without it would not be answered by
drivers that have one
"""


class Nodes:
    """What a test says to that process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._answer()

    def add(self) -> int:
        """One node more; its number."""
        return int(self._ask("add"))

    def kill(self, number: int) -> None:
        """With SIGKILL, and all that runs on it."""
        self._ask(f"kill {number}")

    def drain(self, number: int, *, seconds: float) -> None:
        """Let the node's workers know that it is taken away in so many seconds; nobody takes it."""
        self._ask(f"drain {number} {seconds}")

    def _ask(self, words: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{words}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("nodes: "):
                return line.removeprefix("nodes: ").strip()
        raise AssertionError("the cluster's process ended")


@contextmanager
def nodes(environment: Mapping[str, str]) -> Iterator[Nodes]:
    """A head with room for one worker, in this environment beside the process's own."""
    with tempfile.TemporaryDirectory() as place:  # short: Ray's sockets lie in it
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.nodes"],
            env={**os.environ, "RAY_TMPDIR": place, **TOKEN, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            yield Nodes(process)
        finally:  # never `ray stop`, which ends every Ray there is
            family = [
                *psutil.Process(process.pid).children(recursive=True),
                psutil.Process(process.pid),
            ]
            for each in family:
                each.kill()
            psutil.wait_procs(family, timeout=20)
            process.wait()


def main() -> None:
    import ray  # noqa: F401  (before cluster_utils)
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # Cython
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    there = {}
    print(f"nodes: {cluster.address}", flush=True)
    for line in sys.stdin:
        what, *words = line.split()
        answer = "done"
        if what == "add":
            answer = str(len(there))
            there[len(there)] = cluster.add_node(num_cpus=1)
        elif what == "kill":
            cluster.remove_node(there[int(words[0])], allow_graceful=False)
        else:
            deadline = int((time.time() + float(words[1])) * 1e3)
            reason = 2  # DRAIN_NODE_REASON_PREEMPTION of autoscaler.proto (ray 2.60)
            accepted, refusal = GcsClient(address=cluster.address).drain_node(
                there[int(words[0])].node_id, reason, "taken away", deadline
            )
            answer = "done" if accepted else refusal
        print(f"nodes: {answer}", flush=True)


if __name__ == "__main__":
    main()
