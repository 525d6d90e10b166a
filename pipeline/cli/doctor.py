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
                "address of the Ray cluster to check, such as auto or host:6379; local, the"
                " default, is this machine"
            ),
        ),
    ] = None,
    runs: Runs = RUNS,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            "--checkpoints",
            metavar="DIR|URI",
            help="folder or address of checkpoints; each node tries to write there",
        ),
    ] = None,
) -> None:
    """Check this machine, or each node of the cluster at --address, and advise what to repair.

    The exit code is 1 if a training run would fail, or if MLflow cannot be used.
    """
    from pipeline.launch.preflight import preflight, print_findings

    findings = preflight(runs, address=address, checkpoints=checkpoints)
    print_findings(findings)
    sys.exit(any(each.state == "bad" for each in findings))
