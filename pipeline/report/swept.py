"""What a page shows of a sweep over time steps: memory and time against T, and each rule's own
largest batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pipeline.recipe import BASELINE
from pipeline.report.figure import Figure, Table
from pipeline.report.figures_sweep import of_a_sweep
from pipeline.report.largest import largest

LARGEST_SAID = (
    "The largest batch that fits, and how fast forward and backward of it are, beside the faster"
    f" {BASELINE} at its own largest batch: what a rule's memory buys in speed on the same card or"
    " machine. A batch with a speed was trained, and fitted; one without is an estimate from what"
    " two batches took, with a part of the memory left free; 0 where by the estimate, or when it"
    " was tried, not even one sample fits."
)


class Swept(NamedTuple):
    """Of one sweep."""

    key: str
    """on a page"""
    recipe: str
    figures: tuple[Figure, ...]
    largest: Table | None
    """None where nobody looked for largest batches"""


def swept(sweeps: Iterable[Mapping[str, Any]]) -> Iterator[Swept]:
    """Of each sweep that has points; one that looked for largest batches at a single T has nothing
    to draw against T.
    """
    found = [(sweep, largest_table(sweep)) for sweep in sweeps if sweep["points"]]
    for index, (sweep, table) in enumerate(found, start=1):
        is_of_one = (
            table is not None and len({point["time_steps"] for point in sweep["points"]}) == 1
        )
        yield Swept(
            f"sweep{index}", str(sweep["recipe"]), () if is_of_one else of_a_sweep(sweep), table
        )


def largest_table(sweep: Mapping[str, Any]) -> Table | None:
    """One row for each rule and T; None where nobody looked for a largest batch. What was not tried
    is not measured.
    """
    rows = tuple(
        (each.rule, each.time_steps, each.batch, each.images_per_s, each.beside)
        for each in largest(sweep)
    )
    if not rows:
        return None
    limit = sweep.get("memory_bytes")
    batch = "largest batch" if limit is None else f"largest batch in {limit / 1e9:.3g} GB"
    speed_of = ("images/s of its forward and backward", f"× the faster {BASELINE}'s")
    return Table(columns=("rule", "time steps", batch, *speed_of), rows=rows)
