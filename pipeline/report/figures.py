"""The figures of a group: costs beside the baseline and against accuracy, where the time goes, and
learning curves beside published points.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.core.units import counted, shown, unit_of
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
    symbol,
    titled,
)
from pipeline.report.history import Point
from pipeline.report.results import ENERGY, ENERGY_MEASURED, Run, compared, metric
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
    ratio_of = {pair: ratio for pair in pairs if (ratio := group.ratios(*pair))}
    if not ratio_of:
        return Missing(title=title, why=f"no rule has a seed in common with {group.against}")
    rows = [
        (rule, costs[name], group.base_of(name), ratio.mean, ratio.deviation, ratio.runs)
        for (rule, name), ratio in ratio_of.items()
    ]
    names = [name for name in costs if any((rule, name) in ratio_of for rule in rules)]

    data = list(_ratio_traces(ratio_of, rules, names))
    most = max(1.0, *(ratio.mean + (ratio.deviation or 0) for ratio in ratio_of.values()))
    dotted = {"color": INK, "width": 1, "dash": "dot"}
    line = {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "y domain", "line": dotted}
    ticks = {"tickvals": list(range(len(names))), "ticktext": [costs[name] for name in names]}
    y = {**ticks, "range": [len(names) - 0.5, -0.75], "showgrid": False, "zeroline": False}
    x = titled(f"multiple of {plain(group.against)}", range=[0, 1.3 * most])
    height = 110 + len(names) * max(52, 30 * len(rules))
    saved = {rule: ratio for (rule, name), ratio in ratio_of.items() if name == "peak_saved_bytes"}
    least = min(saved, key=lambda rule: saved[rule].mean, default="")
    faster = group.fastest_baseline
    times = (
        ""
        if faster == group.against
        else f" Times are multiples of {faster}'s, the faster {group.against}."
    )
    headline = (
        f": {least} keeps {saved[least].mean:.2f} of its saved bytes, the least" if least else ""
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
            f" {', '.join(costs[name] for name in names)}{headline}."
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


def _ratio_traces(
    ratio_of: Mapping[tuple[str, str], Spread], rules: Sequence[str], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row of markers for each rule, slightly offset from those of the others."""
    for index, rule in enumerate(rules):
        offset = 0.6 * (index / (len(rules) - 1) - 0.5) if len(rules) > 1 else 0.0
        here = [
            (place, ratio_of[rule, name])
            for place, name in enumerate(names)
            if (rule, name) in ratio_of
        ]
        yield {
            "type": "scatter",
            "name": plain(rule),
            "mode": "markers+text",
            "x": [ratio.mean for _, ratio in here],
            "y": [place + offset for place, _ in here],
            "error_x": _errors([ratio for _, ratio in here], index + 1),
            "text": [f"{ratio.mean:.2f}" for _, ratio in here],
            "textposition": "top center",
            "textfont": {"size": 12, "color": color(index + 1)},
            "marker": {"color": color(index + 1), "symbol": symbol(index + 1), "size": 10},
            "hovertemplate": "%{x:.3f}<extra>" + plain(rule) + "</extra>",
        }


def trade_off(group: Group, name: str) -> Figure | Missing:
    """Accuracy against a cost. Rules on the Pareto front are marked."""
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

    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "name": "Pareto front",
            "mode": "lines",
            "x": [points[rule][0].mean / scale for rule in front],
            "y": [100 * points[rule][1].mean for rule in front],
            "line": {"color": MUTED, "width": 1.5, "dash": "dash", "shape": "hv"},
            "hoverinfo": "skip",
        }
    ]
    for rule, spreads in points.items():
        place = group.rules.index(rule)
        shape = symbol(place) if rule in front else f"{symbol(place)}-open"
        data.append(_marker(rule, *spreads, place=place, shape=shape, scale=scale, unit=unit))
    x = titled(f"{what}, {unit}", rangemode="tozero")
    table = _trade_off_table(group, name, points, front)
    if name == ENERGY:
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
        + _describe_diverged(group),
        alt=(
            f"On the Pareto front of accuracy and {what}, of {len(points)} rules:"
            f" {', '.join(front)}."
        ),
        table=table,
        drawing=drawing(data, height=380, xaxis=x, yaxis=titled("top-1, %")),
    )


def _trade_off_table(
    group: Group, name: str, points: Mapping[str, tuple[Spread, Spread]], front: Sequence[str]
) -> Table:
    cost_of = metric(name)
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
        f"{cost_of.title}, {_UNITS.get(cost_of.unit, cost_of.unit)}",
        "its deviation",
        "top-1",
        "its deviation",
        "runs",
        "on the Pareto front",
    )

    if name == ENERGY:
        columns = (*columns, "measured on cards, joules", "MACs", "ACs")
        rows = [(*row, *_energy_cells(group, str(row[0]))) for row in rows]
    return Table(columns=columns, rows=tuple(rows))


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


def _energy_cells(group: Group, rule: str) -> list[float | None]:
    """Return measured joules, multiply-accumulates and accumulates per inference."""
    values = [
        group.spread(rule, name) for name in (ENERGY_MEASURED, "inference.macs", "inference.acs")
    ]
    return [None if each is None else each.mean for each in values]


def _measured_on(group: Group) -> str:
    """Explain the measured joules, or why there are none."""
    if any(run.value(ENERGY_MEASURED) is not None for run in group.finished):
        return f"Joules measured on cards are {MEASURED_SAID}"
    has_gpu = any(run.hardware.get("gpu", "none") != "none" for run in group.finished)
    return (
        "Joules are not measured: no card reports them"
        if has_gpu
        else "Joules are not measured on a CPU"
    )


def _counted_on(group: Group) -> str:
    """Name the samples behind the energy, and how the counts differ from published ones."""
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


def _describe_diverged(group: Group) -> str:
    """A sentence such as ` Diverged, and in no mean: SLTT-1 (seed 1, 2).`, or an empty text."""
    lost = {
        rule: ", ".join(map(str, sorted(seeds)))
        for rule in group.rules
        if (seeds := group.diverged(rule))
    }
    text = ", ".join(f"{rule} (seed {seeds})" for rule, seeds in lost.items())
    return f" Diverged, and in no mean: {text}." if text else ""


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names on the Pareto front (least cost, most gain), the cheapest first."""
    kept = [
        name
        for name, (cost, gain) in points.items()
        if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points.values())
    ]
    return sorted(kept, key=lambda name: points[name])


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
    layout: dict[str, Any] = {
        "barmode": "stack",
        "bargap": 0.35,
        "legend": {"traceorder": "normal"},
        "xaxis": titled("ms of a batch"),
        "yaxis": {"autorange": "reversed", "showgrid": False},
    }
    rows = [
        (rule, name, None if pd.isna(value) else value, shares.at[name, rule])
        for rule in seconds
        for name, value in seconds[rule].items()
    ]
    slowest = totals.idxmax()
    most: Any = seconds[slowest].idxmax()
    alone = (
        "; of a rule without one, of its batches alone" if set(seconds) - set(group.rules) else ""
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
            f"{slowest} takes longest with {shown(totals[slowest], kind='s')} a batch, of which"
            f" {most.replace('_', ' ')} is {shares.at[most, slowest]:.0%}."
        ),
        table=Table(columns=("rule", "part", "seconds of a batch", "share"), rows=tuple(rows)),
        drawing=drawing(data, height=170 + 42 * len(seconds.columns), **layout),
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


def learning_curves(group: Group) -> Figure | Missing:
    """Accuracy in training and on the evaluation set by epoch, for each run, with restarts."""
    title = "Learning curves"
    if not any(run.history.curve or run.history.evaluations for run in group.runs):
        return Missing(title=title, why="no run has written a step yet")
    curves = [thinned(run.history.curve) for run in group.runs]
    logs = _logs(group.runs)
    restarts = [(run, each) for run in group.runs for each in run.history.restarts]

    data: list[dict[str, Any]] = []
    named: set[str] = set()  # the legend names a rule once, at its first run with a trace
    for run, curve in zip(group.runs, curves, strict=True):
        for trace in _traces(run, curve, group.rules.index(run.rule), named=run.rule not in named):
            data.append(trace)
            named.add(run.rule)
    if restarts:
        data.append(
            {
                "type": "scatter",
                "name": "restart",
                "mode": "markers",
                "x": [_epochs(run, each.step) for run, each in restarts],
                "y": [_height_at(run, each.step) for run, each in restarts],
                "marker": {"symbol": "x-thin", "size": 13, "line": {"width": 2.5, "color": INK}},
                "hovertemplate": "started again after %{x:.4g} epochs<extra></extra>",
            }
        )
    data += [
        {
            "type": "scatter",
            "name": plain(f"published, {', '.join(rules)}"),
            "mode": "lines+markers",
            "x": [epoch for epoch, _ in points],
            "y": [100 * top1 for _, top1 in points],
            "line": {"color": color(group.rules.index(rules[0])), "dash": "dashdot"},
            "marker": {"symbol": "star", "size": 9},
        }
        for points, rules in logs.items()
    ]
    rows: list[tuple[Cell, ...]] = [
        ("published", ", ".join(rules), "", "published", None, epoch, None, top1, None)
        for points, rules in logs.items()
        for epoch, top1 in points
    ]
    rows += [
        row for run, curve in zip(group.runs, curves, strict=True) for row in _rows(run, curve)
    ]
    beside = "; ".join(standings(group)) or "no recipe carries published points"
    accuracy = f"Accuracy of {counted(len(group.runs), 'run')} by epoch"
    x = titled("epochs", rangemode="tozero")
    columns = ("run", "rule", "seed", "what", "step", "epochs", "seconds", "top-1", "loss")
    return Figure(
        name="learning-curves",
        title=title,
        caption=" ".join(_captions(group, len(restarts), has_logs=bool(logs))),
        alt=f"{accuracy}, with {counted(len(restarts), 'restart')}; {beside}.",
        table=Table(columns=columns, rows=tuple(rows)),
        drawing=drawing(data, height=420, xaxis=x, yaxis=titled("top-1, %")),
    )


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
    is_list = isinstance(points, (list, tuple))
    return tuple((int(epoch), float(top1)) for epoch, top1 in points) if is_list else ()


def thinned(curve: Sequence[Point]) -> list[Point]:
    """Thin a curve to at most 300 points, each the mean over the batches since the point before."""
    size = math.ceil(len(curve) / _MOST)
    if size <= 1:
        return list(curve)
    starts = range(0, len(curve), size)
    return [_mean(curve[at : at + size], after=curve[at - 1].step if at else 0) for at in starts]


def _captions(group: Group, restarts: int, *, has_logs: bool) -> Iterator[str]:
    yield (
        "Lines: training batches, each point the mean since the one before; markers: the "
        f"evaluation set. Crosses: restarts ({restarts})."
    )
    if has_logs:
        yield "Stars: the published log that recipes of a rule carry."
        others = sorted({other for run in group.runs if (other := _other_setting(run))})
        yield from (f"Of another setting than the run's: {other}." for other in others)
    if any(len(run.history.curve) > _MOST for run in group.runs):
        yield (
            f"A curve of more than {_MOST} points is shown in {_MOST} means at most, here and in"
            " the CSV."
        )
    if any(run.curve_every > 1 for run in group.runs):
        yield "Of a long journal not every point is read: what is left out is in no mean."
    if any(run.history.again_from is not None for run in group.runs):
        yield (
            "Beyond its last cross a running run shows its earlier batches until it has repeated"
            " them."
        )


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


def _logs(runs: Sequence[Run]) -> dict[tuple[tuple[int, float], ...], list[str]]:
    """Return each published log with the rules whose recipes carry it.

    Runs of one study may carry different logs.
    """
    logs: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for run in runs:
        if (points := published(run)) and run.rule not in logs.setdefault(points, []):
            logs[points].append(run.rule)
    return logs


def _traces(
    run: Run, curve: Sequence[Point], place: int, *, named: bool
) -> Iterator[dict[str, Any]]:
    evaluations = [each for each in run.history.evaluations if each.top1 is not None]
    points = [each for each in curve if each.top1 is not None]
    line = {"color": color(place), "width": 1.2}
    if points:
        yield _scatter(
            run, points, named=named and not evaluations, mode="lines", line=line, opacity=0.75
        )
    if evaluations:
        line |= {"width": 2, "dash": "dot"}
        marker = {"symbol": symbol(place), "size": 10}
        yield _scatter(
            run, evaluations, named=named, mode="lines+markers", line=line, marker=marker
        )


def _scatter(run: Run, points: Sequence[Point], *, named: bool, **about: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": plain(run.rule),
        "legendgroup": plain(run.rule),
        "showlegend": named,
        "x": [_epochs(run, each.step) for each in points],
        "y": [100 * (each.top1 or 0.0) for each in points],
        "hovertemplate": f"%{{y:.2f}} % after %{{x:.3g}} epochs<extra>{plain(run.name)}</extra>",
        **about,
    }


def _rows(run: Run, curve: Sequence[Point]) -> Iterator[tuple[Cell, ...]]:
    kinds = {
        "training": curve,
        "evaluation": run.history.evaluations,
        "restart": run.history.restarts,
    }
    for what, points in kinds.items():
        for each in points:
            epochs = _epochs(run, each.step)
            yield (
                run.name,
                run.rule,
                run.seed,
                what,
                each.step,
                epochs,
                each.seconds,
                each.top1,
                each.loss,
            )


def _mean(points: Sequence[Point], *, after: int) -> Point:
    """Return the mean of the points after batch `after`; None where no point has a value."""
    steps = [after, *(each.step for each in points)]
    batches = [max(1, end - begin) for begin, end in itertools.pairwise(steps)]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [
            (value, count)
            for value, count in zip(values, batches, strict=True)
            if value is not None
        ]
        total = sum(count for _, count in known)
        return sum(value * count for value, count in known) / total if known else None

    top1, loss = mean([each.top1 for each in points]), mean([each.loss for each in points])
    return points[-1]._replace(top1=top1, loss=loss)


def _epochs(run: Run, step: int) -> float:
    return step / run.steps_per_epoch if run.steps_per_epoch else float(step)


def _height_at(run: Run, step: int) -> float:
    """Return the curve's value at the last point at or before a step, to place a mark on it."""
    known = [each for each in run.history.curve if each.top1 is not None]
    before = [each.top1 for each in known if each.step <= step]
    of_nothing = known[0].top1 if known else 0.0
    return 100 * (before[-1] if before else of_nothing)  # type: ignore[operator]
