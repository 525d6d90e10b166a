"""Heat maps of a group: firing rates, and each rule's gradient beside BPTT's."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.core.units import counted
from pipeline.report.drawing import SCALE, Figure, Missing, Table, drawing, plain, titled
from pipeline.report.results import Run
from pipeline.report.selection import recipe_value
from pipeline.report.study import Group

_ROW = 24  # height of a layer in pixels
_CATEGORIES = {"type": "category", "showgrid": False, "automargin": True}
_DOWNWARDS = {
    "autorange": "reversed",
    "automargin": True,
    "showgrid": False,
    "tickfont": {"size": 11},
}
_FIGURES_FIT = 8  # the most columns with a number in each cell on a phone


def firing_rates(group: Group) -> Figure | Missing:
    """Layer x time, one map per rule: the mean over its runs in the last evaluation."""
    title = "Firing rate by layer and time step"
    found = [
        (run.rule, layer["name"], step, rate, layer["silent"], layer["saturated"])
        for run in group.runs
        for layer in run.activity
        for step, rate in enumerate(layer["rates"], start=1)
    ]
    if not found:
        return Missing(title=title, why="no run has finished whose spikes were counted")
    columns = ("rule", "layer", "time step", "firing rate", "silent", "saturated")
    keys = [*columns[:3]]
    means: Any = pd.DataFrame(found, columns=[*columns]).groupby(keys, sort=False).mean()
    rates = means["firing rate"]
    rules = [rule for rule in group.rules if rule in rates.index.levels[0]]
    of_rule = {rule: rates[rule].unstack().reindex(rates[rule].index.unique(0)) for rule in rules}
    samples = sorted({layer["samples"] for run in group.runs for layer in run.activity})
    unlike = ", on fewer samples more of them" if len(samples) > 1 else ""
    averages = ", ".join(
        f"{rule} {layers.mean(axis=1).mean():.1%}" for rule, layers in of_rule.items()
    )
    return Figure(
        name="firing-rates",
        title=title,
        caption=(
            "Spikes per neuron and time step, the mean over runs, counted on"
            f" {' or '.join(f'{count:,}' for count in samples)} samples"
            " drawn from the last evaluation; on these, silent neurons never fired and saturated"
            f" ones always did (in the table){unlike}."
        ),
        alt=f"Mean firing rate over layers: {averages}.",
        table=Table(
            columns=columns, rows=tuple(means.reset_index().itertuples(index=False, name=None))
        ),
        drawing=_stacked(of_rule, most=max(float(rates.max()), 1e-9)),
    )


def gradient_fidelity(group: Group) -> Figure | Missing:
    """Layer x rule: the cosine of a rule's gradient with BPTT's at the newest comparison."""
    title = "Gradient fidelity: cosine with BPTT's gradient"
    of_rule = [(rule, cosines) for rule in group.rules if (cosines := _cosines(group, rule))]
    if not of_rule:
        why = (
            "no run compared its gradient with BPTT's; --set evaluation.fidelity_every=1 does"
            " after each epoch"
        )
        others = [run for run in group.runs if run.rule != group.against]
        return Missing(title=title, why=_describe_pending(others) or why)
    rows, drawn = _by_layer(of_rule)
    known = [(value, rule, layer) for layer, rule, value in rows if value is not None]
    summary, away = "none is known", ""
    if known:
        least, rule, layer = min(known)
        summary = f"the lowest is {least:.2f}, of {rule} in {layer}"
        away = ", below 0: away from it" if least < 0 else ""
    layers = len({layer for layer, _, _ in rows})
    return Figure(
        name="gradient-fidelity",
        title=title,
        caption=(
            f"1: the same direction as BPTT's gradient, 0: at a right angle{away}; on one batch, at"
            " the weights of the newest comparison, the mean over runs; a rule that draws its time"
            " steps is drawn once in each."
        ),
        alt=f"Cosines of {counted(len(of_rule), 'rule')} in {counted(layers, 'layer')}: {summary}.",
        table=Table(columns=("layer", "rule", "cosine"), rows=rows),
        drawing=drawn,
    )


def temporal_share(group: Group) -> Figure | Missing:
    """Layer x epoch: the share of BPTT's gradient that flows through time, which SLTT drops."""
    title = "Temporal share of BPTT's gradient"
    looked = [
        run for run in group.runs if any(each.temporal_share for each in run.history.fidelity)
    ]
    if not looked:
        why = "no run compared gradients; --set evaluation.fidelity_every=1 does after each epoch"
        return Missing(title=title, why=_describe_pending(group.runs) or why)
    run = next((run for run in looked if run.rule == "SLTT"), looked[0])
    moments = [
        ("start" if each.epoch is None else f"epoch {each.epoch + 1}", each.temporal_share)
        for each in run.history.fidelity
    ]
    rows, drawn = _by_layer(moments)
    last, shares = moments[-1]
    known = [(value, layer) for layer, value in shares.items() if value is not None]
    summary = "it is largest in {1}, {0:.2f}".format(*max(known)) if known else "nothing is known"
    layers = len({layer for layer, _, _ in rows})
    return Figure(
        name="temporal-share",
        title=title,
        caption=(
            "|g_BPTT - g_SLTT| / |g_BPTT| of each layer's weights on one batch, in the run"
            f" {run.name}."
        ),
        alt=(
            f"In {counted(layers, 'layer')} at {counted(len(moments), 'moment')}; at the last,"
            f" {last}, {summary}."
        ),
        table=Table(columns=("layer", "moment", "temporal share"), rows=rows),
        drawing=drawn,
    )


def _by_layer(
    columns: Sequence[tuple[str, Mapping[str, float | None]]],
) -> tuple[tuple[tuple[str, str, float | None], ...], dict[str, Any]]:
    """The rows and the map of values by layer; each column has a name."""
    layers = list(dict.fromkeys(layer for _, values in columns for layer in values))
    rows = tuple((layer, name, of.get(layer)) for layer in layers for name, of in columns)
    known = [value for _, _, value in rows if value is not None]
    heat = _map(
        [[values.get(layer) for _, values in columns] for layer in layers],
        x=[plain(name) for name, _ in columns],
        y=layers,
        least=min([0.0, *known]),
        most=max([1.0, *known]),
        number_format=".2f",
    )
    height = 130 + _ROW * len(layers)
    return rows, drawing(
        [heat], height=height, margin={"t": 30}, xaxis=_CATEGORIES, yaxis=_DOWNWARDS
    )


def _describe_pending(runs: Iterable[Run]) -> str:
    looking = [
        run.name
        for run in runs
        if str(recipe_value(run.recipe, "evaluation.fidelity_every") or 0) != "0"
    ]
    return f"not yet in {', '.join(looking)}" if looking else ""


def _cosines(group: Group, rule: str) -> dict[str, float | None]:
    if rule == group.against:
        return {}
    newest = [run.history.fidelity[-1].cosines for run in group.of(rule) if run.history.fidelity]
    found = [each.get(rule) or each.get(rule.split(" (")[0]) or {} for each in newest]
    means = pd.DataFrame(found, dtype=float).mean()
    return {str(layer): None if pd.isna(mean) else mean for layer, mean in means.items()}


def _map(
    z: Sequence[Sequence[float | None]],
    *,
    x: Sequence[str],
    y: Sequence[str],
    least: float = 0.0,
    most: float,
    number_format: str,
    **about: Any,
) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "z": z,
        "x": list(x),
        "y": [plain(name) for name in y],
        "colorscale": SCALE,
        "zmin": least,
        "zmax": most,
        "xgap": 2,
        "ygap": 2,
        "texttemplate": f"%{{z:{number_format}}}" if len(x) <= _FIGURES_FIT else "",
        "textfont": {"size": 11},
        "colorbar": {
            "thickness": 10,
            "outlinewidth": 0,
            "tickformat": ".0%" if "%" in number_format else ".1f",
        },
        "hovertemplate": f"%{{y}}, %{{x}}: %{{z:{number_format}}}<extra></extra>",
        **about,
    }


def _stacked(of_rule: Mapping[str, Any], *, most: float) -> dict[str, Any]:
    """A map for each rule, one below another, over one axis of time steps."""
    rows = [len(layers) for layers in of_rule.values()]
    height = 90 + sum(_ROW * each + 30 for each in rows)
    gap = min(30 / height, 0.9 / max(1, len(rows) - 1))
    data, titles, layout, top = [], [], {}, 1.0
    for place, (rule, layers) in enumerate(of_rule.items(), start=1):
        suffix, is_last = "" if place == 1 else str(place), place == len(rows)
        bottom = max(0.0, top - len(layers) / sum(rows) * (1 - gap * (len(rows) - 1)))
        layout[f"yaxis{suffix}"] = {**_DOWNWARDS, "domain": [bottom, top], "anchor": f"x{suffix}"}
        layout[f"xaxis{suffix}"] = {
            **_CATEGORIES,
            "anchor": f"y{suffix}",
            "showticklabels": is_last,
            **(titled("time step") if is_last else {}),
        }
        titles.append(
            {
                "x": 0,
                "xref": "paper",
                "xanchor": "left",
                "y": top,
                "yref": "paper",
                "yanchor": "bottom",
                "text": plain(rule),
                "showarrow": False,
                "font": {"size": 13},
            }
        )
        data.append(
            _map(
                layers.to_numpy().tolist(),
                x=list(map(str, layers.columns)),
                y=list(map(str, layers.index)),
                most=most,
                number_format=".1%",
                xaxis=f"x{suffix}",
                yaxis=f"y{suffix}",
                showscale=place == 1,
            )
        )
        top = bottom - gap
    return drawing(data, height=height, margin={"t": 30}, annotations=titles, **layout)
