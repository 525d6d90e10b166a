"""The nodes of the Ray cluster that this process has joined, asked one by one or all at once: what `doctor` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pipeline.launch.base import LaunchError, Silent
from pipeline.launch.environment import passed_on
from pipeline.launch.innermost import innermost
from pipeline.ports import free_port

G = TypeVar("G")
R = TypeVar("R")


class Nodes:
    def on_each(self, work: Callable[[G], R], given: Callable[[Mapping[str, float]], G], *, within_s: float) -> list[R | Silent]:
        """What `work` returns on each node that is up, the head first; it has what `given` makes of the node's resources."""
        import ray

        run, nodes = ray.remote(work), _alive()
        there = {"num_cpus": 0, "max_retries": 0}
        asked = [run.options(**there, scheduling_strategy=_on(node)).remote(given(node["Resources"])) for node in nodes]
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

        nodes = [(_on(node), node["Resources"]) for node in _alive()]
        gpus = any(has.get("GPU") for _, has in nodes)
        places = [on for on, has in nodes for _ in range(int(has.get("GPU", 0)) if gpus else int(has.get("CPU", 0) > 0))]
        if len(places) < 2:
            return []
        there = {"num_cpus": 0, "num_gpus": int(gpus), "runtime_env": {"env_vars": passed_on()}, "max_retries": 0}
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
            raise LaunchError(innermost(getattr(error, "cause", None) or error)) from error

    def clocks(self, *, within_s: float) -> dict[str, tuple[float, float] | Silent]:
        """Of each node by its address: seconds that its clock is ahead of this one, and half the round trip that told so."""
        import ray

        tell, nodes = ray.remote(_now), _alive()
        ask = [tell.options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node)) for node in nodes]
        first = [each.remote() for each in ask]  # starts a process there, on all of them at once: one that hangs costs the time
        ray.wait(first, num_returns=len(first), timeout=within_s)
        return {
            node["NodeManagerAddress"]: _clock(each, awake, node, within_s=within_s)
            for node, each, awake in zip(nodes, ask, first, strict=True)
        }


def _alive() -> list[dict[str, Any]]:
    import ray

    there = [node for node in ray.nodes() if node["Alive"]]
    return sorted(there, key=lambda node: "node:__internal_head__" not in node["Resources"])


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
        why = innermost(getattr(error, "cause", None) or error)
    return Silent(node["NodeManagerAddress"], why)


def _clock(ask: Any, awake: Any, node: dict[str, Any], *, within_s: float) -> tuple[float, float] | Silent:
    """The best of four round trips, once the node is `awake`: what a first answer says."""
    if isinstance(told := _answer(awake, node, within_s=0), Silent):
        return told
    round_trips: list[tuple[float, float]] = []
    for _ in range(4):
        sent = time.time()
        told = _answer(ask.remote(), node, within_s=within_s)
        back = time.time()
        if isinstance(told, Silent):
            return told
        round_trips.append(((back - sent) / 2, told - (sent + back) / 2))
    uncertain, ahead = min(round_trips)
    return ahead, uncertain


def _now() -> float:
    return time.time()  # by itself it is no function that Ray takes


def _open_door() -> tuple[str, int]:
    """This node's address, and a port of it that nobody uses."""
    import ray

    return ray.util.get_node_ip_address(), free_port("")
