"""The time of each rule by the parts of a batch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from pipeline.core.units import shown
from pipeline.measure.constants import BETWEEN, PARTS, REST
from pipeline.report.figure import (
    PAPER,
    Figure,
    Missing,
    Table,
    color,
    drawing,
    pattern,
    plain,
    titled,
)
from pipeline.report.study import Group

_SMALL = 0.01  # of a bar: parts below it in every rule are drawn as one
_SO_FAR = ", batches alone"


def time_parts(group: Group) -> Figure | Missing:
    """Where each rule's time goes, in milliseconds of a batch."""
    title = "Where the time goes"
    of_rule = dict(_bars(group))
    if not of_rule:
        return Missing(title=title, why="no run has measured the parts of its time")
    names = [
        name
        for name in (*PARTS, REST, *BETWEEN)
        if any(parts.get(name) for parts in of_rule.values())
    ]
    totals = {rule: sum(parts.values()) for rule, parts in of_rule.items()}
    large = [
        name
        for name in names
        if any(of_rule[rule].get(name, 0) >= _SMALL * totals[rule] for rule in of_rule)
    ]
    small = [name for name in names if name not in large]

    bars = [
        *((name, [name]) for name in large),
        *([(f"{len(small)} small ones", small)] if small else []),
    ]
    data = []
    for place, (label, merged) in enumerate(bars):
        hatch = {"shape": pattern(place), "size": 6, "fgcolor": PAPER, "fillmode": "overlay"}
        outline = {"color": PAPER, "width": 1}
        data.append(
            {
                "type": "bar",
                "name": label.replace("_", " "),
                "orientation": "h",
                "y": [plain(rule) for rule in of_rule],
                "x": [
                    sum(1e3 * parts.get(name, 0.0) for name in merged) for parts in of_rule.values()
                ],
                "marker": {"color": color(place + 1), "pattern": hatch, "line": outline},
                "hovertemplate": "%{y}: %{x:.3g} ms<extra>" + label.replace("_", " ") + "</extra>",
            }
        )
    layout: dict[str, Any] = {
        "barmode": "stack",
        "bargap": 0.35,
        "legend": {"traceorder": "normal"},
    }
    layout |= {
        "xaxis": titled("ms of a batch"),
        "yaxis": {"autorange": "reversed", "showgrid": False},
    }
    height = 170 + 42 * len(of_rule)
    rows = [
        (rule, name, of_rule[rule].get(name), of_rule[rule].get(name, 0.0) / totals[rule])
        for rule in of_rule
        for name in names
    ]
    slowest = max(totals, key=lambda rule: totals[rule])
    most = max(of_rule[slowest], key=lambda name: of_rule[slowest][name])
    share = of_rule[slowest][most] / totals[slowest]
    took = shown(totals[slowest], kind="s")
    alone = (
        "; of a rule without one, of its batches alone" if of_rule.keys() - set(group.rules) else ""
    )
    return Figure(
        name="time-parts",
        title=title,
        caption=(
            "Mean over finished runs of all their time, with evaluations and checkpoints, without"
            f" start-up and comparisons of gradients, by batch{alone}; rest is the time outside"
            " every named part."
        ),
        alt=(
            f"{slowest} takes longest with {took} a batch, of which {most.replace('_', ' ')} is"
            f" {share:.0%}."
        ),
        table=Table(columns=("rule", "part", "seconds of a batch", "share"), rows=tuple(rows)),
        drawing=drawing(data, height=height, **layout),
    )


def _bars(group: Group) -> Iterator[tuple[str, dict[str, float]]]:
    """The label of each rule's bar, and its seconds of a batch in each part.

    These are the mean over its finished runs. Other runs have measured their batches alone, and
    stand for a rule of which none has finished.
    """
    for rule in group.rules:
        finished = [run.parts for run in group.of(rule) if run.is_finished and run.parts]
        of_runs = finished or [run.parts for run in group.of(rule) if run.parts]
        if of_runs:
            names = dict.fromkeys(name for parts in of_runs for name in parts if name != "fidelity")
            means = {
                name: statistics.fmean(parts[name] for parts in of_runs if name in parts)
                for name in names
            }
            yield rule if finished else f"{rule}{_SO_FAR}", means
