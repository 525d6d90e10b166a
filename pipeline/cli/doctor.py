"""`spiketrain doctor`: is this machine, or this cluster, fit to train?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from pipeline.cli.options import RUNS, Runs, number_option
from pipeline.core.printing import new_console, say

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.launch.preflight import Finding

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help=(
            "of a Ray cluster: auto, host:6379; without it, or with local, this machine is checked"
        ),
    ),
]
Checkpoints = Annotated[
    str | None,
    typer.Option(
        "--checkpoints",
        metavar="DIR|URI",
        help="where runs are to keep their checkpoints: each node tries to write there",
    ),
]
Size = Annotated[
    float, number_option("--checkpoint-gb", min=0, max=1e6, help="the size of a checkpoint")
]
Keep = Annotated[int, typer.Option("--keep", min=1, help="how many of them a run keeps")]

_MARKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "bad": ("BAD", "bold red")}


def add_doctor_command(app: typer.Typer) -> None:
    app.command(epilog="Example: spiketrain doctor --address auto --runs /shared/runs")(doctor)


def doctor(
    address: Address = None,
    runs: Runs = RUNS,
    checkpoints: Checkpoints = None,
    checkpoint_gb: Size = 1.0,
    keep: Keep = 3,
) -> None:
    """Check this machine, or each node of the cluster at --address, and say how to mend it.

    Exit code 1 where a training would fail.
    """
    from pipeline.launch.preflight import preflight

    found = preflight(
        runs,
        address=address,
        checkpoints=checkpoints,
        checkpoint_bytes=checkpoint_gb * 1e9,
        keep=keep,
    )
    print_findings(found)
    sys.exit(any(each.state == "bad" for each in found))


def print_findings(found: Sequence[Finding], console: Console | None = None) -> None:
    """A line for each finding, and its advice on the next; the last line is the summary."""
    console = console or new_console()
    for each in found:
        mark, style = _MARKS[each.state]
        label = Text.assemble((f"{mark:4}", style), f"  {each.check:9} ")
        say(console, each.text, label=label)
        if each.advice:
            say(console, each.advice, label=" " * label.cell_len)
    bad = sum(each.state == "bad" for each in found)
    say(console, "fit to train" if not bad else f"not fit to train: {bad} of the above to mend")
