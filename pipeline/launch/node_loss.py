"""When a node that says nothing counts as lost: two answers, of which a cluster needs one, as they
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
"""

from __future__ import annotations

from typing import Literal

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
