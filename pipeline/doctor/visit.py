"""All checks, on this machine or on every node of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pipeline.checkpoint import absolute
from pipeline.doctor.checkpoints import Kept, Wanted, is_folder, left_at, try_address
from pipeline.doctor.failed import named
from pipeline.doctor.findings import Finding, of_clocks, of_kept, of_network, of_nodes, of_silent, of_token, of_unwritten
from pipeline.doctor.meeting import Meeting, meet, meet_here
from pipeline.doctor.node import Asked, examine
from pipeline.doctor.run_lock import held
from pipeline.doctor.stranger import stranger
from pipeline.doctor.tracking import of_mlflow
from pipeline.launch.base import LaunchError, Silent
from pipeline.launch.ray import Ray
from pipeline.marker import marked
from pipeline.track.mlflow import tracking_uri

EXAMINED_S = 300.0
"""the first time FFCV and numba compile"""
CLOCK_S = 30.0
MEETING_S = 300.0
"""for processes that meet (`Meeting.patience_s`), with their start on up to some 100 cards"""
KEPT_S = 120.0
"""a store that nobody answers for is tried for a while"""


def visit(
    runs: Path, *, address: str | None, checkpoint_bytes: float, keep: int, checkpoints: str | None = None
) -> list[Finding]:
    """What was found here, or with `address`, unless it is `local`, on each node of that cluster.

    `checkpoints`: where runs keep them, if not inside.

    Raises:
        Refused: no cluster let us in, or the address of checkpoints holds credentials.
        OSError: the folder of runs cannot be made.
    """
    place = None if checkpoints is None else absolute(checkpoints)
    runs = runs.absolute()
    runs.mkdir(parents=True, exist_ok=True)
    with_runs, elsewhere = (checkpoint_bytes * count for count in _counts(place, keep))
    with ExitStack() as meanwhile:
        try:
            marker = meanwhile.enter_context(marked(runs, prefix=".doctor-"))
            meanwhile.enter_context(held(runs / marker.name))
        except OSError as error:
            return [of_unwritten(str(runs), named(error))]
        asked = Asked(runs=str(runs), marker=marker)
        if address in (None, "local"):  # which a launch would start, with a token of its own
            here = examine(asked)
            found = list(of_nodes([here], runs=str(runs), needed_bytes=with_runs))
            found += of_network(*_met_here(len(here.gpus)))
            if place is not None:
                found += of_kept([try_address(Wanted(address=place))], address=place, needed_bytes=elsewhere)
        else:
            with Ray(workers=0, device="cpu", address=address) as cluster:
                answers = cluster.nodes.on_each(examine, lambda has: replace(asked, resources=has), within_s=EXAMINED_S)
                found = list(of_silent([each for each in answers if isinstance(each, Silent)]))
                nodes = [each for each in answers if not isinstance(each, Silent)]
                found += of_nodes(nodes, runs=str(runs), needed_bytes=with_runs)
                if place is not None:
                    found += of_kept(_kept(cluster, place), address=place, needed_bytes=elsewhere)
                found += of_clocks(cluster.nodes.clocks(within_s=CLOCK_S))
                found += of_network(*_met(cluster))
                at = cluster.found_at()
            found.append(of_token(stranger(at), at))
    return [*found, of_mlflow(tracking_uri(runs))]


def _counts(place: str | None, keep: int) -> tuple[int, int]:
    """How many checkpoints lie with the runs at one time, and how many at `place`."""
    if place is None:
        return keep + 1, 0  # the one that is being written
    # What goes to a store is written with the run first; what comes from one is read there.
    return (0, keep + 1) if is_folder(place) else (2, 0)


def _kept(cluster: Ray, place: str) -> list[Kept | Silent]:
    """As each node has tried it; this machine, whose driver looks there too, where it could not."""
    with left_at(place) as left:
        here = [Kept(name="this machine", failed=left)] if isinstance(left, str) else []
        wanted = Wanted(address=place, left=None if isinstance(left, str) else left)
        return [*here, *cluster.nodes.on_each(try_address, lambda has: wanted, within_s=KEPT_S)]


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
