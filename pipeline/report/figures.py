"""Figures of a group: cost ratios, accuracy against cost, parts of the time, learning curves."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.core.units import counted, format_quantity, unit_of
from pipeline.measure.constants import PARTS, REST, SECTIONS
from pipeline.recipe.json import flat
from pipeline.report.drawing import (
    INK,
    MUTED,
    PAPER,
    Cell,
    Figure,
    Missing,
    Table,
    color,
    drawing,
    pattern,
    plain,
    scatter,
    symbol,
    titled,
)
from pipeline.report.history import Point
from pipeline.report.metrics import (
    COMPUTE,
    ENERGY,
    ENERGY_MEASURED,
    Metric,
    compared_metrics,
    metric,
)
from pipeline.report.results import Run
from pipeline.report.study import Group, Spread
from pipeline.report.tables import MEASURED_CAPTION, prices

_UNITS = {"B": "bytes", "s": "seconds", "J": "joules"}


_LINE_AT_1 = {
    "type": "line",
    "x0": 1,
    "x1": 1,
    "y0": 0,
    "y1": 1,
    "yref": "y domain",
    "line": {"color": INK, "width": 1, "dash": "dot"},
}
_RATIO_COLUMNS = ("rule", "quantity", "divided by", "ratio", "standard deviation", "paired seeds")


def ratios(group: Group) -> Figure | Missing:
    title = f"Cost of each rule, as a multiple of {group.against}'s"
    if not group.has_baseline:
        return Missing(title=title, why=f"no baseline: {group.undivided}")
    rules = [rule for rule in group.rules if rule != group.against]
    costs = {each.name: each.title for each in compared_metrics() if each.better == "less"}
    ratio_of = {
        pair: ratio for pair in itertools.product(rules, costs) if (ratio := group.ratios(*pair))
    }
    if not ratio_of:
        return Missing(title=title, why=f"no rule has a seed in common with {group.against}")
    names = [name for name in costs if any(name == measured for _, measured in ratio_of)]
    max_x = max(1.0, *(ratio.mean + (ratio.deviation or 0) for ratio in ratio_of.values()))
    titles = [costs[name] for name in names]
    caption = (
        "Left of the dotted line, a rule costs less than the baseline. Markers show the mean and"
        " standard deviation over the seeds that the rule and the baseline share."
    )
    if (faster := group.fastest_baseline) != group.against:
        caption += f" Times are multiples of those of {faster}, the faster {group.against}."
    alt = f"{counted(len(rules), 'rule')} relative to {group.against} in {', '.join(titles)}"
    saved = {rule: ratio for (rule, name), ratio in ratio_of.items() if name == "peak_saved_bytes"}
    if saved:
        least = min(saved, key=lambda rule: saved[rule].mean)
        alt += f"; {least} has the fewest saved bytes, {saved[least].mean:.2f} of the baseline's"
    return Figure(
        name="ratios",
        title=title,
        caption=caption,
        alt=f"{alt}.",
        table=Table(
            columns=_RATIO_COLUMNS,
            rows=tuple(
                (rule, costs[name], group.base_of(name), ratio.mean, ratio.deviation, ratio.runs)
                for (rule, name), ratio in ratio_of.items()
            ),
        ),
        drawing=drawing(
            _ratio_markers(group, rules, names, ratio_of),
            height=110 + len(names) * max(52, 30 * len(rules)),
            xaxis=titled(f"multiple of {plain(group.against)}", range=[0, 1.3 * max_x]),
            yaxis={
                "tickvals": [*range(len(names))],
                "ticktext": titles,
                "range": [len(names) - 0.5, -0.75],
                "showgrid": False,
                "zeroline": False,
            },
            shapes=[_LINE_AT_1],
        ),
    )


def _ratio_markers(
    group: Group,
    rules: Sequence[str],
    names: Sequence[str],
    ratio_of: Mapping[tuple[str, str], Spread],
) -> list[dict[str, Any]]:
    """A trace of markers for each rule, with a vertical offset between the rules."""
    data = []
    for position, rule in enumerate(rules):
        index = group.place_of(rule)
        offset = 0.6 * (position / (len(rules) - 1) - 0.5) if len(rules) > 1 else 0.0
        rows = [names.index(name) for of_rule, name in ratio_of if of_rule == rule]
        ratios = [ratio for (of_rule, _), ratio in ratio_of.items() if of_rule == rule]
        deviations = [ratio.deviation or 0.0 for ratio in ratios]
        data.append(
            scatter(
                rule,
                [ratio.mean for ratio in ratios],
                [row + offset for row in rows],
                mode="markers+text",
                error_x={
                    "array": deviations,
                    "visible": any(deviations),
                    "color": color(index),
                    "thickness": 1.5,
                    "width": 4,
                },
                text=[f"{ratio.mean:.2f}" for ratio in ratios],
                textposition="top center",
                textfont={"size": 12, "color": color(index)},
                marker={"color": color(index), "symbol": symbol(index), "size": 10},
                hovertemplate="%{x:.3f}<extra>" + plain(rule) + "</extra>",
            )
        )
    return data


def trade_off(group: Group, name: str) -> Figure | Missing:
    """Accuracy against a cost, with a point for each run. Rules on the Pareto front are marked."""
    cost_metric = metric(name)
    cost_title = cost_metric.title
    title = f"Accuracy against {cost_title}"
    points = {
        rule: (cost, top1)
        for rule in group.rules
        if (cost := group.spread(rule, name)) is not None
        and (top1 := group.spread(rule, "top1")) is not None
    }
    if not points:
        return Missing(title=title, why="not measured in any finished run")
    front = pareto({rule: (cost.mean, top1.mean) for rule, (cost, top1) in points.items()})
    scale, unit = unit_of(cost_metric.unit, [cost.mean for cost, _ in points.values()])
    data = [
        scatter(
            "Pareto front",
            [points[rule][0].mean / scale for rule in front],
            [100 * points[rule][1].mean for rule in front],
            mode="lines",
            line={"color": MUTED, "width": 1.5, "dash": "dash", "shape": "hv"},
            hoverinfo="skip",
        )
    ]
    data += [
        _runs_of(group, rule, cost_metric, scale=scale, is_filled=rule in front) for rule in points
    ]
    return Figure(
        name=f"accuracy-against-{cost_title.replace(' ', '-')}",
        title=title,
        caption=_trade_off_caption(group, cost_metric),
        alt=(
            f"{len(front)} of {len(points)} rules are on the Pareto front of accuracy and"
            f" {cost_title}: {', '.join(front)}."
        ),
        table=_trade_off_table(group, name, points, front),
        drawing=drawing(
            data,
            height=390,
            hovermode="closest",
            xaxis=titled(f"{cost_title}, {unit}", rangemode="tozero"),
            yaxis=titled("top-1, %"),
        ),
    )


def _runs_of(group: Group, rule: str, cost: Metric, *, scale: float, is_filled: bool) -> Any:
    """A point for each finished run of a rule. Its label has the rule, the seed and the times."""
    runs = [
        run
        for run in group.of(rule)
        if run.value(cost.name) is not None and run.value("top1") is not None
    ]
    index = group.place_of(rule)
    return scatter(
        rule,
        [(run.value(cost.name) or 0.0) / scale for run in runs],
        [100 * (run.value("top1") or 0.0) for run in runs],
        mode="markers",
        marker={
            "color": color(index),
            "symbol": symbol(index) if is_filled else f"{symbol(index)}-open",
            "size": 12,
            "opacity": 0.85,
            "line": {"width": 2, "color": color(index)},
        },
        text=[_label(run, cost) for run in runs],
        hovertemplate="%{text}<extra></extra>",
    )


def _label(run: Run, cost: Metric) -> str:
    """The lines of a point's label, without a line for a quantity that was not measured."""
    metrics = [metric(name) for name in dict.fromkeys((cost.name, COMPUTE, "wall_s"))]
    values = [(each, value) for each in metrics if (value := run.value(each.name)) is not None]
    costs = [f"{each.title} {format_quantity(value, kind=each.unit)}" for each, value in values]
    top1 = f"top-1 {run.value('top1'):.2%}"
    return "<br>".join([f"<b>{plain(run.rule)}</b>, seed {run.seed}", top1, *costs])


def _trade_off_caption(group: Group, cost_metric: Metric) -> str:
    caption = (
        f"{cost_metric.title.capitalize()}: {cost_metric.description or 'see the table of costs'}."
    )
    if cost_metric.name == ENERGY:
        caption += f" {_describe_energy(group)}."
    caption += (
        " Each point is a run; the dashed line joins the means of the rules on the Pareto front."
        " Their markers are filled: no other rule is at least as good in both accuracy and cost."
    )
    diverged = ", ".join(
        f"{rule} (seed {', '.join(map(str, sorted(seeds)))})"
        for rule in group.rules
        if (seeds := group.diverged(rule))
    )
    return f"{caption} Diverged runs are in no mean: {diverged}." if diverged else caption


def _trade_off_table(
    group: Group, name: str, points: Mapping[str, tuple[Spread, Spread]], front: Sequence[str]
) -> Table:
    cost_metric = metric(name)
    more_columns: dict[str, str] = {}
    if name == ENERGY:
        more_columns = {
            ENERGY_MEASURED: "measured on cards, joules",
            "inference.macs": "MACs",
            "inference.acs": "ACs",
        }
    rows: list[tuple[Cell, ...]] = []
    for rule, (cost, top1) in points.items():
        spreads = (group.spread(rule, each) for each in more_columns)
        rows.append(
            (
                rule,
                cost.mean,
                cost.deviation,
                top1.mean,
                top1.deviation,
                top1.runs,
                "yes" if rule in front else "no",
                *(spread and spread.mean for spread in spreads),
            )
        )
    return Table(
        columns=(
            "rule",
            f"{cost_metric.title}, {_UNITS.get(cost_metric.unit, cost_metric.unit)}",
            "deviation of the cost",
            "top-1",
            "deviation of top-1",
            "runs",
            "on the Pareto front",
            *more_columns.values(),
        ),
        rows=tuple(rows),
    )


def _describe_energy(group: Group) -> str:
    """The prices and samples behind the energy, and how the counts differ from published ones."""
    counted = [run for run in group.finished if run.value(ENERGY) is not None]
    sizes = sorted({int(run.value("inference.samples") or 0) for run in counted})
    sources = ((run.summary or {})["inference"]["counted_on"] for run in counted)
    if any(run.value(ENERGY_MEASURED) is not None for run in group.finished):
        measured = f"Joules measured on cards are {MEASURED_CAPTION}"
    elif any(run.hardware.get("gpu", "none") != "none" for run in group.finished):
        measured = "Joules are not measured: no card reports them"
    else:
        measured = "Joules are not measured on a CPU"
    return (
        f"Prices of an operation: {prices(group.finished)}. Counted on"
        f" {' and '.join(map(str, sizes))} samples, {' and '.join(dict.fromkeys(sources))}. For a"
        " still image, the layers before the first neuron are computed and counted once, but"
        " published counts include them at each time step. The layer after a pooling layer"
        " multiplies means of spikes; counts of synaptic operations exclude these"
        f" multiplications. {measured}"
    )


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names on the Pareto front of (cost, gain) points, in ascending order of cost."""
    return [
        name
        for name, (cost, gain) in sorted(points.items(), key=lambda item: item[1])
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points.values())
    ]


_SMALL_SHARE = 0.01  # parts with a smaller share of each rule's bar are drawn as one part
_UNFINISHED = ", batches alone"  # follows the label of a rule without a finished run
_HATCH = {"size": 6, "fgcolor": PAPER, "fillmode": "overlay"}


def time_parts(group: Group) -> Figure | Missing:
    title = "Where the time goes"
    seconds = _seconds_by_part(group)
    if seconds.empty:
        return Missing(title=title, why="no run has measured the parts of its time")
    totals: Any = seconds.sum()
    shares: Any = (seconds / totals).fillna(0.0)
    is_large = shares.ge(_SMALL_SHARE).any(axis=1)
    bars = seconds[is_large].rename(lambda name: name.replace("_", " "))
    if not is_large.all():
        bars.loc[f"{(~is_large).sum()} small parts"] = seconds[~is_large].sum()
    data = [
        {
            "type": "bar",
            "name": label,
            "orientation": "h",
            "y": list(map(plain, seconds)),
            "x": [1e3 * value for value in by_rule],
            "marker": {
                "color": color(index + 1),
                "pattern": {**_HATCH, "shape": pattern(index)},
                "line": {"color": PAPER, "width": 1},
            },
            "hovertemplate": f"%{{y}}: %{{x:.3g}} ms<extra>{label}</extra>",
        }
        for index, (label, by_rule) in enumerate(bars.fillna(0.0).iterrows())
    ]
    rows = [
        (rule, name, None if pd.isna(value) else value, shares.at[name, rule])
        for rule in seconds
        for name, value in seconds[rule].items()
    ]
    slowest = totals.idxmax()
    largest: Any = seconds[slowest].idxmax()
    caption = (
        "Time per batch, as the mean over finished runs. It includes evaluations and checkpoints,"
        " but neither start-up nor comparisons of gradients. Rest is the time outside the named"
        " parts."
    )
    if set(seconds) - set(group.rules):
        caption += " A rule without a finished run has the time of its batches alone."
    return Figure(
        name="time-parts",
        title=title,
        caption=caption,
        alt=(
            f"{slowest} is the slowest with {format_quantity(totals[slowest], kind='s')} per batch;"
            f" its largest part, {largest.replace('_', ' ')}, is {shares.at[largest, slowest]:.0%}."
        ),
        table=Table(columns=("rule", "part", "seconds per batch", "share"), rows=tuple(rows)),
        drawing=drawing(
            data,
            height=170 + 42 * len(seconds.columns),
            barmode="stack",
            bargap=0.35,
            legend={"traceorder": "normal"},
            xaxis=titled("ms per batch"),
            yaxis={"autorange": "reversed", "showgrid": False},
        ),
    )


def _seconds_by_part(group: Group) -> Any:
    """Return a frame of seconds per batch: one row per part of the clock, one column per rule.

    The values are means over the rule's finished runs. For a rule without a finished run, they are
    means over its other runs, which have measured only their batches.
    """
    means: dict[str, Any] = {}
    for rule in group.rules:
        finished = [run.parts for run in group.of(rule) if run.is_finished and run.parts]
        if parts := finished or [run.parts for run in group.of(rule) if run.parts]:
            means[rule if finished else f"{rule}{_UNFINISHED}"] = pd.DataFrame(parts).mean()
    seconds = pd.DataFrame(means).reindex([*PARTS, REST, *SECTIONS]).drop("fidelity")
    return seconds[seconds.gt(0).any(axis=1)]


ON_TRACK = 1.0  # a run is on track if it is at most this many points below the published run
_MAX_POINTS = 300  # of a drawn curve; the journal of an ImageNet run has about 100,000
_VALUES = ("top1", "loss")


def learning_curves(group: Group) -> Figure | Missing:
    title = "Learning curves"
    if not any(run.history.curve or run.history.evaluations for run in group.runs):
        return Missing(title=title, why="no run has recorded a step yet")
    logs = _published_logs(group.runs)
    restarts = [(run, each) for run in group.runs for each in run.history.restarts]
    data: list[dict[str, Any]] = []
    rows: list[tuple[Cell, ...]] = [
        ("published", ", ".join(rules), "", "published", None, epoch, None, top1, None)
        for points, rules in logs.items()
        for epoch, top1 in points
    ]
    in_legend: set[str] = set()  # the legend has a rule once, for its first run with a trace
    for run in group.runs:
        past, curve = run.history, thinned(run.history.curve)
        has_legend = run.rule not in in_legend
        for trace in _traces(run, curve, group.place_of(run.rule), has_legend=has_legend):
            data.append(trace)
            in_legend.add(run.rule)
        kinds = {"training": curve, "evaluation": past.evaluations, "restart": past.restarts}
        rows += [
            (
                *(run.name, run.rule, run.seed, kind),
                *(point.step, _epochs(run, point.step), point.seconds, point.top1, point.loss),
            )
            for kind, points in kinds.items()
            for point in points
        ]
    if restarts:
        data.append(
            scatter(
                "restart",
                [_epochs(run, each.step) for run, each in restarts],
                [_height_at(run, each.step) for run, each in restarts],
                mode="markers",
                marker={"symbol": "x-thin", "size": 13, "line": {"width": 2.5, "color": INK}},
                hovertemplate="restarted after %{x:.4g} epochs<extra></extra>",
            )
        )
    columns = ("run", "rule", "seed", "what", "step", "epochs", "seconds", "top-1", "loss")
    counts = f"{counted(len(group.runs), 'run')} with {counted(len(restarts), 'restart')}"
    comparison = "; ".join(standings(group)) or "no recipe has published points"
    return Figure(
        name="learning-curves",
        title=title,
        caption=_curves_caption(group, has_logs=bool(logs)),
        alt=f"Accuracy against epochs of {counts}; {comparison}.",
        table=Table(columns=columns, rows=tuple(rows)),
        drawing=drawing(
            data + _log_traces(group, logs),
            height=420,
            xaxis=titled("epochs", rangemode="tozero"),
            yaxis=titled("top-1, %"),
        ),
    )


def _log_traces(
    group: Group, logs: Mapping[tuple[tuple[int, float], ...], Sequence[str]]
) -> list[dict[str, Any]]:
    return [
        scatter(
            f"published, {', '.join(rules)}",
            [epoch for epoch, _ in points],
            [100 * top1 for _, top1 in points],
            mode="lines+markers",
            line={"color": color(group.place_of(rules[0])), "dash": "dashdot"},
            marker={"symbol": "star", "size": 9},
        )
        for points, rules in logs.items()
    ]


def _curves_caption(group: Group, *, has_logs: bool) -> str:
    settings = sorted({setting for run in group.runs if (setting := _other_setting(run))})
    remarks = {
        "Stars: the published log in the recipes of a rule.": has_logs,
        **{f"The published setting differs: {each}.": has_logs for each in settings},
        f"A curve of more than {_MAX_POINTS} points is reduced to at most {_MAX_POINTS} means, here"
        " and in the CSV.": any(len(run.history.curve) > _MAX_POINTS for run in group.runs),
        "Only some points of a long journal are read; no mean includes the others.": any(
            run.curve_every > 1 for run in group.runs
        ),
        "After its last cross, a running run shows the batches from before the restart until it has"
        " repeated them.": any(run.history.again_from is not None for run in group.runs),
    }
    restarts = sum(len(run.history.restarts) for run in group.runs)
    caption = (
        "Lines: training batches; each point is the mean since the previous point. Markers: the"
        f" evaluation set. Crosses: restarts ({restarts})."
    )
    return " ".join([caption, *(text for text, applies in remarks.items() if applies)])


def _published_logs(runs: Sequence[Run]) -> dict[tuple[tuple[int, float], ...], list[str]]:
    """The published logs, each with the rules whose recipes have it. A study may have several."""
    logs: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for run in runs:
        if (points := published(run)) and run.rule not in logs.setdefault(points, []):
            logs[points].append(run.rule)
    return logs


def standings(group: Group) -> list[str]:
    """How each run compares with the published points in its recipe."""
    return [f"{run.name}: {standing(run)}" for run in group.runs if published(run)]


def standing(run: Run) -> str:
    """How a run compares with its published log: `on track`, or `4.0 points below ... at epoch 4`.

    Only published epochs are judged, and only runs with the settings of the log.
    """
    if other := _other_setting(run):
        return f"not judged, because the published log is for another setting: {other}"
    target = dict(published(run))
    common = [
        (each.epoch + 1, each.top1)
        for each in run.history.evaluations
        if each.epoch is not None and each.epoch + 1 in target and each.top1 is not None
    ]
    if not common:
        return "no evaluation yet at a published epoch"
    epoch, top1 = common[-1]
    below = 100 * (target[epoch] - top1)
    text = f"{abs(below):.1f} points {'below' if below > 0 else 'above'} the published run"
    return f"{text if below > ON_TRACK else f'on track, {text}'} at epoch {epoch}"


def published(run: Run) -> tuple[tuple[int, float], ...]:
    """Epochs and top-1 in 0..1 of the published log in the recipe; empty without one."""
    points = run.recipe.get("published") or ()
    return tuple((int(epoch), float(top1)) for epoch, top1 in points)


def thinned(curve: Sequence[Point]) -> list[Point]:
    """Thin a curve to at most 300 points: means over the batches since the previous point."""
    size = math.ceil(len(curve) / _MAX_POINTS)
    if size <= 1:
        return list(curve)
    steps, bins = pd.Series([each.step for each in curve]), np.arange(len(curve)) // size
    batches = steps.diff().fillna(steps).clip(lower=1)
    values = pd.DataFrame({name: [getattr(each, name) for each in curve] for name in _VALUES})
    known: Any = values.notna().mul(batches, axis=0).groupby(bins).sum()
    means = values.astype(float).mul(batches, axis=0).groupby(bins).sum() / known
    records = means.astype(object).where(known > 0, None).to_dict("records")
    lasts = [curve[min(start + size, len(curve)) - 1] for start in range(0, len(curve), size)]
    return [last._replace(**record) for last, record in zip(lasts, records, strict=True)]


def _other_setting(run: Run) -> str:
    """Differences from the published setting: `time_steps 4 published, 2 here`; may be empty."""
    published_fields = dict(flat(dict(run.recipe.get("published_setting") or ())))
    fields = dict(flat(run.recipe))
    return ", ".join(
        f"{key} {value} published, {fields.get(key, 'not set')} here"
        for key, value in published_fields.items()
        if fields.get(key) != value
    )


def _traces(
    run: Run, curve: Sequence[Point], index: int, *, has_legend: bool
) -> Iterator[dict[str, Any]]:
    line, marker = {"color": color(index), "width": 1.2}, {"symbol": symbol(index), "size": 10}
    evaluations = [each for each in run.history.evaluations if each.top1 is not None]
    points = [each for each in curve if each.top1 is not None]
    options = {
        "legendgroup": plain(run.rule),
        "hovertemplate": f"%{{y:.2f}} % after %{{x:.3g}} epochs<extra>{plain(run.name)}</extra>",
    }
    if points:
        options |= {"mode": "lines", "opacity": 0.75, "showlegend": has_legend and not evaluations}
        yield scatter(run.rule, *_curve(run, points), line=line, **options)
    if evaluations:
        line = line | {"width": 2, "dash": "dot"}
        options |= {"mode": "lines+markers", "opacity": 1, "showlegend": has_legend}
        yield scatter(run.rule, *_curve(run, evaluations), line=line, marker=marker, **options)


def _curve(run: Run, points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return (
        [_epochs(run, each.step) for each in points],
        [100 * (each.top1 or 0.0) for each in points],
    )


def _epochs(run: Run, step: int) -> float:
    return step / run.steps_per_epoch if run.steps_per_epoch else float(step)


def _height_at(run: Run, step: int) -> float:
    """The last top-1 in percent up to a step; without one, the first top-1; without any, 0."""
    points = [each for each in run.history.curve if each.top1 is not None]
    before = [each for each in points if each.step <= step]
    nearest = before[-1:] or points[:1]
    return 100 * (nearest[0].top1 or 0.0) if nearest else 0.0
