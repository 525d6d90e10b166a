"""`spiketrain doctor`: is this machine, or this cluster, fit to train?"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipeline.commands.options import RUNS, Runs, number_option

Address = Annotated[
    str | None,
    typer.Option("--address", help="of a Ray cluster: auto, host:6379; without it, or with local, this machine is checked"),
]
Place = Annotated[
    str | None,
    typer.Option("--checkpoints", metavar="DIR|URI", help="where runs are to keep their checkpoints: it is tried on each node"),
]
Size = Annotated[float, number_option("--checkpoint-gb", min=0, max=1e6, help="how large a checkpoint will be")]
Keep = Annotated[int, typer.Option("--keep", min=1, help="how many of them a run keeps")]


def add_doctor_command(app: typer.Typer) -> None:
    app.command(epilog="Example: spiketrain doctor --address auto --runs /shared/runs")(doctor)


def doctor(
    address: Address = None, runs: Runs = RUNS, checkpoints: Place = None, checkpoint_gb: Size = 1.0, keep: Keep = 3
) -> None:
    """Check this machine, or each node of the cluster at --address, and say what to do about what is found.

    Exit code 1 where something is in the way of a training.
    """
    from pipeline.doctor.visit import visit
    from pipeline.report.doctor import print_findings

    found = visit(runs, address=address, checkpoints=checkpoints, checkpoint_bytes=checkpoint_gb * 1e9, keep=keep)
    print_findings(found)
    sys.exit(any(each.state == "bad" for each in found))
