"""A sweep over time steps: one line for each rule and T."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich.console import Console

from pipeline.core.printing import new_console, number, print_table, say
from pipeline.core.units import counted
from pipeline.forecast.bench import RESERVE, Cost
from pipeline.forecast.sweep import Point, Sweep
from pipeline.measure.memory import format_hardware
from pipeline.recipe import BASELINE


def print_sweep(found: Sweep, *, as_json: bool = False, console: Console | None = None) -> None:
    """Bytes, time and largest batch against T, and each rule's growth in bytes."""
    console = console or new_console()
    if as_json:
        console.out(json.dumps(found.to_json(), indent=2, allow_nan=False), highlight=False)
        return
    own = ("rule's own",) if any(point.cost.rule_bytes for point in found.points) else ()
    titles = (
        "T",
        "saved",
        f"× {BASELINE}",
        "states beside",
        *own,
        "fwd+bwd ms",
        f"× faster {BASELINE}",
        "images/s of fwd+bwd",
    )
    base = {point.time_steps: point.cost for point in found.of(BASELINE)}
    fastest = found.time_baselines
    rows = []
    for rule in found.rules:
        for point in found.of(rule):
            T = point.time_steps
            rows.append(
                (
                    rule,
                    *_cells(
                        point,
                        base.get(T),
                        fastest.get(T),
                        tried=found.at_largest,
                        has_own=bool(own),
                    ),
                )
            )
    columns = ("rule", *map(number, (*titles, *_of_largest(found))))
    print_table(console, columns, rows, title=found.recipe, keys=2)
    for rule in found.rules:
        points = found.of(rule)
        if len(points) > 1:
            first, last = points[0].time_steps, points[-1].time_steps
            say(
                console,
                f"{rule}: {found.growth(rule):.2f} times the bytes at T = {last} as at T = {first}",
            )
    if fastest:
        say(console, _divided(found))
    for line in dict.fromkeys(_refusals(found)):
        say(console, line)
    on = format_hardware(found.hardware)
    of = "fwd+bwd: forward and backward alone, without loading, optimizer and collectives"
    say(console, f"one batch of {counted(found.samples, 'sample')}; {of}; {on}")
    if found.memory_bytes is not None:
        say(console, _told_of_largest(found, found.memory_bytes))
    if found.teacher is not None:
        say(console, found.teacher.describe())


def _refusals(found: Sweep) -> Iterator[str]:
    """Of a rule that cannot train the network, and of one whose largest batch could not be
    tried.
    """
    for rule, at_T in found.refused.items():
        for T, why in at_T.items():
            is_there = any(point.time_steps == T for point in found.of(rule))
            yield (
                f"{rule}: its largest batch at T = {T} was not trained: {why}"
                if is_there
                else f"not in the table: {why}"
            )


def _told_of_largest(found: Sweep, memory_bytes: int) -> str:
    estimate = (
        f"an estimate from what two batches took, {RESERVE:.0%} of the memory left free, not"
        " trained"
    )
    told = f"about: {estimate}"
    if found.at_largest:
        told = (
            'without "about": trained, and fitted, or 0 where not even one sample did; with it:'
            f" {estimate}"
        )
    evaluation = "an evaluation holds a batch at every time step, without a graph, and is not in it"
    return f"largest batch in {memory_bytes / 1e9:.3g} GB; {told}; of training alone: {evaluation}"


def _of_largest(found: Sweep) -> list[str]:
    """Columns."""
    if found.memory_bytes is None:
        return []
    return ["largest batch", *(["images/s of its fwd+bwd"] if found.at_largest else [])]


def _divided(found: Sweep) -> str:
    fastest: dict[str, list[str]] = {}
    for T, cost in found.time_baselines.items():
        fastest.setdefault(cost.rule, []).append(str(T))
    whose = ", ".join(f"{rule}'s at T = {', '.join(steps)}" for rule, steps in fastest.items())
    return f"×: bytes over {BASELINE}'s, fwd+bwd over {whose}"


def _largest(point: Point) -> str:
    is_estimate = point.largest_batch and point.at_largest is None
    return f"{'about ' if is_estimate else ''}{point.largest_batch:,}"


def _cells(
    point: Point, base: Cost | None, fastest: Cost | None, *, tried: bool, has_own: bool
) -> tuple[str, ...]:
    cost = point.cost
    beside = (
        "" if base is None else f"{cost.peak_saved_bytes / base.peak_saved_bytes:.2f}",
        "" if fastest is None else f"{cost.compute_s / fastest.compute_s:.2f}",
    )
    return (
        str(point.time_steps),
        f"{cost.peak_saved_bytes / 1e6:.4g} MB",
        beside[0],
        f"{cost.state_bytes / 1e6:.4g} MB",
        *((f"{cost.rule_bytes / 1e6:.4g} MB",) if has_own else ()),
        f"{cost.compute_s * 1e3:.4g}",
        beside[1],
        f"{point.images_per_compute_s:.4g}",
        *(() if point.largest_batch is None else (_largest(point),)),
        *(
            (f"{fast:.4g}" if (fast := point.images_per_compute_s_at_largest) is not None else "",)
            if tried
            else ()
        ),
    )
