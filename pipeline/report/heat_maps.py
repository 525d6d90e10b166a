"""Heat maps of a group (firing rates, each rule's gradient beside BPTT's), and of a confusion."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.core.units import counted
from pipeline.report.drawing import SCALE, Figure, Missing, Table, drawing, plain, titled
from pipeline.report.results import Run
from pipeline.report.selection import recipe_value
from pipeline.report.study import Group

_ROW_HEIGHT = 24  # pixels per layer
_CATEGORIES = {"type": "category", "showgrid": False, "automargin": True}
_DOWNWARDS = {
    "autorange": "reversed",
    "automargin": True,
    "showgrid": False,
    "tickfont": {"size": 11},
}
_MAX_COLUMNS_WITH_NUMBERS = 8  # a phone has no room for the numbers of more columns


def firing_rates(group: Group) -> Figure | Missing:
    """Layer x time step, one map per rule: the mean over its runs in the last evaluation."""
    title = "Firing rate by layer and time step"
    records = [
        (run.rule, layer["name"], step, rate, layer["silent"], layer["saturated"])
        for run in group.runs
        for layer in run.activity
        for step, rate in enumerate(layer["rates"], start=1)
    ]
    if not records:
        return Missing(title=title, why="no run with counted spikes has finished")
    columns = ("rule", "layer", "time step", "firing rate", "silent", "saturated")
    means: Any = (
        pd.DataFrame(records, columns=[*columns]).groupby([*columns[:3]], sort=False).mean()
    )
    rates = means["firing rate"]
    rates_by_rule = {
        rule: rates[rule].unstack().reindex(rates[rule].index.unique(0))
        for rule in group.rules
        if rule in rates.index.levels[0]
    }
    samples = sorted({layer["samples"] for run in group.runs for layer in run.activity})
    caption = (
        "Spikes per neuron and time step, as the mean over runs, counted on"
        f" {' or '.join(f'{count:,}' for count in samples)} samples of the last evaluation. The"
        " table has the shares of silent neurons, which never fired on these samples, and of"
        " saturated neurons, which fired at each time step."
    )
    if len(samples) > 1:
        caption += " On fewer samples, both shares are larger."
    averages = ", ".join(
        f"{rule} {layers.mean(axis=1).mean():.1%}" for rule, layers in rates_by_rule.items()
    )
    return Figure(
        name="firing-rates",
        title=title,
        caption=caption,
        alt=f"Mean firing rate over layers: {averages}.",
        table=Table(
            columns=columns, rows=tuple(means.reset_index().itertuples(index=False, name=None))
        ),
        drawing=_stacked(rates_by_rule, max_z=max(float(rates.max()), 1e-9)),
    )


def gradient_fidelity(group: Group) -> Figure | Missing:
    """Layer x rule: the cosine of a rule's gradient with BPTT's at the newest comparison."""
    title = "Gradient fidelity: cosine with BPTT's gradient"
    cosines_by_rule = [
        (rule, cosines) for rule in group.rules if (cosines := _cosines(group, rule))
    ]
    if not cosines_by_rule:
        return Missing(
            title=title,
            why=_why_missing(run for run in group.runs if run.rule != group.against),
        )
    rows, drawn = _by_layer(cosines_by_rule)
    known = [(value, rule, layer) for layer, rule, value in rows if value is not None]
    summary, opposing = "none is known", ""
    if known:
        lowest, rule, layer = min(known)
        summary = f"the lowest is {lowest:.2f}, of {rule} in {layer}"
        opposing = "; below 0: an opposing direction" if lowest < 0 else ""
    layers = len({layer for layer, _, _ in rows})
    return Figure(
        name="gradient-fidelity",
        title=title,
        caption=(
            f"1: the same direction as BPTT's gradient; 0: a right angle{opposing}. The cosines are"
            " those of one batch at the weights of the newest comparison, as means over runs. A"
            " rule with random time steps draws them once per comparison."
        ),
        alt=(
            f"Cosines of {counted(len(cosines_by_rule), 'rule')} in {counted(layers, 'layer')}:"
            f" {summary}."
        ),
        table=Table(columns=("layer", "rule", "cosine"), rows=rows),
        drawing=drawn,
    )


def temporal_share(group: Group) -> Figure | Missing:
    """Layer x epoch: the share of BPTT's gradient that flows through time, which SLTT drops."""
    title = "Temporal share of BPTT's gradient"
    runs = [run for run in group.runs if any(each.temporal_share for each in run.history.fidelity)]
    if not runs:
        return Missing(title=title, why=_why_missing(group.runs))
    run = next((run for run in runs if run.rule == "SLTT"), runs[0])
    moments = [
        ("start" if each.epoch is None else f"epoch {each.epoch + 1}", each.temporal_share)
        for each in run.history.fidelity
    ]
    rows, drawn = _by_layer(moments)
    last, shares = moments[-1]
    known = [(value, layer) for layer, value in shares.items() if value is not None]
    summary = "no share is known"
    if known:
        largest, layer = max(known)
        summary = f"the largest share is {largest:.2f}, in {layer}"
    layers = len({layer for layer, _, _ in rows})
    return Figure(
        name="temporal-share",
        title=title,
        caption=(
            "|g_BPTT - g_SLTT| / |g_BPTT| of each layer's weights on one batch, in the run"
            f" {run.name}."
        ),
        alt=(
            f"Shares of {counted(layers, 'layer')} at {counted(len(moments), 'moment')}; at the"
            f" last one, {last}, {summary}."
        ),
        table=Table(columns=("layer", "moment", "temporal share"), rows=rows),
        drawing=drawn,
    )


def confusion(found: Mapping[str, Any]) -> Figure:
    """True class x answer: shares of each class. `found`: the content of a run's mistakes.json."""
    names, counts = found["class_names"], found["confusion"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    right, total = sum(row[i] for i, row in enumerate(counts)), sum(map(sum, counts))
    heat_map = _heat_map(
        shares, x=[plain(name) for name in names], y=names, max_z=1.0, number_format=".0%"
    )
    return Figure(
        name="confusion",
        title="Confusion",
        caption="Each row is a class. The columns are the shares of its pictures by answer.",
        alt=f"{right:,} of {counted(total, 'picture')} have the right answer.",
        table=Table(
            columns=("class", "answer", "pictures"),
            rows=tuple(
                (names[target], names[answer], count)
                for target, row in enumerate(counts)
                for answer, count in enumerate(row)
                if count
            ),
        ),
        drawing=drawing(
            [heat_map],
            height=150 + _ROW_HEIGHT * len(names),
            margin={"t": 30},
            xaxis=_CATEGORIES,
            yaxis=_DOWNWARDS,
        ),
    )


def _by_layer(
    columns: Sequence[tuple[str, Mapping[str, float | None]]],
) -> tuple[tuple[tuple[str, str, float | None], ...], dict[str, Any]]:
    """The rows (layer, column, value) of a table, and the heat map of layer x column."""
    layers = list(dict.fromkeys(layer for _, values in columns for layer in values))
    rows = tuple((layer, name, values.get(layer)) for layer in layers for name, values in columns)
    known = [value for _, _, value in rows if value is not None]
    heat_map = _heat_map(
        [[values.get(layer) for _, values in columns] for layer in layers],
        x=[plain(name) for name, _ in columns],
        y=layers,
        min_z=min([0.0, *known]),
        max_z=max([1.0, *known]),
        number_format=".2f",
    )
    return rows, drawing(
        [heat_map],
        height=130 + _ROW_HEIGHT * len(layers),
        margin={"t": 30},
        xaxis=_CATEGORIES,
        yaxis=_DOWNWARDS,
    )


def _why_missing(runs: Iterable[Run]) -> str:
    pending = [run.name for run in runs if recipe_value(run.recipe, "evaluation.fidelity_every")]
    if pending:
        return f"no comparison of gradients yet in {', '.join(pending)}"
    return (
        "no run compared its gradient with BPTT's; --set evaluation.fidelity_every=1 compares them"
        " after each epoch"
    )


def _cosines(group: Group, rule: str) -> dict[str, float | None]:
    """The mean cosines of a rule by layer, over the newest comparisons of its runs."""
    if rule == group.against:
        return {}
    newest = [run.history.fidelity[-1].cosines for run in group.of(rule) if run.history.fidelity]
    label = rule.split(" (")[0]  # without the values that distinguish equal labels
    cosines = [by_rule.get(rule) or by_rule.get(label) or {} for by_rule in newest]
    means = pd.DataFrame(cosines, dtype=float).mean()
    return {str(layer): None if pd.isna(mean) else mean for layer, mean in means.items()}


def _heat_map(
    z: Sequence[Sequence[float | None]],
    *,
    x: Sequence[str],
    y: Sequence[str],
    min_z: float = 0.0,
    max_z: float,
    number_format: str,
    **fields: Any,
) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "z": z,
        "x": list(x),
        "y": [plain(name) for name in y],
        "colorscale": SCALE,
        "zmin": min_z,
        "zmax": max_z,
        "xgap": 2,
        "ygap": 2,
        "texttemplate": f"%{{z:{number_format}}}" if len(x) <= _MAX_COLUMNS_WITH_NUMBERS else "",
        "textfont": {"size": 11},
        "colorbar": {
            "thickness": 10,
            "outlinewidth": 0,
            "tickformat": ".0%" if "%" in number_format else ".1f",
        },
        "hovertemplate": f"%{{y}}, %{{x}}: %{{z:{number_format}}}<extra></extra>",
        **fields,
    }


def _stacked(layers_by_rule: Mapping[str, Any], *, max_z: float) -> dict[str, Any]:
    """A heat map for each rule, one above the other. Only the last has labels of its time steps."""
    rows = [len(layers) for layers in layers_by_rule.values()]
    height = 90 + sum(_ROW_HEIGHT * each + 30 for each in rows)
    gap = min(30 / height, 0.9 / max(1, len(rows) - 1))
    data, titles, layout, top = [], [], {}, 1.0
    for index, (rule, layers) in enumerate(layers_by_rule.items(), start=1):
        suffix, is_last = "" if index == 1 else str(index), index == len(rows)
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
            _heat_map(
                layers.to_numpy().tolist(),
                x=list(map(str, layers.columns)),
                y=list(map(str, layers.index)),
                max_z=max_z,
                number_format=".1%",
                xaxis=f"x{suffix}",
                yaxis=f"y{suffix}",
                showscale=index == 1,
            )
        )
        top = bottom - gap
    return drawing(data, height=height, margin={"t": 30}, annotations=titles, **layout)
