"""What each rule of a group saves beside the baseline, and what that costs in accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from pipeline.core.units import unit_of
from pipeline.measure.constants import MEMORY_EVERY
from pipeline.report.figure import Figure, Missing, Table, Theme, base_layout, color, plain, symbol
from pipeline.report.places import NOT_SAID
from pipeline.report.spread import Spread
from pipeline.report.study import COMPUTE, ENERGY, ENERGY_MEASURED, KEPT, Group, StudyRun

MEASURED_SAID = (
    "what the cards used for a sample while the set was evaluated, by their own counters (NVML):"
    " idle power and waits for data are in it"
)
QUANTITIES = {
    "peak_saved_bytes": ("saved bytes", "B"),
    KEPT: ("saved bytes and states", "B"),
    COMPUTE: ("compute time", "s"),
    "wall_s": ("wall clock", "s"),
    ENERGY: ("inference energy", "J"),
}
"""of which less is better: what they are called, and their kind of unit"""
_AXES = {
    "wall_s": (
        "wall clock",
        (
            "what a run took from the end of its first batch to its last line, restarts included;"
            " their start-up is left out, and so are comparisons of its gradient with BPTT's"
        ),
    ),
    "peak_saved_bytes": (
        "peak saved bytes",
        (
            "what autograd keeps for backward at one moment, parameters left out, counted on the"
            f" second batch of each start of a run and every {MEMORY_EVERY}th after it, or the next"
            " where that one is skipped"
        ),
    ),
    ENERGY: (
        "energy of an inference",
        (
            "an estimate from measured operations, of arithmetic alone, for one sample; never a"
            " measurement"
        ),
    ),
}


def ratios(group: Group) -> Figure | Missing:
    """Each rule's costs over the baseline's."""
    title = f"Cost of each rule, as a multiple of {group.against}'s"
    if not group.has_baseline:
        return Missing(title=title, why=f"no baseline: {group.undivided}, so nothing is divided")
    rules = [rule for rule in group.rules if rule != group.against]
    found = {
        (rule, name): ratio
        for rule in rules
        for name in QUANTITIES
        if (ratio := group.ratios(rule, name))
    }
    if not found:
        return Missing(title=title, why=f"no rule has a seed in common with {group.against}")
    rows = [
        (rule, QUANTITIES[name][0], group.base_of(name), ratio.mean, ratio.deviation, ratio.runs)
        for (rule, name), ratio in found.items()
    ]
    names = [name for name in QUANTITIES if any((rule, name) in found for rule in rules)]

    def draw(theme: Theme) -> go.Figure:
        figure = go.Figure()
        for index, rule in enumerate(rules):
            here = [
                (place, found[rule, name])
                for place, name in enumerate(names)
                if (rule, name) in found
            ]
            figure.add_trace(
                go.Scatter(
                    name=plain(rule),
                    mode="markers+text",
                    x=[ratio.mean for _, ratio in here],
                    y=[place + _offset(index, len(rules)) for place, _ in here],
                    error_x=_errors([ratio for _, ratio in here], theme, index + 1),
                    text=[f"{ratio.mean:.2f}" for _, ratio in here],
                    textposition="top center",
                    textfont={"size": 12, "color": color(theme, index + 1)},
                    marker={
                        "color": color(theme, index + 1),
                        "symbol": symbol(index + 1),
                        "size": 10,
                    },
                    hovertemplate="%{x:.3f}<extra>" + plain(rule) + "</extra>",
                )
            )
        most = max(1.0, *(ratio.mean + (ratio.deviation or 0) for ratio in found.values()))
        figure.add_vline(x=1, line={"color": theme.ink, "width": 1, "dash": "dot"})
        y = {
            "tickvals": list(range(len(names))),
            "ticktext": [QUANTITIES[name][0] for name in names],
            "showgrid": False,
        }
        y |= {"range": [len(names) - 0.5, -0.75], "zeroline": False}
        x = {"range": [0, 1.3 * most], "title": {"text": f"multiple of {plain(group.against)}"}}
        return figure.update_layout(**base_layout(theme, height=height, xaxis=x, yaxis=y))

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
            f" {', '.join(QUANTITIES[name][0] for name in names)}{said}."
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
        draw=draw,
        height=height,
    )


def trade_off(group: Group, name: str) -> Figure | Missing:
    """Accuracy against a cost, with those rules marked that no other beats in both."""
    what, how = _AXES[name]
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
    kind = QUANTITIES[name][1]
    scale, unit = unit_of(kind, [cost.mean for cost, _ in points.values()])

    def draw(theme: Theme) -> go.Figure:
        figure = go.Figure()
        figure.add_trace(
            go.Scatter(
                name="Pareto front",
                mode="lines",
                x=[points[rule][0].mean / scale for rule in front],
                y=[100 * points[rule][1].mean for rule in front],
                line={"color": theme.muted, "width": 1.5, "dash": "dash", "shape": "hv"},
                hoverinfo="skip",
            )
        )
        for rule, (cost, top1) in points.items():
            place = group.rules.index(rule)
            shape = symbol(place) if rule in front else f"{symbol(place)}-open"
            figure.add_trace(
                go.Scatter(
                    name=plain(rule),
                    mode="markers",
                    x=[cost.mean / scale],
                    y=[100 * top1.mean],
                    error_x=_errors([cost], theme, place, scale=1 / scale),
                    error_y=_errors([top1], theme, place, scale=100),
                    marker={
                        "color": color(theme, place),
                        "symbol": shape,
                        "size": 12,
                        "line": {"width": 2, "color": color(theme, place)},
                    },
                    hovertemplate=f"%{{x:.4g}} {unit}, %{{y:.2f}} %<extra>{plain(rule)}</extra>",
                )
            )
        x = {"title": {"text": f"{what}, {unit}"}, "rangemode": "tozero"}
        y = {"title": {"text": "top-1, %"}}
        return figure.update_layout(**base_layout(theme, height=380, xaxis=x, yaxis=y))

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
    unit_name = {"B": "bytes", "s": "seconds", "J": "joules"}[kind]
    columns = (
        "rule",
        f"{what}, {unit_name}",
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
        draw=draw,
        height=380,
    )


def prices(runs: Iterable[StudyRun]) -> str:
    """The tables of prices behind the joules of inferences, such as `45 nm, fp32`; empty where none
    was estimated.
    """
    told = (
        str((run.summary or {})["inference"].get("prices", NOT_SAID))
        for run in runs
        if run.value(ENERGY) is not None
    )
    return "; ".join(dict.fromkeys(told))


def _beside(group: Group, rule: str) -> list[float | None]:
    """Of an inference what cards measured, and its multiply-accumulates and accumulates."""
    found = [
        group.spread(rule, name) for name in (ENERGY_MEASURED, "inference.macs", "inference.acs")
    ]
    return [None if each is None else each.mean for each in found]


def _measured_on(group: Group) -> str:
    """What the measured joules are, or why there are none."""
    if any(run.value(ENERGY_MEASURED) is not None for run in group.finished):
        return f"Joules measured on cards are {MEASURED_SAID}"
    has_gpu = any(run.hardware.get("gpu", "none") != "none" for run in group.finished)
    return (
        "Joules are not measured: no card told them"
        if has_gpu
        else "Joules are not measured on a CPU"
    )


def _counted_on(group: Group) -> str:
    """Which samples the energy is of, and where it departs from published counts."""
    counted = [run for run in group.finished if run.value(ENERGY) is not None]
    sizes = sorted({int(run.value("inference.samples") or 0) for run in counted})
    told = (
        (run.summary or {})["inference"].get(
            "counted_on", "the first batch of the first worker's share"
        )
        for run in counted
    )
    return (
        f"Counted on {' and '.join(map(str, sizes))} samples, {' and '.join(dict.fromkeys(told))};"
        " what stands before the first neuron counts once for a still image, as it is computed,"
        " where published counts have it at each time step; means of spikes, behind a pool, are no"
        " spikes and are multiplied, which counts of synaptic operations leave out"
    )


def _lost(group: Group) -> str:
    """` Diverged, and in no mean: SLTT-1 (seed 1, 2).`, whatever finished beside it; empty where
    nothing did.
    """
    lost = {
        rule: ", ".join(map(str, sorted(seeds)))
        for rule in group.rules
        if (seeds := group.diverged(rule))
    }
    told = ", ".join(f"{rule} (seed {seeds})" for rule, seeds in lost.items())
    return f" Diverged, and in no mean: {told}." if told else ""


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Those that nobody beats: with no more of the first and no less of the second, and better in
    one; cheapest first.
    """
    kept = [
        name
        for name, (cost, gain) in points.items()
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points.values())
    ]
    return sorted(kept, key=lambda name: points[name])


def _offset(index: int, count: int) -> float:
    return 0.0 if count == 1 else 0.6 * (index / (count - 1) - 0.5)


def _errors(
    spreads: Sequence[Spread], theme: Theme, place: int, *, scale: float = 1.0
) -> dict[str, Any]:
    lengths = [scale * (each.deviation or 0.0) for each in spreads]
    return {
        "array": lengths,
        "visible": any(lengths),
        "color": color(theme, place),
        "thickness": 1.5,
        "width": 4,
    }
