"""Each rule's own largest batch of a sweep, and its speed there, beside the faster BPTT's at its
own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.recipe import is_baseline


class Largest(NamedTuple):
    """Of one rule at one T. What was not tried has no speed."""

    rule: str
    time_steps: int
    batch: int
    images_per_s: float | None
    """of forward and backward"""
    base_batch: int | None
    """of the faster BPTT at that T; None where no BPTT was tried"""
    beside: float | None
    """images_per_s over that BPTT's"""


def largest(sweep: Mapping[str, Any]) -> list[Largest]:
    """In the order of the sweep; none where nobody looked for a largest batch."""
    points = [point for point in sweep["points"] if "largest_batch" in point]
    fastest: dict[int, tuple[float, int]] = {}
    for point in points:
        T, speed = point["time_steps"], _images_per_s(point)
        if speed is not None and is_baseline(point["cost"]["rule"]):
            fastest[T] = max((speed, point["largest_batch"]), fastest.get(T, (0.0, 0)))
    found: list[Largest] = []
    for point in points:
        T, speed = point["time_steps"], _images_per_s(point)
        base_speed, base_batch = fastest.get(T, (None, None))
        beside = None if speed is None or base_speed is None else speed / base_speed
        found.append(
            Largest(
                str(point["cost"]["rule"]), T, point["largest_batch"], speed, base_batch, beside
            )
        )
    return found


def _images_per_s(point: Mapping[str, Any]) -> float | None:
    cost = point.get("at_largest")
    return (
        None
        if cost is None
        else point["largest_batch"] / (float(cost["forward_s"]) + float(cost["backward_s"]))
    )
