"""Where each rule's time goes, and what its memory does with the number of time steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import plotly.graph_objects as go

from pipeline.measure.memory import told_hardware
from pipeline.measure.time_parts import BETWEEN, PARTS, REST
from pipeline.report.figure import Figure, Missing, Table, Theme, base_layout, color, pattern, plain, symbol
from pipeline.report.study import Group
from pipeline.units import shown, unit_of

_SMALL = 0.01  # of a bar: parts below it in every rule are drawn as one
_SO_FAR = ", batches alone"


def time_parts(group: Group) -> Figure | Missing:
    """Where each rule's time goes, in milliseconds of a batch."""
    title = "Where the time goes"
    of_rule = dict(_bars(group))
    if not of_rule:
        return Missing(title=title, why="no run has told the parts of its time")
    names = [name for name in (*PARTS, REST, *BETWEEN) if any(parts.get(name) for parts in of_rule.values())]
    totals = {rule: sum(parts.values()) for rule, parts in of_rule.items()}
    large = [name for name in names if any(of_rule[rule].get(name, 0) >= _SMALL * totals[rule] for rule in of_rule)]
    small = [name for name in names if name not in large]

    def draw(theme: Theme) -> go.Figure:
        figure = go.Figure()
        bars = [*((name, [name]) for name in large), *([(f"{len(small)} small ones", small)] if small else [])]
        for place, (label, merged) in enumerate(bars):
            hatch = {"shape": pattern(place), "size": 6, "fgcolor": theme.paper, "fillmode": "overlay"}
            figure.add_trace(
                go.Bar(
                    name=label.replace("_", " "),
                    orientation="h",
                    y=[plain(rule) for rule in of_rule],
                    x=[sum(1e3 * parts.get(name, 0.0) for name in merged) for parts in of_rule.values()],
                    marker={"color": color(theme, place + 1), "pattern": hatch, "line": {"color": theme.paper, "width": 1}},
                    hovertemplate="%{y}: %{x:.3g} ms<extra>" + label.replace("_", " ") + "</extra>",
                )
            )
        x, y = {"title": {"text": "ms of a batch"}}, {"autorange": "reversed", "showgrid": False}
        layout = base_layout(
            theme, height=height, xaxis=x, yaxis=y, barmode="stack", bargap=0.35, legend={"traceorder": "normal"}
        )
        return figure.update_layout(layout)

    height = 170 + 42 * len(of_rule)
    rows = [
        (rule, name, of_rule[rule].get(name), of_rule[rule].get(name, 0.0) / totals[rule]) for rule in of_rule for name in names
    ]
    slowest = max(totals, key=lambda rule: totals[rule])
    most = max(of_rule[slowest], key=lambda name: of_rule[slowest][name])
    share = of_rule[slowest][most] / totals[slowest]
    took = shown(totals[slowest], kind="s")
    alone = "; of a rule without one, of its batches alone" if of_rule.keys() - set(group.rules) else ""
    return Figure(
        name="time-parts",
        title=title,
        caption="Mean over finished runs of all seconds that a run was charged with, evaluation and checkpoints too and "
        f"comparisons of gradients not, by batch{alone}; rest is what no named part was entered for.",
        alt=f"{slowest} takes longest with {took} a batch, of which {most.replace('_', ' ')} is {share:.0%}.",
        table=Table(columns=("rule", "part", "seconds of a batch", "share"), rows=tuple(rows)),
        draw=draw,
        height=height,
    )


def _bars(group: Group) -> Iterator[tuple[str, dict[str, float]]]:
    """Each rule as its bar is called, and its seconds of a batch in each part, the mean over its finished runs.

    Others tell of their batches alone and are in no mean with those: they stand for a rule of which none has finished.
    """
    for rule in group.rules:
        finished = [run.parts for run in group.of(rule) if run.is_finished and run.parts]
        of_runs = finished or [run.parts for run in group.of(rule) if run.parts]
        if of_runs:
            names = dict.fromkeys(name for parts in of_runs for name in parts if name != "fidelity")
            means = {name: statistics.fmean(parts[name] for parts in of_runs if name in parts) for name in names}
            yield rule if finished else f"{rule}{_SO_FAR}", means


def memory_of_time(sweep: Mapping[str, Any]) -> Figure | Missing:
    """Saved bytes against the number of time steps, from what `spiketrain sweep --format json` prints."""
    title = f"Memory against time steps: {sweep['recipe']}"
    by_rule: dict[str, list[tuple[int, int, float]]] = {}
    for point in sweep["points"]:
        cost = point["cost"]
        one = (int(point["time_steps"]), int(cost["peak_saved_bytes"]), float(cost["forward_s"]) + float(cost["backward_s"]))
        by_rule.setdefault(str(cost["rule"]), []).append(one)
    if not by_rule:
        return Missing(title=title, why="the sweep has no points")
    scale, unit = unit_of("B", [saved for points in by_rule.values() for _, saved, _ in points])

    def draw(theme: Theme) -> go.Figure:
        figure = go.Figure()
        for place, (rule, points) in enumerate(by_rule.items()):
            figure.add_trace(
                go.Scatter(
                    name=plain(rule),
                    mode="lines+markers",
                    x=[steps for steps, _, _ in points],
                    y=[saved / scale for _, saved, _ in points],
                    line={"color": color(theme, place), "width": 2},
                    marker={"symbol": symbol(place), "size": 9},
                    hovertemplate=f"T = %{{x}}: %{{y:.4g}} {unit}<extra>{plain(rule)}</extra>",
                )
            )
        x = {
            "title": {"text": "time steps T"},
            "tickvals": sorted({steps for points in by_rule.values() for steps, _, _ in points}),
        }
        y = {"title": {"text": f"peak saved bytes, {unit}"}, "rangemode": "tozero"}
        return figure.update_layout(**base_layout(theme, height=380, xaxis=x, yaxis=y))

    rows = [(rule, *point) for rule, points in by_rule.items() for point in points]
    said = [
        f"{rule} keeps {points[-1][1] / points[0][1]:.3g} times the bytes at T = {points[-1][0]} as at T = {points[0][0]}"
        for rule, points in by_rule.items()
        if points[0][1]
    ]
    return Figure(
        name="memory-against-time-steps",
        title=title,
        caption=f"One batch of {sweep['samples']} samples, before any training; commit {sweep['commit']}, "
        f"{told_hardware(sweep['hardware'])}.",
        alt=f"{'; '.join(said)}.",
        table=Table(columns=("rule", "time steps", "peak saved bytes", "seconds of forward and backward"), rows=tuple(rows)),
        draw=draw,
        height=380,
    )
