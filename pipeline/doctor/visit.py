"""All checks, on this machine or on every node of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.doctor.findings import Finding, of_clocks, of_mlflow, of_network, of_nodes, of_silent, of_token
from pipeline.doctor.meeting import Meeting, meet, meet_here
from pipeline.doctor.node import Asked, examine
from pipeline.doctor.stranger import stranger
from pipeline.launch.base import LaunchError, Silent
from pipeline.launch.ray import Ray
from pipeline.marker import marked
from pipeline.track.mlflow import tracking_uri

EXAMINED_S = 300.0
"""the first time FFCV and numba compile"""
CLOCK_S = 30.0
MEETING_S = 120.0


def visit(runs: Path, *, address: str | None, checkpoint_bytes: float, keep: int) -> list[Finding]:
    """What was found here, or with `address` on each node of that cluster.

    Raises:
        Refused: no cluster let us in.
        OSError: the folder of runs cannot be made.
    """
    runs = runs.absolute()
    runs.mkdir(parents=True, exist_ok=True)
    needed = checkpoint_bytes * (keep + 1)
    with marked(runs, prefix=".doctor-") as marker:
        asked = Asked(runs=str(runs), marker=marker)
        if address is None:
            here = examine(asked)
            found = list(of_nodes([here], runs=str(runs), needed_bytes=needed))
            found += of_network(*_met_here(len(here.gpus)))
        else:
            with Ray(workers=0, address=address) as cluster:
                answers = cluster.nodes.on_each(examine, asked, within_s=EXAMINED_S)
                found = list(of_silent([each for each in answers if isinstance(each, Silent)]))
                nodes = [each for each in answers if not isinstance(each, Silent)]
                found += of_nodes(nodes, runs=str(runs), needed_bytes=needed)
                found += of_clocks(cluster.nodes.clocks(within_s=CLOCK_S))
                found += of_network(*_met(cluster))
                at = cluster.found_at()
            found.append(of_token(stranger(at), at))
    return [*found, of_mlflow(tracking_uri(runs))]


def _met_here(cards: int) -> tuple[Sequence[float], str]:
    """As `_met`, of processes with a card each; one alone, or none, has nobody to meet."""
    if cards < 2:
        return (), ""
    try:
        return meet_here(cards, backend="nccl"), ""
    except RuntimeError as error:
        return (), str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _met(cluster: Ray) -> tuple[Sequence[float], str]:
    """The bytes per second of each process that met the others, and what was in the way."""

    def asked(host: str, port: int, size: int, gpus: bool) -> Meeting:
        return Meeting(host=host, port=port, size=size, backend="nccl" if gpus else "gloo")

    try:
        return cluster.nodes.at_once(meet, asked, within_s=MEETING_S), ""
    except LaunchError as error:
        return (), str(error)
