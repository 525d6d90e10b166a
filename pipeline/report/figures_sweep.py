"""Each rule's memory and time against the number of time steps, from a sweep's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.core.units import counted, unit_of
from pipeline.measure.memory import format_hardware
from pipeline.report.figure import Figure, Table, color, drawing, plain, symbol, titled

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
