"""The findings of `spiketrain doctor` in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from pipeline.doctor.findings import Finding

_MARKS = {"ok": ("ok", "green"), "look": ("look", "yellow"), "bad": ("BAD", "bold red")}


def print_findings(found: Sequence[Finding]) -> None:
    """A line for each, with what to do about it on the next; the last line says how it stands."""
    console = Console(highlight=False)
    for each in found:
        mark, style = _MARKS[each.state]
        console.print(f"[{style}]{mark:4}[/]  {each.check:9} ", end="")
        console.print(each.told, markup=False, soft_wrap=True)
        if each.advice:
            console.print(f"{'':16} {each.advice}", markup=False, soft_wrap=True)
    bad = sum(each.state == "bad" for each in found)
    console.print("fit to train" if not bad else f"{bad} in the way of a training")
