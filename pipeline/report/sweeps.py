"""Sweeps over time steps, as `spiketrain sweep --format json` prints them: what pages show of
one.

Each rule's memory and time against the number of time steps, from a sweep's JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.core.units import counted, unit_of
from pipeline.measure.memory import format_hardware
from pipeline.recipe import BASELINE, is_baseline
from pipeline.report.figure import Figure, Table, color, drawing, plain, symbol, titled
from pipeline.report.runs import ReportError

_NUMBERS = ("peak_saved_bytes", "forward_s", "backward_s")
LARGEST_SAID = (
    "The largest batch that fits, and how fast forward and backward of it are, beside the faster "
    f"{BASELINE} at its own largest batch: the speed that a rule's memory buys on the same card "
    "or machine. A batch with a speed was trained, and fitted; one without is an estimate from "
    "two batches, with a part of the memory left free. 0 where not even one sample fits, by the "
    "estimate or when it was tried."
)


class Largest(NamedTuple):
    """A rule's own largest batch at one T. One that was not tried has no speed."""

    rule: str
    time_steps: int
    batch: int
    images_per_s: float | None  # of forward and backward
    base_batch: int | None  # of the faster BPTT at that T; None where no BPTT was tried
    ratio: float | None  # images_per_s over that BPTT's


def largest(sweep: Mapping[str, Any]) -> list[Largest]:
    """Each rule's own largest batch, in the order of the sweep; none where none was looked for."""
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
        ratio = None if speed is None or base_speed is None else speed / base_speed
        found.append(
            Largest(str(point["cost"]["rule"]), T, point["largest_batch"], speed, base_batch, ratio)
        )
    return found


def largest_batches(sweep: Mapping[str, Any]) -> Table | None:
    """One row for each rule and T; None where no largest batch was looked for."""
    rows = [
        (each.rule, each.time_steps, each.batch, each.images_per_s, each.ratio)
        for each in largest(sweep)
    ]
    limit = sweep.get("memory_bytes")
    batch = "largest batch" if limit is None else f"largest batch in {limit / 1e9:.3g} GB"
    speeds = ("images/s of its forward and backward", f"× the faster {BASELINE}'s")
    return Table(columns=("rule", "time steps", batch, *speeds), rows=tuple(rows)) if rows else None


class Swept(NamedTuple):
    """What a page shows of one sweep."""

    key: str  # on the page
    recipe: str
    figures: tuple[Figure, ...]
    largest: Table | None  # None where no largest batch was looked for


def swept(sweeps: Iterable[Mapping[str, Any]]) -> Iterator[Swept]:
    """Of each sweep that has points; one of a single T with largest batches has no figures."""
    found = [(sweep, largest_batches(sweep)) for sweep in sweeps if sweep["points"]]
    for index, (sweep, table) in enumerate(found, start=1):
        is_of_one = table is not None and len({each["time_steps"] for each in sweep["points"]}) == 1
        figures = () if is_of_one else of_a_sweep(sweep)
        yield Swept(f"sweep{index}", str(sweep["recipe"]), figures, table)


def sweep_of(value: Any, where: str) -> Mapping[str, Any]:
    """The fields of a sweep that pages show.

    Raises:
        ReportError: the value, which came from `where`, is no sweep.
    """
    try:
        kept: dict[str, Any] = {name: str(value[name]) for name in ("recipe", "commit")}
        kept |= {"samples": int(value["samples"]), "hardware": dict(value["hardware"])}
        format_hardware(kept["hardware"])  # as pages do
        if value.get("memory_bytes") is not None:
            kept["memory_bytes"] = int(value["memory_bytes"])
        return {**kept, "points": [_point(point) for point in value["points"]]}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ReportError(
            f"report: {where} must hold what sweep --format json prints; {error!r}"
        ) from error


def _point(value: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"time_steps": int(value["time_steps"]), "cost": _cost(value["cost"])}
    if value.get("largest_batch") is not None:
        kept["largest_batch"] = int(value["largest_batch"])
    if value.get("at_largest") is not None:
        kept["at_largest"] = cost = _cost(value["at_largest"])
        if not float(cost["forward_s"]) + float(cost["backward_s"]):
            raise ValueError("at_largest must have taken seconds; got 0")
    return kept


def _cost(value: Any) -> dict[str, Any]:
    cost = dict(value)
    cost["rule"]
    has_states = cost.get("state_bytes") is not None
    for name in (*_NUMBERS, *(("state_bytes",) if has_states else ())):
        if not 0 <= float(cost[name]) < math.inf:  # null in a report.json where it is not finite
            raise ValueError(f"{name} must be a number from 0; got {cost[name]!r}")
    return cost


def _images_per_s(point: Mapping[str, Any]) -> float | None:
    cost = point.get("at_largest")
    return cost and point["largest_batch"] / (float(cost["forward_s"]) + float(cost["backward_s"]))


_HEIGHT = 380
_DOTTED = ", with states"


class _Point(NamedTuple):
    """One rule at one T."""

    time_steps: int
    saved: float
    kept: float | None  # with states, where the sweep has them
    seconds: float


def of_a_sweep(sweep: Mapping[str, Any]) -> tuple[Figure, Figure]:
    """Memory and time against T, of a sweep that has points."""
    by_rule: dict[str, list[_Point]] = {}
    for point in sweep["points"]:
        by_rule.setdefault(str(point["cost"]["rule"]), []).append(
            _plotted(point["time_steps"], point["cost"])
        )
    return _memory(sweep, by_rule), _time(sweep, by_rule)


def _plotted(time_steps: int, cost: Mapping[str, Any]) -> _Point:
    saved, states = float(cost["peak_saved_bytes"]), cost.get("state_bytes")
    kept = None if states is None else saved + float(states)
    return _Point(
        int(time_steps), saved, kept, float(cost["forward_s"]) + float(cost["backward_s"])
    )


def _memory(sweep: Mapping[str, Any], by_rule: Mapping[str, Sequence[_Point]]) -> Figure:
    every = [point for points in by_rule.values() for point in points]
    scale, unit = unit_of("B", [point.kept or point.saved for point in every])
    has_states = any(point.kept is not None for point in every)

    data = []
    for place, (rule, points) in enumerate(by_rule.items()):
        data.append(_line(place, rule, points, [point.saved / scale for point in points], unit))
        kept = [None if point.kept is None else point.kept / scale for point in points]
        if has_states:
            data.append(_line(place, rule, points, kept, unit, is_dotted=True))
    rows = [
        (rule, point.time_steps, point.saved, point.kept)
        for rule, points in by_rule.items()
        for point in points
    ]
    said = [
        f"{rule} keeps {points[-1].saved / points[0].saved:.3g} times the bytes at T ="
        f" {points[-1].time_steps} as at T = {points[0].time_steps}"
        for rule, points in by_rule.items()
        if points[0].saved
    ]
    return Figure(
        name="memory-against-time-steps",
        title=f"Memory against time steps: {sweep['recipe']}",
        caption=_caption(sweep)
        + (" Dotted: with membranes, traces and what slices share." if has_states else ""),
        alt=f"{'; '.join(said)}.",
        table=Table(
            columns=("rule", "time steps", "peak saved bytes", "and states"), rows=tuple(rows)
        ),
        drawing=_drawing(data, by_rule, f"peak saved bytes, {unit}"),
    )


def _time(sweep: Mapping[str, Any], by_rule: Mapping[str, Sequence[_Point]]) -> Figure:
    data = [
        _line(place, rule, points, [1e3 * point.seconds for point in points], "ms")
        for place, (rule, points) in enumerate(by_rule.items())
    ]
    rows = [
        (rule, point.time_steps, point.seconds)
        for rule, points in by_rule.items()
        for point in points
    ]
    last = max(point.time_steps for points in by_rule.values() for point in points)
    there = {
        rule: points[-1].seconds
        for rule, points in by_rule.items()
        if points[-1].time_steps == last
    }
    order = sorted(there, key=lambda rule: -there[rule])
    slowest, fastest = order[0], order[-1]
    at_last = f"At T = {last} {slowest} takes {1e3 * there[slowest]:.4g} ms"
    return Figure(
        name="time-against-time-steps",
        title=f"Time against time steps: {sweep['recipe']}",
        caption=f"{_caption(sweep)} Loading, the optimizer and collectives are not in it.",
        alt=(
            f"{at_last}, the longest, and {fastest} {1e3 * there[fastest]:.4g} ms."
            if len(there) > 1
            else f"{at_last}."
        ),
        table=Table(
            columns=("rule", "time steps", "seconds of forward and backward"), rows=tuple(rows)
        ),
        drawing=_drawing(data, by_rule, "forward and backward, ms"),
    )


def _line(
    place: int,
    rule: str,
    points: Sequence[_Point],
    y: Sequence[float | None],
    unit: str,
    *,
    is_dotted: bool = False,
) -> dict[str, Any]:
    """A dotted line is in the legend with the rule's own."""
    name = plain(rule) + (_DOTTED if is_dotted else "")
    width, dash = (1, "dot") if is_dotted else (2, "solid")
    return {
        "type": "scatter",
        "name": name,
        "legendgroup": plain(rule),
        "showlegend": not is_dotted,
        "mode": "lines+markers",
        "x": [point.time_steps for point in points],
        "y": list(y),
        "line": {"color": color(place), "width": width, "dash": dash},
        "marker": {"symbol": symbol(place), "size": 5 if is_dotted else 9},
        "hovertemplate": f"T = %{{x}}: %{{y:.4g}} {unit}<extra>{name}</extra>",
    }


def _drawing(
    data: Sequence[dict[str, Any]], by_rule: Mapping[str, Sequence[_Point]], title: str
) -> dict[str, Any]:
    steps = sorted({point.time_steps for points in by_rule.values() for point in points})
    x, y = titled("time steps T", tickvals=steps), titled(title, rangemode="tozero")
    return drawing(data, height=_HEIGHT, xaxis=x, yaxis=y)


def _caption(sweep: Mapping[str, Any]) -> str:
    on = format_hardware(sweep["hardware"])
    return (
        f"One batch of {counted(sweep['samples'], 'sample')}, before any training; commit"
        f" {sweep['commit']}, {on}."
    )
