"""Learning curves of a group, with restarts, beside the published points that recipes carry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.core.units import counted
from pipeline.recipe.json import flat
from pipeline.report.figure import (
    INK,
    Cell,
    Figure,
    Missing,
    Table,
    color,
    drawing,
    plain,
    symbol,
    titled,
)
from pipeline.report.history import Point
from pipeline.report.results import Run
from pipeline.report.study import Group

ON_TRACK = 1.0  # points of accuracy below the published run that still count as on track
_MOST = 300  # points of a curve: a run of ImageNet has some hundred thousand


def learning_curves(group: Group) -> Figure | Missing:
    """Accuracy in training and on the evaluation set by epoch, for each run, with restarts."""
    title = "Learning curves"
    if not any(run.history.curve or run.history.evaluations for run in group.runs):
        return Missing(title=title, why="no run has written a step yet")
    curves = [thinned(run.history.curve) for run in group.runs]
    logs = _logs(group.runs)
    restarts = [(run, each) for run in group.runs for each in run.history.restarts]

    data: list[dict[str, Any]] = []
    named: set[str] = set()  # a rule is in the legend once, by its first run with a trace
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
    """How each run that carries published points stands at the last epoch that both have."""
    return [f"{run.name}: {standing(run)}" for run in group.runs if published(run)]


def standing(run: Run) -> str:
    """`on track` or `4.0 points below the published run at epoch 4`.

    Between published points nothing is judged, nor a run of another setting than the log's.
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
    """A curve of at most 300 points, each the mean over the batches since the point before."""
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
    """Where a run differs from the published setting: `time_steps 4 there, 2 here`; else empty."""
    setting = run.recipe.get("published_setting")
    there = dict(flat(dict(setting))) if isinstance(setting, (list, tuple)) else {}
    here = dict(flat(run.recipe))
    return ", ".join(
        f"{key} {value} there, {here.get(key, 'not written')} here"
        for key, value in there.items()
        if here.get(key) != value
    )


def _logs(runs: Sequence[Run]) -> dict[tuple[tuple[int, float], ...], list[str]]:
    """Each published log, and the rules whose recipes carry it: runs of a study may differ in
    it.
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
    """At the last of the points, which follow batch `after`; None for what none of them has."""
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
    """The curve at the last point at or before a step, for a mark upon it."""
    known = [each for each in run.history.curve if each.top1 is not None]
    before = [each.top1 for each in known if each.step <= step]
    return 100 * (before[-1] if before else known[0].top1 if known else 0.0)  # type: ignore[operator]
