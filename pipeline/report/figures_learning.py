"""Learning curves of a group with its restarts, and how they stand beside points that a recipe
carries from a publication.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go

from pipeline.core.units import counted
from pipeline.recipe.json import flat
from pipeline.report.figure import (
    Cell,
    Figure,
    Missing,
    Table,
    Theme,
    base_layout,
    color,
    plain,
    symbol,
)
from pipeline.report.history import TrainPoint
from pipeline.report.study import Group, StudyRun

ON_TRACK = 1.0
"""points of accuracy below the published run that still count as on track"""
_TOLD = 300  # points of a curve: a run of ImageNet has some hundred thousand


def learning_curves(group: Group) -> Figure | Missing:
    """Accuracy in training and on the evaluation set by epoch, for each run; a cross where a run
    was started again.
    """
    title = "Learning curves"
    if not any(run.curve or run.evaluations for run in group.runs):
        return Missing(title=title, why="no run has told a step yet")
    runs = [replace(run, curve=_told(run.curve)) for run in group.runs]
    logs = _logs(runs)

    def draw(theme: Theme) -> go.Figure:
        figure = go.Figure()
        named: set[str] = set()  # a rule stands in the legend once, by its first run with a trace
        for run in runs:
            for trace in _traces(
                run, theme, group.rules.index(run.rule), named=run.rule not in named
            ):
                figure.add_trace(trace)
                named.add(run.rule)
        restarts = [(run, each) for run in runs for each in run.restarts]
        if restarts:
            figure.add_trace(
                go.Scatter(
                    name="restart",
                    mode="markers",
                    x=[_epochs(run, each.step) for run, each in restarts],
                    y=[_height_at(run, each.step) for run, each in restarts],
                    marker={
                        "symbol": "x-thin",
                        "size": 13,
                        "line": {"width": 2.5, "color": theme.ink},
                    },
                    hovertemplate="started again after %{x:.4g} epochs<extra></extra>",
                )
            )
        for points, rules in logs.items():
            figure.add_trace(
                go.Scatter(
                    name=plain(f"published, {', '.join(rules)}"),
                    mode="lines+markers",
                    x=[epoch for epoch, _ in points],
                    y=[100 * top1 for _, top1 in points],
                    line={"color": color(theme, group.rules.index(rules[0])), "dash": "dashdot"},
                    marker={"symbol": "star", "size": 9},
                )
            )
        x, y = {"title": {"text": "epochs"}, "rangemode": "tozero"}, {"title": {"text": "top-1, %"}}
        return figure.update_layout(base_layout(theme, height=420, xaxis=x, yaxis=y))

    columns = ("run", "rule", "seed", "what", "step", "epochs", "seconds", "top-1", "loss")
    rows: list[tuple[Cell, ...]] = [
        ("published", ", ".join(rules), "", "published", None, epoch, None, top1, None)
        for points, rules in logs.items()
        for epoch, top1 in points
    ]
    rows += [row for run in runs for row in _rows(run)]
    restarts = sum(len(run.restarts) for run in group.runs)
    said = "; ".join(standings(group)) or "no recipe carries published points"
    captions = [
        "Lines: training batches, each point the mean since the one before; markers: the"
        f" evaluation set. Crosses: restarts ({restarts})."
    ]
    if logs:
        captions.append("Stars: the published log that recipes of a rule carry.")
        captions += [
            f"Of another setting than the run's: {other}."
            for other in sorted(set(map(_other_setting, runs)) - {""})
        ]
    if any(len(run.curve) > _TOLD for run in group.runs):
        captions.append(
            f"A curve of more than {_TOLD} points is told in {_TOLD} means at most, here and in the"
            " CSV."
        )
    if any(run.every > 1 for run in group.runs):
        captions.append(
            "Of a long journal not every point is read: what is left out is in no mean."
        )
    if any(run.again_from is not None for run in group.runs):
        captions.append(
            "Beyond its last cross a run that goes on shows what it had done before, until it has"
            " done that again."
        )
    return Figure(
        name="learning-curves",
        title=title,
        caption=" ".join(captions),
        alt=(
            f"Accuracy of {counted(len(group.runs), 'run')} by epoch, with"
            f" {counted(restarts, 'restart')}; {said}."
        ),
        table=Table(columns=columns, rows=tuple(rows)),
        draw=draw,
        height=420,
    )


def standings(group: Group) -> list[str]:
    """How each run that carries published points stands at the last epoch that both have."""
    return [f"{run.name}: {standing(run)}" for run in group.runs if published(run)]


def standing(run: StudyRun) -> str:
    """ "on track" or "4.0 points below the published run at epoch 4"; nothing is said between
    published points.

    A run of another setting than the log's is not judged.
    """
    if other := _other_setting(run):
        return f"not judged by the published log, which is of another setting: {other}"
    target = dict(published(run))
    both = [
        each
        for each in run.evaluations
        if each.epoch is not None and each.epoch + 1 in target and each.top1 is not None
    ]
    if not both:
        return "no evaluation yet at an epoch that is published"
    last = both[-1]
    assert last.epoch is not None and last.top1 is not None
    below = 100 * (target[last.epoch + 1] - last.top1)
    told = f"the published run at epoch {last.epoch + 1}"
    if below > ON_TRACK:
        return f"{below:.1f} points below {told}"
    return f"on track, {abs(below):.1f} points {'below' if below > 0 else 'above'} {told}"


def published(run: StudyRun) -> tuple[tuple[int, float], ...]:
    """Epochs done and top-1 in 0..1 of the published log that its recipe carries; empty where it
    carries none.
    """
    points = run.recipe.get("published")
    return (
        tuple((int(epoch), float(top1)) for epoch, top1 in points)
        if isinstance(points, (list, tuple))
        else ()
    )


def _other_setting(run: StudyRun) -> str:
    """Where a run differs from the setting of the published log, "time_steps 4 there, 2 here"; ""
    where it does not.
    """
    setting = run.recipe.get("published_setting")
    there = dict(flat(dict(setting))) if isinstance(setting, (list, tuple)) else {}
    here = dict(flat(run.recipe))
    return ", ".join(
        f"{key} {value} there, {here.get(key, 'not written')} here"
        for key, value in there.items()
        if here.get(key) != value
    )


def _logs(runs: Sequence[StudyRun]) -> dict[tuple[tuple[int, float], ...], list[str]]:
    """Each published log, and the rules whose recipes carry it: it is no part of what makes runs a
    study.
    """
    logs: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for run in runs:
        if points := published(run):
            rules = logs.setdefault(points, [])
            rules += [] if run.rule in rules else [run.rule]
    return logs


def _traces(run: StudyRun, theme: Theme, place: int, *, named: bool) -> Iterator[Any]:
    about = {"name": plain(run.rule), "legendgroup": plain(run.rule)}
    hover = f"%{{y:.2f}} % after %{{x:.3g}} epochs<extra>{plain(run.name)}</extra>"
    points = [point for point in run.curve if point.top1 is not None]
    evaluations = [each for each in run.evaluations if each.top1 is not None]
    if points:
        yield go.Scatter(
            mode="lines",
            x=[_epochs(run, point.step) for point in points],
            y=[100 * (point.top1 or 0.0) for point in points],
            line={"color": color(theme, place), "width": 1.2},
            opacity=0.75,
            showlegend=named and not evaluations,
            hovertemplate=hover,
            **about,
        )
    if evaluations:
        yield go.Scatter(
            mode="lines+markers",
            x=[_epochs(run, each.step) for each in evaluations],
            y=[100 * (each.top1 or 0.0) for each in evaluations],
            line={"color": color(theme, place), "width": 2, "dash": "dot"},
            marker={"symbol": symbol(place), "size": 10},
            showlegend=named,
            hovertemplate=hover,
            **about,
        )


def _rows(run: StudyRun) -> Iterator[tuple[Cell, ...]]:
    about = (run.name, run.rule, run.seed)
    for point in run.curve:
        yield (
            *about,
            "training",
            point.step,
            _epochs(run, point.step),
            point.seconds,
            point.top1,
            point.loss,
        )
    for each in run.evaluations:
        yield (
            *about,
            "evaluation",
            each.step,
            _epochs(run, each.step),
            each.seconds,
            each.top1,
            each.loss,
        )
    for each in run.restarts:
        yield (*about, "restart", each.step, _epochs(run, each.step), each.seconds, None, None)


def _told(curve: tuple[TrainPoint, ...]) -> tuple[TrainPoint, ...]:
    """At most so many points, each the mean over the batches since the one before, as those of a
    journal are.
    """
    size = math.ceil(len(curve) / _TOLD)
    if size <= 1:
        return curve
    return tuple(
        _mean(curve[at : at + size], after=curve[at - 1].step if at else 0)
        for at in range(0, len(curve), size)
    )


def _mean(points: Sequence[TrainPoint], *, after: int) -> TrainPoint:
    """Of those that follow batch `after`, where the last of them stands; None for what none of them
    told.
    """
    befores = (after, *(point.step for point in points[:-1]))
    means: dict[str, float | None] = {"loss": None, "top1": None, "images_per_s": None}
    for name in ("loss", "top1"):
        told = [
            (value, max(1, point.step - before))
            for before, point in zip(befores, points, strict=True)
            if (value := getattr(point, name)) is not None
        ]
        if told:
            means[name] = sum(value * batches for value, batches in told) / sum(
                batches for _, batches in told
            )
    return replace(points[-1], **means)


def _epochs(run: StudyRun, step: int) -> float:
    return step / run.steps_per_epoch if run.steps_per_epoch else float(step)


def _height_at(run: StudyRun, step: int) -> float:
    """Of the last point at or before a step, for a mark upon the curve."""
    before = [point.top1 for point in run.curve if point.step <= step and point.top1 is not None]
    after = [point.top1 for point in run.curve if point.top1 is not None]
    return 100 * (before[-1] if before else after[0] if after else 0.0)
