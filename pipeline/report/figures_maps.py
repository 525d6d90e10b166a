"""Heat maps of a group: how often neurons fire, and how near each rule's gradient is to BPTT's."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.core.units import counted
from pipeline.report.differences import written
from pipeline.report.figure import Figure, Missing, Table, Theme, base_layout, plain
from pipeline.report.study import Group, StudyRun

_ROW = 24  # pixels of a layer
_FIGURES_FIT = 8  # columns on a phone with a number in each cell


def firing_rates(group: Group) -> Figure | Missing:
    """Layer x time, a map for each rule: the mean over its runs, of the last evaluation."""
    title = "Firing rate by layer and time step"
    of_rule = {rule: layers for rule in group.rules if (layers := _rates(group.of(rule)))}
    if not of_rule:
        return Missing(title=title, why="no run has finished whose spikes were counted")
    most = max(rate for layers in of_rule.values() for rates in layers.values() for rate in rates)
    steps = max(len(rates) for layers in of_rule.values() for rates in layers.values())

    def draw(theme: Theme) -> go.Figure:
        figure = _stacked(of_rule, [plain(rule) for rule in of_rule])
        for row, layers in enumerate(of_rule.values(), start=1):
            z = [list(rates) for rates in layers.values()]
            x = [f"{t}" for t in range(1, steps + 1)]
            figure.add_trace(
                _map(
                    z,
                    x=x,
                    y=list(layers),
                    theme=theme,
                    most=max(most, 1e-9),
                    written=".1%",
                    bar=row == 1,
                ),
                row,
                1,
            )
        figure.update_xaxes(title_text="time step", row=len(of_rule), col=1)
        return _laid_out(figure, theme, height)

    height = _height(of_rule)
    rows = []
    for rule, layers in of_rule.items():
        shares = _shares(group.of(rule))
        rows += [
            (rule, layer, t + 1, rate, *shares[layer])
            for layer, rates in layers.items()
            for t, rate in enumerate(rates)
        ]
    means = {
        rule: statistics.fmean(statistics.fmean(rates) for rates in layers.values())
        for rule, layers in of_rule.items()
    }
    said = ", ".join(f"{rule} {mean:.1%}" for rule, mean in means.items())
    samples = sorted(
        {layer.samples for rule in of_rule for run in group.of(rule) for layer in run.activity}
    )
    counted = " or ".join(f"{count:,}" for count in samples)
    unlike = ", on fewer samples more of them" if len(samples) > 1 else ""
    return Figure(
        name="firing-rates",
        title=title,
        caption=(
            f"Spikes per neuron and time step, the mean over runs, counted on {counted} samples"
            " drawn from the last evaluation; on these, silent neurons never fired and saturated"
            f" ones always did (in the table){unlike}."
        ),
        alt=f"Mean firing rate over layers: {said}.",
        table=Table(
            columns=("rule", "layer", "time step", "firing rate", "silent", "saturated"),
            rows=tuple(rows),
        ),
        draw=draw,
        height=height,
    )


def gradient_fidelity(group: Group) -> Figure | Missing:
    """Layer x rule: the cosine of a rule's gradient with BPTT's where it was last compared."""
    title = "Gradient fidelity: cosine with BPTT's gradient"
    of_rule = {rule: cosines for rule in group.rules if (cosines := _cosines(group, rule))}
    if not of_rule:
        why = "no run compared its gradient with BPTT's; --set evaluation.fidelity_every=1 does after each epoch"
        return Missing(
            title=title,
            why=_told_later(run for run in group.runs if run.rule != group.against) or why,
        )
    layers = list(dict.fromkeys(layer for cosines in of_rule.values() for layer in cosines))
    rows = [(layer, rule, of_rule[rule].get(layer)) for layer in layers for rule in of_rule]
    known = [(value, layer, rule) for layer, rule, value in rows if value is not None]
    least = min([0.0, *(value for value, _, _ in known)])

    def draw(theme: Theme) -> go.Figure:
        z = [[cosines.get(layer) for cosines in of_rule.values()] for layer in layers]
        x = [plain(rule) for rule in of_rule]
        figure = go.Figure(
            _map(z, x=x, y=layers, theme=theme, least=least, most=1.0, written=".2f", bar=True)
        )
        return _laid_out(figure, theme, height)

    height = 130 + _ROW * len(layers)
    said = (
        "none is known" if not known else "the lowest is {0:.2f}, of {2} in {1}".format(*min(known))
    )
    away = ", below 0: away from it" if least < 0 else ""
    return Figure(
        name="gradient-fidelity",
        title=title,
        caption=(
            f"1: the same direction as BPTT's gradient, 0: at a right angle{away}; on one batch, at"
            " the weights of the newest comparison, the mean over runs; a rule that draws its time"
            " steps is drawn once in each."
        ),
        alt=(
            f"Cosines of {counted(len(of_rule), 'rule')} in {counted(len(layers), 'layer')}:"
            f" {said}."
        ),
        table=Table(columns=("layer", "rule", "cosine"), rows=tuple(rows)),
        draw=draw,
        height=height,
    )


def temporal_share(group: Group) -> Figure | Missing:
    """Layer x epoch: the share of BPTT's gradient that comes through time, which SLTT drops."""
    title = "Temporal share of BPTT's gradient"
    looked = [run for run in group.runs if any(each.temporal_share for each in run.fidelity)]
    if not looked:
        why = "no run compared gradients; --set evaluation.fidelity_every=1 does after each epoch"
        return Missing(title=title, why=_told_later(group.runs) or why)
    run = next(
        (run for run in looked if run.rule == "SLTT"), looked[0]
    )  # whose weights came of dropping it
    layers = list(dict.fromkeys(layer for each in run.fidelity for layer in each.temporal_share))
    times = ["start" if each.epoch is None else f"epoch {each.epoch + 1}" for each in run.fidelity]
    rows = [
        (layer, time, each.temporal_share.get(layer))
        for layer in layers
        for time, each in zip(times, run.fidelity, strict=True)
    ]

    def draw(theme: Theme) -> go.Figure:
        z = [[each.temporal_share.get(layer) for each in run.fidelity] for layer in layers]
        most = max([1.0, *(value for row in z for value in row if value is not None)])
        figure = go.Figure(
            _map(z, x=times, y=layers, theme=theme, most=most, written=".2f", bar=True)
        )
        return _laid_out(figure, theme, height)

    height = 130 + _ROW * len(layers)
    known = [
        (value, layer) for layer, time, value in rows if time == times[-1] and value is not None
    ]
    said = "nothing is known" if not known else "it is largest in {1}, {0:.2f}".format(*max(known))
    return Figure(
        name="temporal-share",
        title=title,
        caption=(
            "|g_BPTT - g_SLTT| / |g_BPTT| of each layer's weights on one batch, in the run"
            f" {run.name}."
        ),
        alt=(
            f"In {counted(len(layers), 'layer')} at {counted(len(times), 'moment')}; at the last,"
            f" {times[-1]}, {said}."
        ),
        table=Table(columns=("layer", "moment", "temporal share"), rows=tuple(rows)),
        draw=draw,
        height=height,
    )


def _rates(runs: Sequence[StudyRun]) -> dict[str, tuple[float, ...]]:
    """By layer at each time step, the mean over runs."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for run in runs:
        for layer in run.activity:
            found.setdefault(layer.name, []).append(layer.rates)
    return {
        name: tuple(map(statistics.fmean, zip(*rates, strict=True)))
        for name, rates in found.items()
    }


def _shares(runs: Sequence[StudyRun]) -> dict[str, tuple[float, float]]:
    """Of silent and of saturated neurons by layer, the mean over runs."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        for layer in run.activity:
            found.setdefault(layer.name, []).append((layer.silent, layer.saturated))
    return {
        name: (statistics.fmean(s for s, _ in pairs), statistics.fmean(s for _, s in pairs))
        for name, pairs in found.items()
    }


def _told_later(runs: Iterable[StudyRun]) -> str:
    """Of runs that told of no comparison: which of them compare gradients by their recipes; empty
    where none does.
    """
    looking = [
        run.name
        for run in runs
        if str(written(run.recipe, "evaluation.fidelity_every") or 0) != "0"
    ]
    return f"not told yet by {', '.join(looking)}" if looking else ""


def _cosines(group: Group, rule: str) -> dict[str, float | None]:
    """Of a rule's own runs, at the newest comparison, the mean over runs by layer."""
    if rule == group.against:
        return {}
    found: dict[str, list[float]] = {}
    for run in group.of(rule):
        if run.fidelity:
            newest = run.fidelity[-1].cosines
            mine = newest.get(rule) or newest.get(rule.split(" (")[0]) or {}
            for layer, value in mine.items():
                found.setdefault(layer, []).extend([] if value is None else [value])
    return {layer: statistics.fmean(values) if values else None for layer, values in found.items()}


def _map(
    z: Sequence[Sequence[float | None]],
    *,
    x: Sequence[str],
    y: Sequence[str],
    theme: Theme,
    least: float = 0.0,
    most: float,
    written: str,
    bar: bool,
) -> go.Heatmap:
    """With a number in each cell where there is room, so that nobody has to judge a colour."""
    numbers = (
        {"texttemplate": f"%{{z:{written}}}", "textfont": {"size": 11}}
        if len(x) <= _FIGURES_FIT
        else {}
    )
    return go.Heatmap(
        z=z,
        x=list(x),
        y=[plain(name) for name in y],
        colorscale=[list(stop) for stop in theme.scale],
        zmin=least,
        zmax=most,
        xgap=2,
        ygap=2,
        showscale=bar,
        colorbar={
            "thickness": 10,
            "outlinewidth": 0,
            "tickformat": ".0%" if "%" in written else ".1f",
        },
        hovertemplate=f"%{{y}}, %{{x}}: %{{z:{written}}}<extra></extra>",
        **numbers,
    )


def _stacked(of_rule: Mapping[str, Mapping[str, Any]], titles: Sequence[str]) -> go.Figure:
    heights = [len(layers) for layers in of_rule.values()]
    gap = min(30 / max(1, _height(of_rule)), 0.9 / max(1, len(of_rule) - 1))
    about = {
        "subplot_titles": titles,
        "row_heights": heights,
        "vertical_spacing": gap,
        "shared_xaxes": True,
    }
    figure = make_subplots(rows=len(of_rule), cols=1, **about)
    return figure.update_annotations(x=0, xanchor="left", font={"size": 13})


def _height(of_rule: Mapping[str, Mapping[str, Any]]) -> int:
    return 90 + sum(_ROW * len(layers) + 30 for layers in of_rule.values())


def _laid_out(figure: go.Figure, theme: Theme, height: int) -> go.Figure:
    figure.update_layout(base_layout(theme, height=height, margin={"t": 30}))
    figure.update_yaxes(
        autorange="reversed", automargin=True, showgrid=False, tickfont={"size": 11}
    )
    return figure.update_xaxes(type="category", showgrid=False, automargin=True)
