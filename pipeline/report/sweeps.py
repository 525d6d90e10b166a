"""Figures of sweeps over time steps, and tables of the largest batches.

A sweep is the output of `spiketrain sweep --format json`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from pipeline.core.printing import number, print_table
from pipeline.core.units import counted, unit_of
from pipeline.recipe import BASELINE, is_baseline
from pipeline.report.drawing import Figure, Table, color, drawing, plain, scatter, symbol, titled
from pipeline.report.results import ReportError

LARGEST_SAID = (
    "The table shows the largest batch that fits, with the speed of its forward and backward. The "
    f"ratio divides this speed by that of the faster {BASELINE} at its own largest batch on the "
    "same card or machine. So the ratio includes the speed that saved memory brings. A batch with "
    "a speed was trained. A batch without a speed is estimated from two batches, with a part of "
    "the memory left free. 0 means that one sample does not fit."
)


class Point(NamedTuple):
    """One rule at one T."""

    rule: str
    time_steps: int
    saved: float  # bytes
    kept: float  # saved bytes plus states
    seconds: float  # time of forward and backward
    batch: int | None  # the rule's own largest batch; None if it was not searched
    images_per_s: float | None  # of forward and backward at `batch`; None if it was not trained


class Swept(NamedTuple):
    key: str
    recipe: str
    figures: tuple[Figure, ...]
    largest: Table | None  # None if no largest batch was searched


def sweep_of(value: Any, where: str) -> Mapping[str, Any]:
    """Return the value if it is a sweep; `where` is its source, for messages.

    Raises:
        ReportError: the value is no sweep.
    """
    from pipeline.measure.memory import format_hardware  # imports torch, which takes seconds

    try:
        format_hardware(value["hardware"])
        numbers = (int(value["samples"]), int(value.get("memory_bytes") or 0))
        text = (str(value["recipe"]), str(value["commit"]))
        json.dumps([points_of(value), numbers, text], allow_nan=False)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"report: {where} must be the output of sweep --format json; got {error!r}"
        ) from error
    return value


def points_of(sweep: Mapping[str, Any]) -> list[Point]:
    return list(map(_point, sweep["points"]))


def print_by_time_steps(sweep: Mapping[str, Any], console: Console) -> None:
    """Print the saved bytes and the time of each rule, with a column for each T."""
    points = {(each.rule, each.time_steps): each for each in points_of(sweep)}
    if not points:
        return
    rules, steps = ([*dict.fromkeys(key)] for key in zip(*points, strict=True))
    cells: dict[str, Callable[[Point], str]] = {
        "saved bytes": lambda each: f"{each.saved / 1e6:.4g} MB",
        "time of forward and backward": lambda each: f"{each.seconds * 1e3:.4g} ms",
    }
    samples = counted(sweep["samples"], "sample")
    for quantity, cell in cells.items():
        rows = [
            (rule, *(cell(points[rule, T]) if (rule, T) in points else "" for T in steps))
            for rule in rules
        ]
        columns = [number(f"T = {T}") for T in steps]
        print_table(console, ("rule", *columns), rows, title=f"{quantity}, {samples} on one worker")


def fastest_baselines(points: Iterable[Point]) -> dict[int, Point]:
    """The fastest BPTT at each T, at its own largest batch. Only trained batches count."""
    trained = [each for each in points if each.images_per_s is not None and is_baseline(each.rule)]
    return {
        each.time_steps: each for each in sorted(trained, key=lambda each: each.images_per_s or 0)
    }


def swept(sweeps: Iterable[Mapping[str, Any]], rules: Sequence[str] = ()) -> Iterator[Swept]:
    """Figures and tables of the sweeps that have points. `rules`: as in `sweep_figures`.

    A sweep over a single T with largest batches has no figures.
    """
    for index, sweep in enumerate((each for each in sweeps if each["points"]), start=1):
        table = largest_batches(sweep)
        has_one_T = len({each.time_steps for each in points_of(sweep)}) == 1
        yield Swept(
            key=f"sweep{index}",
            recipe=str(sweep["recipe"]),
            figures=() if has_one_T and table is not None else sweep_figures(sweep, rules),
            largest=table,
        )


def largest_batches(sweep: Mapping[str, Any]) -> Table | None:
    """A table with a row for each rule and T; None if no largest batch was searched."""
    points = [each for each in points_of(sweep) if each.batch is not None]
    fastest = fastest_baselines(points)
    rows: list[tuple[Any, ...]] = []
    for each in points:
        base, speed = fastest.get(each.time_steps), each.images_per_s
        ratio = None if speed is None or base is None else speed / (base.images_per_s or 1)
        rows.append((each.rule, each.time_steps, each.batch, speed, ratio))
    limit = sweep.get("memory_bytes")
    columns = (
        "rule",
        "time steps",
        "largest batch" if limit is None else f"largest batch in {limit / 1e9:.3g} GB",
        "images/s of forward and backward",
        f"images/s / faster {BASELINE}",
    )
    return Table(columns=columns, rows=tuple(rows)) if rows else None


def sweep_figures(sweep: Mapping[str, Any], rules: Sequence[str] = ()) -> tuple[Figure, Figure]:
    """Figures of memory and time against T. The sweep must have points.

    Args:
        rules: the rules of the page, in the order of their colours.
    """
    by_rule: dict[str, list[Point]] = {}
    for point in points_of(sweep):
        by_rule.setdefault(point.rule, []).append(point)
    places = [*dict.fromkeys((*rules, *by_rule))]
    return _memory(sweep, by_rule, places), _time(sweep, by_rule, places)


def _point(value: Mapping[str, Any]) -> Point:
    cost, tried, batch = value["cost"], value.get("at_largest"), value.get("largest_batch")
    saved = float(cost["peak_saved_bytes"])
    return Point(
        rule=str(cost["rule"]),
        time_steps=int(value["time_steps"]),
        saved=saved,
        kept=saved + float(cost["state_bytes"]),
        seconds=_seconds(cost),
        batch=batch,
        images_per_s=None if tried is None else (batch or 0) / _seconds(tried),
    )


def _seconds(cost: Mapping[str, Any]) -> float:
    return float(cost["forward_s"]) + float(cost["backward_s"])


def _memory(
    sweep: Mapping[str, Any], by_rule: Mapping[str, Sequence[Point]], places: Sequence[str]
) -> Figure:
    every = [point for points in by_rule.values() for point in points]
    scale, unit = unit_of("B", [point.kept for point in every])
    data = []
    for rule, points in by_rule.items():
        index = places.index(rule)
        data.append(_line(index, rule, points, [point.saved / scale for point in points], unit))
        kept = [point.kept / scale for point in points]
        data.append(
            {
                **_line(index, f"{rule}, with states", points, kept, unit),
                "legendgroup": plain(rule),
                "showlegend": False,  # it shares the entry of the rule's solid line
                "line": {"color": color(index), "width": 1, "dash": "dot"},
                "marker": {"symbol": symbol(index), "size": 5},
            }
        )
    growths = [
        f"{rule} saves {points[-1].saved / points[0].saved:.3g} times as many bytes at T ="
        f" {points[-1].time_steps} as at T = {points[0].time_steps}"
        for rule, points in by_rule.items()
        if points[0].saved
    ]
    return Figure(
        name="memory-against-time-steps",
        title=f"Memory against time steps: {sweep['recipe']}",
        caption=(
            f"{_caption(sweep)} Dotted lines include states: membranes, traces and tensors that"
            " slices share."
        ),
        alt=f"{'; '.join(growths)}.",
        table=Table(
            columns=("rule", "time steps", "peak saved bytes", "saved bytes and states"),
            rows=tuple((each.rule, each.time_steps, each.saved, each.kept) for each in every),
        ),
        drawing=_drawing(data, by_rule, f"peak saved bytes, {unit}"),
    )


def _time(
    sweep: Mapping[str, Any], by_rule: Mapping[str, Sequence[Point]], places: Sequence[str]
) -> Figure:
    data = [
        _line(places.index(rule), rule, points, [1e3 * point.seconds for point in points], "ms")
        for rule, points in by_rule.items()
    ]
    every = [point for points in by_rule.values() for point in points]
    last = max(point.time_steps for point in every)
    at_last = sorted(
        (point for point in every if point.time_steps == last),
        key=lambda point: point.seconds,
        reverse=True,
    )
    slowest, fastest = at_last[0], at_last[-1]
    alt = f"At T = {last}, {slowest.rule} takes {1e3 * slowest.seconds:.4g} ms"
    if len(at_last) > 1:
        alt += f", the most, and {fastest.rule} takes {1e3 * fastest.seconds:.4g} ms, the least"
    return Figure(
        name="time-against-time-steps",
        title=f"Time against time steps: {sweep['recipe']}",
        caption=f"{_caption(sweep)} Data loading, optimizer and collectives are excluded.",
        alt=f"{alt}.",
        table=Table(
            columns=("rule", "time steps", "seconds of forward and backward"),
            rows=tuple((each.rule, each.time_steps, each.seconds) for each in every),
        ),
        drawing=_drawing(data, by_rule, "forward and backward, ms"),
    )


def _line(
    index: int, name: str, points: Sequence[Point], y: Sequence[float], unit: str
) -> dict[str, Any]:
    return scatter(
        name,
        [point.time_steps for point in points],
        y,
        legendgroup=plain(name),
        showlegend=True,  # plotly hides the legend of a single trace
        mode="lines+markers",
        line={"color": color(index), "width": 2, "dash": "solid"},
        marker={"symbol": symbol(index), "size": 9},
        hovertemplate=f"T = %{{x}}: %{{y:.4g}} {unit}<extra>{plain(name)}</extra>",
    )


def _drawing(
    data: Sequence[dict[str, Any]], by_rule: Mapping[str, Sequence[Point]], title: str
) -> dict[str, Any]:
    steps = sorted({point.time_steps for points in by_rule.values() for point in points})
    x, y = titled("time steps T", tickvals=steps), titled(title, rangemode="tozero")
    return drawing(data, height=400, xaxis=x, yaxis=y)


def _caption(sweep: Mapping[str, Any]) -> str:
    from pipeline.measure.memory import format_hardware

    return (
        f"Measured on one batch of {counted(sweep['samples'], 'sample')} before training; commit"
        f" {sweep['commit']}, {format_hardware(sweep['hardware'])}."
    )
