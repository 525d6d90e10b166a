"""What each rule's memory and time do with the number of time steps, from what `spiketrain sweep
--format json` prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from pipeline.core.units import counted, unit_of
from pipeline.measure.memory import format_hardware
from pipeline.report.figure import Figure, Table, Theme, base_layout, color, plain, symbol

_HEIGHT = 380
_DOTTED = ", with states"


class _Point(NamedTuple):
    """Of one rule at one T."""

    time_steps: int
    saved: float
    kept: float | None
    """with states beside them, where the sweep tells of those"""
    seconds: float


def of_a_sweep(sweep: Mapping[str, Any]) -> tuple[Figure, Figure]:
    """Memory and time against T, of a sweep that has points."""
    by_rule: dict[str, list[_Point]] = {}
    for point in sweep["points"]:
        by_rule.setdefault(str(point["cost"]["rule"]), []).append(
            _point(point["time_steps"], point["cost"])
        )
    return _memory(sweep, by_rule), _time(sweep, by_rule)


def _point(time_steps: int, cost: Mapping[str, Any]) -> _Point:
    saved, states = float(cost["peak_saved_bytes"]), cost.get("state_bytes")
    kept = None if states is None else saved + float(states)
    return _Point(
        int(time_steps), saved, kept, float(cost["forward_s"]) + float(cost["backward_s"])
    )


def _memory(sweep: Mapping[str, Any], by_rule: Mapping[str, Sequence[_Point]]) -> Figure:
    every = [point for points in by_rule.values() for point in points]
    scale, unit = unit_of("B", [point.kept or point.saved for point in every])
    has_states = any(point.kept is not None for point in every)

    def draw(theme: Theme) -> go.Figure:
        figure = go.Figure()
        for place, (rule, points) in enumerate(by_rule.items()):
            figure.add_trace(
                _line(theme, place, rule, points, [point.saved / scale for point in points], unit)
            )
            kept = [None if point.kept is None else point.kept / scale for point in points]
            if has_states:
                figure.add_trace(_line(theme, place, rule, points, kept, unit, is_dotted=True))
        return figure.update_layout(**_layout(theme, by_rule, f"peak saved bytes, {unit}"))

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
        draw=draw,
        height=_HEIGHT,
    )


def _time(sweep: Mapping[str, Any], by_rule: Mapping[str, Sequence[_Point]]) -> Figure:
    def draw(theme: Theme) -> go.Figure:
        figure = go.Figure()
        for place, (rule, points) in enumerate(by_rule.items()):
            figure.add_trace(
                _line(theme, place, rule, points, [1e3 * point.seconds for point in points], "ms")
            )
        return figure.update_layout(**_layout(theme, by_rule, "forward and backward, ms"))

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
    told = f"At T = {last} {slowest} takes {1e3 * there[slowest]:.4g} ms"
    return Figure(
        name="time-against-time-steps",
        title=f"Time against time steps: {sweep['recipe']}",
        caption=f"{_caption(sweep)} Loading, the optimizer and collectives are not in it.",
        alt=(
            f"{told}, the longest, and {fastest} {1e3 * there[fastest]:.4g} ms."
            if len(there) > 1
            else f"{told}."
        ),
        table=Table(
            columns=("rule", "time steps", "seconds of forward and backward"), rows=tuple(rows)
        ),
        draw=draw,
        height=_HEIGHT,
    )


def _line(
    theme: Theme,
    place: int,
    rule: str,
    points: Sequence[_Point],
    y: Sequence[float | None],
    unit: str,
    *,
    is_dotted: bool = False,
) -> go.Scatter:
    """A dotted one goes with the rule's own, which the legend has."""
    name = plain(rule) + (_DOTTED if is_dotted else "")
    return go.Scatter(
        name=name,
        legendgroup=plain(rule),
        showlegend=not is_dotted,
        mode="lines+markers",
        x=[point.time_steps for point in points],
        y=list(y),
        line={
            "color": color(theme, place),
            "width": 1 if is_dotted else 2,
            "dash": "dot" if is_dotted else "solid",
        },
        marker={"symbol": symbol(place), "size": 5 if is_dotted else 9},
        hovertemplate=f"T = %{{x}}: %{{y:.4g}} {unit}<extra>{name}</extra>",
    )


def _layout(theme: Theme, by_rule: Mapping[str, Sequence[_Point]], title: str) -> dict[str, Any]:
    T = sorted({point.time_steps for points in by_rule.values() for point in points})
    x = {"title": {"text": "time steps T"}, "tickvals": T}
    return base_layout(
        theme, height=_HEIGHT, xaxis=x, yaxis={"title": {"text": title}, "rangemode": "tozero"}
    )


def _caption(sweep: Mapping[str, Any]) -> str:
    on = format_hardware(sweep["hardware"])
    return (
        f"One batch of {counted(sweep['samples'], 'sample')}, before any training; commit"
        f" {sweep['commit']}, {on}."
    )
