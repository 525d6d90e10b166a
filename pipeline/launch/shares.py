"""How many cores and loader threads a worker gets where nobody has said so.

One core decodes some hundreds of JPEGs in a second, which leaves a card idle most of the time. So a
worker with a GPU gets its share of the node: cores of the node over its GPUs. A worker on a CPU
gets one core, and runs are compared on that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from pipeline.core.errors import DataError


class Share(NamedTuple):
    """Of one worker."""

    cores: int
    loader_threads: int


def share_of(
    nodes: Iterable[Mapping[str, float]],
    *,
    gpus: bool,
    cores: int | Literal["auto"] = "auto",
    loader_threads: int | Literal["auto"] = "auto",
) -> Share:
    """`nodes`: the resources of each, as Ray counts them. A number that somebody has said stays."""
    found = cores if cores != "auto" else cores_of_a_card(nodes) if gpus else 1
    return Share(
        found, loader_threads if loader_threads != "auto" else loaders_for(found) if gpus else 1
    )


def cores_of_a_card(nodes: Iterable[Mapping[str, float]]) -> int:
    """On the node where it has the fewest: all workers get as many. At least one."""
    having = [node for node in nodes if node.get("GPU", 0) >= 1]
    return max(1, min((int(node.get("CPU", 0) // node["GPU"]) for node in having), default=1))


def loaders_for(cores: int) -> int:
    """One where numba has no TBB: the reader refuses several then."""
    from pipeline.data.ffcv.tbb import require_tbb  # imports numba, which takes a second

    try:
        require_tbb()
    except DataError:
        return 1
    return cores
