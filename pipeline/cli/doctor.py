"""`spiketrain doctor`: checks whether this machine, or a cluster, can train."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from pipeline.cli.options import RUNS, Commands, Runs
from pipeline.core.printing import new_console, say

if TYPE_CHECKING:
    from pipeline.launch.preflight import Finding


_MARKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "bad": ("BAD", "bold red")}


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
    from pipeline.launch.preflight import preflight

    findings = preflight(runs, address=address, checkpoints=checkpoints)
    print_findings(findings)
    sys.exit(any(each.state == "bad" for each in findings))


def print_findings(found: Sequence[Finding], console: Console | None = None) -> None:
    """Print a line for each finding, its advice on the next line, and a summary at the end."""
    console = console or new_console()
    for each in found:
        mark, style = _MARKS[each.state]
        label = Text.assemble((f"{mark:4}", style), f"  {each.check:9} ")
        say(console, each.text, label=label)
        if each.advice:
            say(console, each.advice, label=" " * label.cell_len)
    bad = sum(each.state == "bad" for each in found)
    say(console, "fit to train" if not bad else f"not fit to train: {bad} of the above to mend")
