"""The findings of `spiketrain doctor` in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from pipeline.doctor.findings import Finding
from pipeline.printing import new_console, say

_MARKS = {"ok": ("ok", "green"), "look": ("look", "yellow"), "bad": ("BAD", "bold red")}


def print_findings(found: Sequence[Finding], console: Console | None = None) -> None:
    """A line for each, with what to do about it on the next; the last line says how it stands."""
    console = console or new_console()
    for each in found:
        mark, style = _MARKS[each.state]
        label = Text.assemble((f"{mark:4}", style), f"  {each.check:9} ")
        say(console, each.told, label=label)
        if each.advice:
            say(console, each.advice, label=" " * label.cell_len)
    bad = sum(each.state == "bad" for each in found)
    say(console, "fit to train" if not bad else f"{bad} in the way of a training")
