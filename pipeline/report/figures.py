"""The savings of each rule of a group beside the baseline, and their cost in accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.units import unit_of
from pipeline.report.figure import (
    INK,
    MUTED,
    Figure,
    Missing,
    Table,
    color,
    drawing,
    plain,
    symbol,
    titled,
)
from pipeline.report.results import ENERGY, ENERGY_MEASURED, compared, metric
from pipeline.report.study import Group, Spread
from pipeline.report.tables import MEASURED_SAID, prices

_UNITS = {"B": "bytes", "s": "seconds", "J": "joules"}


def ratios(group: Group) -> Figure | Missing:
    """Each rule's costs over the baseline's."""
    title = f"Cost of each rule, as a multiple of {group.against}'s"
    if not group.has_baseline:
        return Missing(title=title, why=f"no baseline: {group.undivided}, so nothing is divided")
    rules = [rule for rule in group.rules if rule != group.against]
    costs = {each.name: each.title for each in compared() if each.better == "less"}
    pairs = [(rule, name) for rule in rules for name in costs]
    found = {pair: ratio for pair in pairs if (ratio := group.ratios(*pair))}
    if not found:
        return Missing(title=title, why=f"no rule has a seed in common with {group.against}")
    rows = [
        (rule, costs[name], group.base_of(name), ratio.mean, ratio.deviation, ratio.runs)
        for (rule, name), ratio in found.items()
    ]
    names = [name for name in costs if any((rule, name) in found for rule in rules)]

    data = []
    for index, rule in enumerate(rules):
        here = [
            (place, found[rule, name]) for place, name in enumerate(names) if (rule, name) in found
        ]
        data.append(
            {
                "type": "scatter",
                "name": plain(rule),
                "mode": "markers+text",
                "x": [ratio.mean for _, ratio in here],
                "y": [place + _offset(index, len(rules)) for place, _ in here],
                "error_x": _errors([ratio for _, ratio in here], index + 1),
                "text": [f"{ratio.mean:.2f}" for _, ratio in here],
                "textposition": "top center",
                "textfont": {"size": 12, "color": color(index + 1)},
                "marker": {"color": color(index + 1), "symbol": symbol(index + 1), "size": 10},
                "hovertemplate": "%{x:.3f}<extra>" + plain(rule) + "</extra>",
            }
        )
    most = max(1.0, *(ratio.mean + (ratio.deviation or 0) for ratio in found.values()))
    dotted = {"color": INK, "width": 1, "dash": "dot"}
    line = {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "y domain", "line": dotted}
    ticks = {"tickvals": list(range(len(names))), "ticktext": [costs[name] for name in names]}
    y = {**ticks, "range": [len(names) - 0.5, -0.75], "showgrid": False, "zeroline": False}
    x = titled(f"multiple of {plain(group.against)}", range=[0, 1.3 * most])
    height = 110 + len(names) * max(52, 30 * len(rules))
    least = min(
        (item for item in found.items() if item[0][1] == "peak_saved_bytes"),
        key=lambda item: item[1].mean,
        default=None,
    )
    faster = group.fastest_baseline
    times = (
        ""
        if faster == group.against
        else f" Times are multiples of {faster}'s, the faster {group.against}."
    )
    said = (
        ""
        if least is None
        else f": {least[0][0]} keeps {least[1].mean:.2f} of its saved bytes, the least"
    )
    return Figure(
        name="ratios",
        title=title,
        caption=(
            "Left of the dotted line is less than the baseline; mean and standard deviation over"
            " the seeds that both ran."
        )
        + times,
        alt=(
            f"{len(rules)} rules beside {group.against} in"
            f" {', '.join(costs[name] for name in names)}{said}."
        ),
        table=Table(
            columns=(
                "rule",
                "quantity",
                "divided by",
                "ratio",
                "standard deviation",
                "paired seeds",
            ),
            rows=tuple(rows),
        ),
        drawing=drawing(data, height=height, xaxis=x, yaxis=y, shapes=[line]),
    )


def trade_off(group: Group, name: str) -> Figure | Missing:
    """Accuracy against a cost, with those rules marked that no other beats in both."""
    cost_of = metric(name)
    what, how = cost_of.title, cost_of.about or "see the table of costs"
    title = f"Accuracy against {what}"
    points = {
        rule: (cost, top1)
        for rule in group.rules
        if (cost := group.spread(rule, name)) is not None
        and (top1 := group.spread(rule, "top1")) is not None
    }
    if not points:
        return Missing(title=title, why="not measured in any finished run")
    front = pareto({rule: (cost.mean, top1.mean) for rule, (cost, top1) in points.items()})
    scale, unit = unit_of(cost_of.unit, [cost.mean for cost, _ in points.values()])

    data = [_front_line(points, front, scale)]
    for rule, spreads in points.items():
        place = group.rules.index(rule)
        shape = symbol(place) if rule in front else f"{symbol(place)}-open"
        data.append(_marker(rule, *spreads, place=place, shape=shape, scale=scale, unit=unit))
    x = titled(f"{what}, {unit}", rangemode="tozero")
    rows = [
        (
            rule,
            cost.mean,
            cost.deviation,
            top1.mean,
            top1.deviation,
            top1.runs,
            "yes" if rule in front else "no",
        )
        for rule, (cost, top1) in points.items()
    ]
    columns = (
        "rule",
        f"{what}, {_UNITS.get(cost_of.unit, cost_of.unit)}",
        "its deviation",
        "top-1",
        "its deviation",
        "runs",
        "on the Pareto front",
    )
    if name == ENERGY:
        columns = (*columns, "measured on cards, joules", "MACs", "ACs")
        rows = [(*row, *_beside(group, str(row[0]))) for row in rows]
        how = (
            f"{how}. Prices of an operation: {prices(group.finished)}. {_counted_on(group)}."
            f" {_measured_on(group)}"
        )
    return Figure(
        name=f"accuracy-against-{what.replace(' ', '-')}",
        title=title,
        caption=(
            f"{what.capitalize()}: {how}. Filled markers are on the Pareto front: no other rule is"
            " at least as good in both."
        )
        + _lost(group),
        alt=(
            f"On the Pareto front of accuracy and {what}, of {len(points)} rules:"
            f" {', '.join(front)}."
        ),
        table=Table(columns=columns, rows=tuple(rows)),
        drawing=drawing(data, height=380, xaxis=x, yaxis=titled("top-1, %")),
    )


def _beside(group: Group, rule: str) -> list[float | None]:
    """Of an inference: joules measured by cards, multiply-accumulates, accumulates."""
    found = [
        group.spread(rule, name) for name in (ENERGY_MEASURED, "inference.macs", "inference.acs")
    ]
    return [None if each is None else each.mean for each in found]


def _measured_on(group: Group) -> str:
    """The meaning of the measured joules, or why there are none."""
    if any(run.value(ENERGY_MEASURED) is not None for run in group.finished):
        return f"Joules measured on cards are {MEASURED_SAID}"
    has_gpu = any(run.hardware.get("gpu", "none") != "none" for run in group.finished)
    return (
        "Joules are not measured: no card reports them"
        if has_gpu
        else "Joules are not measured on a CPU"
    )


def _counted_on(group: Group) -> str:
    """The samples that the energy is of, and how the counts differ from published ones."""
    counted = [run for run in group.finished if run.value(ENERGY) is not None]
    sizes = sorted({int(run.value("inference.samples") or 0) for run in counted})
    first = "the first batch of the first worker's share"
    places = ((run.summary or {})["inference"].get("counted_on", first) for run in counted)
    on = f"{' and '.join(map(str, sizes))} samples, {' and '.join(dict.fromkeys(places))}"
    return (
        f"Counted on {on}; for a still image, the layers before the first neuron count once, as"
        " they are computed once, where published counts have them at each time step; means of"
        " spikes, behind a pool, are no spikes and are multiplied, which counts of synaptic"
        " operations leave out"
    )


def _lost(group: Group) -> str:
    """` Diverged, and in no mean: SLTT-1 (seed 1, 2).`; empty where nothing did."""
    lost = {
        rule: ", ".join(map(str, sorted(seeds)))
        for rule in group.rules
        if (seeds := group.diverged(rule))
    }
    text = ", ".join(f"{rule} (seed {seeds})" for rule, seeds in lost.items())
    return f" Diverged, and in no mean: {text}." if text else ""


def _front_line(
    points: Mapping[str, tuple[Spread, Spread]], front: Sequence[str], scale: float
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": "Pareto front",
        "mode": "lines",
        "x": [points[rule][0].mean / scale for rule in front],
        "y": [100 * points[rule][1].mean for rule in front],
        "line": {"color": MUTED, "width": 1.5, "dash": "dash", "shape": "hv"},
        "hoverinfo": "skip",
    }


def _marker(
    rule: str, cost: Spread, top1: Spread, *, place: int, shape: str, scale: float, unit: str
) -> dict[str, Any]:
    outline = {"width": 2, "color": color(place)}
    return {
        "type": "scatter",
        "name": plain(rule),
        "mode": "markers",
        "x": [cost.mean / scale],
        "y": [100 * top1.mean],
        "error_x": _errors([cost], place, scale=1 / scale),
        "error_y": _errors([top1], place, scale=100),
        "marker": {"color": color(place), "symbol": shape, "size": 12, "line": outline},
        "hovertemplate": f"%{{x:.4g}} {unit}, %{{y:.2f}} %<extra>{plain(rule)}</extra>",
    }


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Those that no other beats: at no more cost and no less gain, and better in one; cheapest
    first.
    """
    kept = [
        name
        for name, (cost, gain) in points.items()
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points.values())
    ]
    return sorted(kept, key=lambda name: points[name])


def _offset(index: int, count: int) -> float:
    return 0.0 if count == 1 else 0.6 * (index / (count - 1) - 0.5)


def _errors(spreads: Sequence[Spread], place: int, *, scale: float = 1.0) -> dict[str, Any]:
    lengths = [scale * (each.deviation or 0.0) for each in spreads]
    return {
        "array": lengths,
        "visible": any(lengths),
        "color": color(place),
        "thickness": 1.5,
        "width": 4,
    }
