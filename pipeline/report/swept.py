"""What a page shows of a sweep over time steps: memory against T, and each rule's own largest batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.baseline import BASELINE
from pipeline.report.figure import Figure, Table
from pipeline.report.figures_time import memory_of_time
from pipeline.report.largest import largest

LARGEST_SAID = (
    "The largest batch that fits, and how fast forward and backward of it are, beside the faster "
    f"{BASELINE} at its own largest batch: what a rule's memory buys in speed on the same card or machine. A batch with a "
    "speed was trained, and fitted; one without is an estimate from what two batches took, with a part of the memory left free; "
    "0 where by the estimate, or when it was tried, not even one sample fits."
)


def swept(sweeps: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Figure, Table | None]]:
    """Of each sweep that has points: its key on a page, the figure, and the largest batches where it looked for them."""
    figures = ((sweep, memory_of_time(sweep)) for sweep in sweeps)
    drawn = [(sweep, figure) for sweep, figure in figures if isinstance(figure, Figure)]
    for index, (sweep, figure) in enumerate(drawn, start=1):
        yield f"sweep{index}", figure, largest_table(sweep)


def largest_table(sweep: Mapping[str, Any]) -> Table | None:
    """One row for each rule and T; None where nobody looked for a largest batch. What was not tried is not measured."""
    rows = tuple((each.rule, each.time_steps, each.batch, each.images_per_s, each.beside) for each in largest(sweep))
    if not rows:
        return None
    limit = sweep.get("memory_bytes")
    batch = "largest batch" if limit is None else f"largest batch in {limit / 1e9:.3g} GB"
    speed_of = ("images/s of its forward and backward", f"× the faster {BASELINE}'s")
    return Table(columns=("rule", "time steps", batch, *speed_of), rows=rows)
