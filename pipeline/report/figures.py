"""The figures of a group: costs beside the baseline and against accuracy, where the time goes, and
learning curves beside published points.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.core.units import counted, format_quantity, unit_of
from pipeline.measure.constants import BETWEEN, PARTS, REST
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
from pipeline.report.metrics import ENERGY, ENERGY_MEASURED, compared, metric
from pipeline.report.results import Run
from pipeline.report.study import Group, Spread
from pipeline.report.tables import MEASURED_SAID, prices

_UNITS = {"B": "bytes", "s": "seconds", "J": "joules"}


_OF_RATIOS = ("rule", "quantity", "divided by", "ratio", "standard deviation", "paired seeds")


def ratios(group: Group) -> Figure | Missing:
    """Each rule's costs over the baseline's."""
    title = f"Cost of each rule, as a multiple of {group.against}'s"
    if not group.has_baseline:
        return Missing(title=title, why=f"no baseline: {group.undivided}, so nothing is divided")
    rules = [rule for rule in group.rules if rule != group.against]
    costs = {each.name: each.title for each in compared() if each.better == "less"}
    ratio_of = {
        pair: ratio for pair in itertools.product(rules, costs) if (ratio := group.ratios(*pair))
    }
    if not ratio_of:
        return Missing(title=title, why=f"no rule has a seed in common with {group.against}")
    names = [name for name in costs if any(name == measured for _, measured in ratio_of)]
    most = max(1.0, *(ratio.mean + (ratio.deviation or 0) for ratio in ratio_of.values()))
    line = {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "y domain"}
    ticks = {"tickvals": [*range(len(names))], "ticktext": [costs[name] for name in names]}
    caption = (
        "Left of the dotted line is less than the baseline; mean and standard deviation over the"
        " seeds that both ran."
    )
    if (faster := group.fastest_baseline) != group.against:
        caption += f" Times are multiples of {faster}'s, the faster {group.against}."
    alt = f"{len(rules)} rules beside {group.against} in {', '.join(ticks['ticktext'])}"
    saved = {rule: ratio for (rule, name), ratio in ratio_of.items() if name == "peak_saved_bytes"}
    if saved:
        least = min(saved, key=lambda rule: saved[rule].mean)
        alt += f": {least} keeps {saved[least].mean:.2f} of its saved bytes, the least"
    return Figure(
        name="ratios",
        title=title,
        caption=caption,
        alt=f"{alt}.",
        table=Table(
            columns=_OF_RATIOS,
            rows=tuple(
                (rule, costs[name], group.base_of(name), ratio.mean, ratio.deviation, ratio.runs)
                for (rule, name), ratio in ratio_of.items()
            ),
        ),
        drawing=drawing(
            _ratio_markers(rules, names, ratio_of),
            height=110 + len(names) * max(52, 30 * len(rules)),
            xaxis=titled(f"multiple of {plain(group.against)}", range=[0, 1.3 * most]),
            yaxis={
                **ticks,
                "range": [len(names) - 0.5, -0.75],
                "showgrid": False,
                "zeroline": False,
            },
            shapes=[line | {"line": {"color": INK, "width": 1, "dash": "dot"}}],
        ),
    )


def _ratio_markers(
    rules: Sequence[str], names: Sequence[str], ratio_of: Mapping[tuple[str, str], Spread]
) -> list[dict[str, Any]]:
    """A row of markers for each rule, a little apart from those of the others."""
    data = []
    for index, rule in enumerate(rules, start=1):
        offset = 0.6 * ((index - 1) / (len(rules) - 1) - 0.5) if len(rules) > 1 else 0.0
        here = {names.index(name): ratio for (of, name), ratio in ratio_of.items() if of == rule}
        about = {
            "error_x": _errors([*here.values()], index),
            "text": [f"{ratio.mean:.2f}" for ratio in here.values()],
            "textposition": "top center",
            "textfont": {"size": 12, "color": color(index)},
            "marker": {"color": color(index), "symbol": symbol(index), "size": 10},
            "hovertemplate": "%{x:.3f}<extra>" + plain(rule) + "</extra>",
        }
        means, heights = [ratio.mean for ratio in here.values()], [each + offset for each in here]
        data.append(scatter(rule, means, heights, mode="markers+text", **about))
    return data


def trade_off(group: Group, name: str) -> Figure | Missing:
    """Accuracy against a cost. Rules on the Pareto front are marked."""
    cost_of = metric(name)
    what, how = cost_of.title, cost_of.description or "see the table of costs"
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
    for rule, (cost, top1) in points.items():
        place = group.rules.index(rule)
        shape = symbol(place) if rule in front else f"{symbol(place)}-open"
        about = {
            "error_x": _errors([cost], place, scale=1 / scale),
            "error_y": _errors([top1], place, scale=100),
            "marker": {"color": color(place), "symbol": shape, "size": 12}
            | {"line": {"width": 2, "color": color(place)}},
            "hovertemplate": f"%{{x:.4g}} {unit}, %{{y:.2f}} %<extra>{plain(rule)}</extra>",
        }
        data.append(scatter(rule, [cost.mean / scale], [100 * top1.mean], mode="markers", **about))
    if name == ENERGY:
        how = f"{how}. {_describe_energy(group)}"
    diverged = _diverged(group)
    return Figure(
        name=f"accuracy-against-{what.replace(' ', '-')}",
        title=title,
        caption=(
            f"{what.capitalize()}: {how}. Filled markers are on the Pareto front: no other rule is"
            " at least as good in both."
            + (f" Diverged, and in no mean: {diverged}." if diverged else "")
        ),
        alt=(
            f"On the Pareto front of accuracy and {what}, of {len(points)} rules:"
            f" {', '.join(front)}."
        ),
        table=_trade_off_table(group, name, points, front),
        drawing=drawing(
            data,
            height=380,
            xaxis=titled(f"{what}, {unit}", rangemode="tozero"),
            yaxis=titled("top-1, %"),
        ),
    )


def _diverged(group: Group) -> str:
    return ", ".join(
        f"{rule} (seed {', '.join(map(str, sorted(seeds)))})"
        for rule in group.rules
        if (seeds := group.diverged(rule))
    )


def _trade_off_table(
    group: Group, name: str, points: Mapping[str, tuple[Spread, Spread]], front: Sequence[str]
) -> Table:
    cost_of = metric(name)
    beside = {
        ENERGY_MEASURED: "measured on cards, joules",
        "inference.macs": "MACs",
        "inference.acs": "ACs",
    }
    if name != ENERGY:
        beside = {}
    rows: list[tuple[Cell, ...]] = []
    for rule, (cost, top1) in points.items():
        cells = (cost.mean, cost.deviation, top1.mean, top1.deviation, top1.runs)
        more = (group.spread(rule, each) for each in beside)
        on_front = "yes" if rule in front else "no"
        rows.append((rule, *cells, on_front, *(of and of.mean for of in more)))
    of_cost = f"{cost_of.title}, {_UNITS.get(cost_of.unit, cost_of.unit)}"
    columns = ("rule", of_cost, "its deviation", "top-1", "its deviation", "runs")
    return Table(columns=(*columns, "on the Pareto front", *beside.values()), rows=tuple(rows))


def _describe_energy(group: Group) -> str:
    """The prices and samples behind the energy, and how the counts differ from published ones."""
    counted = [run for run in group.finished if run.value(ENERGY) is not None]
    sizes = sorted({int(run.value("inference.samples") or 0) for run in counted})
    first = "the first batch of the first worker's share"
    places = ((run.summary or {})["inference"].get("counted_on", first) for run in counted)
    if any(run.value(ENERGY_MEASURED) is not None for run in group.finished):
        measured = f"Joules measured on cards are {MEASURED_SAID}"
    elif any(run.hardware.get("gpu", "none") != "none" for run in group.finished):
        measured = "Joules are not measured: no card reports them"
    else:
        measured = "Joules are not measured on a CPU"
    return (
        f"Prices of an operation: {prices(group.finished)}. Counted on"
        f" {' and '.join(map(str, sizes))} samples, {' and '.join(dict.fromkeys(places))}; for a"
        " still image, the layers before the first neuron count once, as they are computed once,"
        " where published counts have them at each time step; means of spikes, behind a pool, are"
        " no spikes and are multiplied, which counts of synaptic operations leave out."
        f" {measured}"
    )


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names on the Pareto front (least cost, most gain), the cheapest first."""
    return [
        name
        for name, (cost, gain) in sorted(points.items(), key=lambda item: item[1])
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points.values())
    ]


def _errors(spreads: Sequence[Spread], place: int, *, scale: float = 1.0) -> dict[str, Any]:
    lengths = [scale * (each.deviation or 0.0) for each in spreads]
    return {
        "array": lengths,
        "visible": any(lengths),
        "color": color(place),
        "thickness": 1.5,
        "width": 4,
    }


_SMALL = 0.01  # share of a bar: parts below it in every rule are drawn as one
_SO_FAR = ", batches alone"
_HATCH = {"size": 6, "fgcolor": PAPER, "fillmode": "overlay"}


def time_parts(group: Group) -> Figure | Missing:
    """Where each rule's time goes, in milliseconds of a batch."""
    title = "Where the time goes"
    seconds = _seconds_by_part(group)
    if seconds.empty:
        return Missing(title=title, why="no run has measured the parts of its time")
    totals: Any = seconds.sum()
    shares: Any = (seconds / totals).fillna(0.0)
    is_large = shares.ge(_SMALL).any(axis=1)
    bars = seconds[is_large].rename(lambda name: name.replace("_", " "))
    if not is_large.all():
        bars.loc[f"{(~is_large).sum()} small ones"] = seconds[~is_large].sum()
    data = [
        {
            "type": "bar",
            "name": label,
            "orientation": "h",
            "y": list(map(plain, seconds)),
            "x": [1e3 * value for value in by_rule],
            "marker": {
                "color": color(place + 1),
                "pattern": {**_HATCH, "shape": pattern(place)},
                "line": {"color": PAPER, "width": 1},
            },
            "hovertemplate": f"%{{y}}: %{{x:.3g}} ms<extra>{label}</extra>",
        }
        for place, (label, by_rule) in enumerate(bars.fillna(0.0).iterrows())
    ]
    rows = [
        (rule, name, None if pd.isna(value) else value, shares.at[name, rule])
        for rule in seconds
        for name, value in seconds[rule].items()
    ]
    slowest = totals.idxmax()
    most: Any = seconds[slowest].idxmax()
    alone = set(seconds) - set(group.rules)
    return Figure(
        name="time-parts",
        title=title,
        caption=(
            "Mean over finished runs of all their time, with evaluations and checkpoints, without"
            " start-up and comparisons of gradients, by batch"
            + ("; of a rule without one, of its batches alone" if alone else "")
            + "; rest is the time outside every named part."
        ),
        alt=(
            f"{slowest} takes longest with {format_quantity(totals[slowest], kind='s')} a batch, of"
            f" which {most.replace('_', ' ')} is {shares.at[most, slowest]:.0%}."
        ),
        table=Table(columns=("rule", "part", "seconds of a batch", "share"), rows=tuple(rows)),
        drawing=drawing(
            data,
            height=170 + 42 * len(seconds.columns),
            barmode="stack",
            bargap=0.35,
            legend={"traceorder": "normal"},
            xaxis=titled("ms of a batch"),
            yaxis={"autorange": "reversed", "showgrid": False},
        ),
    )


def _seconds_by_part(group: Group) -> Any:
    """Return a frame of seconds per batch: one row per part of the clock, one column per rule.

    The values are means over the rule's finished runs. A rule without a finished run uses its other
    runs, which have measured only their batches.
    """
    means: dict[str, Any] = {}
    for rule in group.rules:
        finished = [run.parts for run in group.of(rule) if run.is_finished and run.parts]
        if of_runs := finished or [run.parts for run in group.of(rule) if run.parts]:
            means[rule if finished else f"{rule}{_SO_FAR}"] = pd.DataFrame(of_runs).mean()
    seconds = pd.DataFrame(means).reindex([*PARTS, REST, *BETWEEN]).drop("fidelity")
    return seconds[seconds.gt(0).any(axis=1)]


ON_TRACK = 1.0  # points of accuracy below the published run that still count as on track
_MOST = 300  # the most points of a curve: an ImageNet run has some hundred thousand
_VALUES = ("top1", "loss")


def learning_curves(group: Group) -> Figure | Missing:
    """Accuracy in training and on the evaluation set by epoch, for each run, with restarts."""
    title = "Learning curves"
    if not any(run.history.curve or run.history.evaluations for run in group.runs):
        return Missing(title=title, why="no run has written a step yet")
    logs = _logs(group.runs)
    restarts = [(run, each) for run in group.runs for each in run.history.restarts]
    data: list[dict[str, Any]] = []
    rows: list[tuple[Cell, ...]] = [
        ("published", ", ".join(rules), "", "published", None, epoch, None, top1, None)
        for points, rules in logs.items()
        for epoch, top1 in points
    ]
    named: set[str] = set()  # the legend names a rule once, at its first run with a trace
    for run in group.runs:
        past, curve = run.history, thinned(run.history.curve)
        for trace in _traces(run, curve, group.rules.index(run.rule), named=run.rule not in named):
            data.append(trace)
            named.add(run.rule)
        kinds = {"training": curve, "evaluation": past.evaluations, "restart": past.restarts}
        about = (run.name, run.rule, run.seed)
        for what, points in kinds.items():
            for at in points:
                position = (at.step, _epochs(run, at.step), at.seconds)
                rows.append((*about, what, *position, at.top1, at.loss))
    if restarts:
        data.append(
            scatter(
                "restart",
                [_epochs(run, each.step) for run, each in restarts],
                [_height_at(run, each.step) for run, each in restarts],
                mode="markers",
                marker={"symbol": "x-thin", "size": 13, "line": {"width": 2.5, "color": INK}},
                hovertemplate="started again after %{x:.4g} epochs<extra></extra>",
            )
        )
    columns = ("run", "rule", "seed", "what", "step", "epochs", "seconds", "top-1", "loss")
    runs, times = counted(len(group.runs), "run"), counted(len(restarts), "restart")
    beside = "; ".join(standings(group)) or "no recipe carries published points"
    return Figure(
        name="learning-curves",
        title=title,
        caption=_curves_caption(group, has_logs=bool(logs)),
        alt=f"Accuracy of {runs} by epoch, with {times}; {beside}.",
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
            line={"color": color(group.rules.index(rules[0])), "dash": "dashdot"},
            marker={"symbol": "star", "size": 9},
        )
        for points, rules in logs.items()
    ]


def _curves_caption(group: Group, *, has_logs: bool) -> str:
    others = sorted({other for run in group.runs if (other := _other_setting(run))})
    remarks = {
        "Stars: the published log that recipes of a rule carry.": has_logs,
        **{f"Of another setting than the run's: {each}.": has_logs for each in others},
        f"A curve of more than {_MOST} points is shown in {_MOST} means at most, here and in the"
        " CSV.": any(len(run.history.curve) > _MOST for run in group.runs),
        "Of a long journal not every point is read: what is left out is in no mean.": any(
            run.curve_every > 1 for run in group.runs
        ),
        "Beyond its last cross a running run shows its earlier batches until it has repeated"
        " them.": any(run.history.again_from is not None for run in group.runs),
    }
    restarts = sum(len(run.history.restarts) for run in group.runs)
    caption = (
        "Lines: training batches, each point the mean since the one before; markers: the"
        f" evaluation set. Crosses: restarts ({restarts})."
    )
    return " ".join([caption, *(text for text, applies in remarks.items() if applies)])


def _logs(runs: Sequence[Run]) -> dict[tuple[tuple[int, float], ...], list[str]]:
    """The published logs, and the rules whose recipes carry each: runs of a study may differ."""
    logs: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for run in runs:
        if (points := published(run)) and run.rule not in logs.setdefault(points, []):
            logs[points].append(run.rule)
    return logs


def standings(group: Group) -> list[str]:
    """How each run compares with the published points that its recipe carries."""
    return [f"{run.name}: {standing(run)}" for run in group.runs if published(run)]


def standing(run: Run) -> str:
    """How a run compares with its published log: `on track`, or `4.0 points below ... at epoch 4`.

    Only published epochs are judged, and only runs with the settings of the log.
    """
    if other := _other_setting(run):
        return f"not judged by the published log, which is of another setting: {other}"
    target = dict(published(run))
    both = [
        (each.epoch + 1, each.top1)
        for each in run.history.evaluations
        if each.epoch is not None and each.epoch + 1 in target and each.top1 is not None
    ]
    if not both:
        return "no evaluation yet at an epoch that is published"
    epoch, top1 = both[-1]
    below = 100 * (target[epoch] - top1)
    text = f"the published run at epoch {epoch}"
    if below > ON_TRACK:
        return f"{below:.1f} points below {text}"
    return f"on track, {abs(below):.1f} points {'below' if below > 0 else 'above'} {text}"


def published(run: Run) -> tuple[tuple[int, float], ...]:
    """Epochs and top-1 in 0..1 of the published log that the recipe carries; empty without one."""
    points = run.recipe.get("published")
    points = points if isinstance(points, (list, tuple)) else ()
    return tuple((int(epoch), float(top1)) for epoch, top1 in points)


def thinned(curve: Sequence[Point]) -> list[Point]:
    """Thin a curve to at most 300 points, each the mean over the batches since the point before."""
    size = math.ceil(len(curve) / _MOST)
    if size <= 1:
        return list(curve)
    steps, place = pd.Series([each.step for each in curve]), np.arange(len(curve)) // size
    batches = steps.diff().fillna(steps).clip(lower=1)
    values = pd.DataFrame({name: [getattr(each, name) for each in curve] for name in _VALUES})
    known: Any = values.notna().mul(batches, axis=0).groupby(place).sum()
    means = values.astype(float).mul(batches, axis=0).groupby(place).sum() / known
    records = means.astype(object).where(known > 0, None).to_dict("records")
    lasts = [curve[min(at + size, len(curve)) - 1] for at in range(0, len(curve), size)]
    return [last._replace(**of) for last, of in zip(lasts, records, strict=True)]


def _other_setting(run: Run) -> str:
    """Describe differences from the published setting: `time_steps 4 there, 2 here`; else empty."""
    setting = run.recipe.get("published_setting")
    there = dict(flat(dict(setting))) if isinstance(setting, (list, tuple)) else {}
    here = dict(flat(run.recipe))
    return ", ".join(
        f"{key} {value} there, {here.get(key, 'not written')} here"
        for key, value in there.items()
        if here.get(key) != value
    )


def _traces(
    run: Run, curve: Sequence[Point], place: int, *, named: bool
) -> Iterator[dict[str, Any]]:
    line, marker = {"color": color(place), "width": 1.2}, {"symbol": symbol(place), "size": 10}
    evaluations = [each for each in run.history.evaluations if each.top1 is not None]
    points = [each for each in curve if each.top1 is not None]
    about = {
        "legendgroup": plain(run.rule),
        "hovertemplate": f"%{{y:.2f}} % after %{{x:.3g}} epochs<extra>{plain(run.name)}</extra>",
    }
    if points:
        about |= {"mode": "lines", "opacity": 0.75, "showlegend": named and not evaluations}
        yield scatter(run.rule, *_curve(run, points), line=line, **about)
    if evaluations:
        line = line | {"width": 2, "dash": "dot"}
        about |= {"mode": "lines+markers", "opacity": 1, "showlegend": named}
        yield scatter(run.rule, *_curve(run, evaluations), line=line, marker=marker, **about)


def _curve(run: Run, points: Sequence[Point]) -> tuple[list[float], list[float]]:
    epochs = [_epochs(run, each.step) for each in points]
    return epochs, [100 * (each.top1 or 0.0) for each in points]


def _epochs(run: Run, step: int) -> float:
    return step / run.steps_per_epoch if run.steps_per_epoch else float(step)


def _height_at(run: Run, step: int) -> float:
    """The last top-1 in percent up to a step; the first one if it is later, 0 if there is none."""
    points = [each for each in run.history.curve if each.top1 is not None]
    before = [each for each in points if each.step <= step]
    return 100 * ((before[-1:] or points[:1])[0].top1 or 0.0) if points else 0.0
