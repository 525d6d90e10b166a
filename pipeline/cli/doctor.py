"""`spiketrain doctor`: checks whether this machine, or a cluster, can train."""

import sys
from typing import Annotated

import typer

from pipeline.cli.options import RUNS, Commands, Runs

commands = Commands()


@commands.command(epilog="Example: spiketrain doctor --address auto --runs /shared/runs")
def doctor(
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help=(
                "of a Ray cluster: auto, host:6379; without it, or with local, this machine is"
                " checked"
            ),
        ),
    ] = None,
    runs: Runs = RUNS,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            "--checkpoints",
            metavar="DIR|URI",
            help="where runs are to keep their checkpoints: each node tries to write there",
        ),
    ] = None,
) -> None:
    """Check this machine, or each node of the cluster at --address, and advise what to repair.

    Exit code 1 if a training would fail.
    """
    from pipeline.launch.preflight import preflight, print_findings

    findings = preflight(runs, address=address, checkpoints=checkpoints)
    print_findings(findings)
    sys.exit(any(each.state == "bad" for each in findings))
