"""A sweep over time steps: one line for each rule and T."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.bench import BASELINE
from pipeline.launch.drive import commit
from pipeline.measure.memory import told_hardware
from pipeline.sweep import Point, Sweep


def print_sweep(found: Sweep, *, as_json: bool = False, console: Console | None = None) -> None:
    """Bytes, time and largest batch against T, and each rule's growth in bytes."""
    console = console or Console()
    if as_json:
        console.out(json.dumps(told_sweep(found), indent=2, allow_nan=False), highlight=False)
        return
    table = Table(title=found.recipe, box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.add_column("rule")
    titles = ("T", "saved", f"× {BASELINE}", "states", "ms/batch", f"× {BASELINE}", "images/s")
    for title in (*titles, *_of_largest(found)):
        table.add_column(title, justify="right")
    base = {point.time_steps: point for point in found.of(BASELINE)}
    for rule in found.rules:
        for index, point in enumerate(found.of(rule)):
            cells = _cells(point, base.get(point.time_steps), tried=_are_tried(found))
            table.add_row(Text(rule if index == 0 else ""), *map(Text, cells))
    console.print(table)
    for rule in found.rules:
        points = found.of(rule)
        if len(points) > 1:
            first, last = points[0].time_steps, points[-1].time_steps
            console.out(f"{rule}: {found.growth(rule):.2f} times the bytes at T = {last} as at T = {first}", highlight=False)
    for at_T in found.refused.values():
        for why in dict.fromkeys(at_T.values()):
            console.out(f"not in the table: {why}", highlight=False)
    on = told_hardware(found.hardware)
    fits = "" if found.memory_bytes is None else f"; largest batch: whose bytes fit into {found.memory_bytes / 1e9:.3g} GB"
    tried = "" if found.memory_bytes is None or _are_tried(found) else ", not tried"
    console.out(f"one batch of {found.samples} samples; {on}{fits}{tried}", highlight=False)


def _of_largest(found: Sweep) -> list[str]:
    """Columns."""
    if found.memory_bytes is None:
        return []
    return ["largest batch", *(["images/s of it"] if _are_tried(found) else [])]


def _are_tried(found: Sweep) -> bool:
    return any(point.at_largest is not None for point in found.points)


def told_sweep(found: Sweep) -> dict[str, Any]:
    """What `--format json` prints, and reports read: the sweep, and which code it is of."""
    return {"commit": commit(), **asdict(found)}


def _cells(point: Point, base: Point | None, *, tried: bool) -> tuple[str, ...]:
    cost = point.cost
    beside = (
        ("", "")
        if base is None
        else (
            f"{cost.peak_saved_bytes / base.cost.peak_saved_bytes:.2f}",
            f"{cost.compute_s / base.cost.compute_s:.2f}",
        )
    )
    return (
        str(point.time_steps),
        f"{cost.peak_saved_bytes / 1e6:.4g} MB",
        beside[0],
        f"{cost.state_bytes / 1e6:.4g} MB",
        f"{cost.compute_s * 1e3:.4g}",
        beside[1],
        f"{point.images_per_s:.4g}",
        *(() if point.largest_batch is None else (f"{point.largest_batch:,}",)),
        *((f"{fast:.4g}" if (fast := point.images_per_s_at_largest) is not None else "",) if tried else ()),
    )
