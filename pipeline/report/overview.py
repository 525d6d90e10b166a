"""The four tiles of a rule: accuracy, memory, time and energy, relative to the baseline.

A rule without a finished run has live tiles: its newest accuracy, its memory, and the time left.
"""

from typing import NamedTuple

from pipeline.core.units import format_quantity
from pipeline.recipe import is_baseline
from pipeline.report.metrics import COMPUTE, ENERGY, metric
from pipeline.report.results import Run, describe_state, is_silent
from pipeline.report.study import Group
from pipeline.report.tables import headline, percent
from pipeline.track.events import Step

_NONE = "–"  # in the place of a value
_QUANTITIES = (
    ("Accuracy", "top1"),
    ("Memory", "peak_saved_bytes"),
    ("Time per batch", COMPUTE),
    ("Energy", ENERGY),
)


class Tile(NamedTuple):
    label: str
    value: str
    unit: str = ""  # such as `of BPTT's`
    detail: str = ""  # the absolute values, or why there is no ratio
    spread: str = ""  # the 95 % interval
    is_certain: bool = False  # whether there is an interval, of a ratio above 0
    progress: float | None = None  # in 0..1, of a run that trains


def first_rule(group: Group) -> str:
    """The rule whose tiles a page shows first: the best one, or one that trains, or the first."""
    if best := headline(group):
        return best.rule
    running = {run.rule for run in group.runs if _trains(run)}

    def place(rule: str) -> tuple[bool, ...]:
        return rule == group.against, rule not in running, rule not in group.finished_rules

    return min(group.rules, key=place)


def tiles(group: Group, rule: str) -> tuple[Tile, ...]:
    if rule not in group.finished_rules:
        return _unfinished(group, rule)
    return tuple(_finished(group, rule, *each) for each in _QUANTITIES)


def training(group: Group) -> list[tuple[str, Tile]]:
    """The runs that train, each with the tile of its time."""
    running = filter(_trains, group.runs)
    return [(f"{run.rule}, seed {run.seed}", _time_left(run)) for run in running]


def _finished(group: Group, rule: str, label: str, name: str) -> Tile:
    is_accuracy, kind, against = name == "top1", metric(name).unit, group.base_of(name)
    own, base = (group.spread(each, name) for each in (rule, against))
    relative = group.loss(rule) if is_accuracy else group.ratios(rule, name)
    if own is None:
        return Tile(label, _NONE, detail="not measured")
    value = format_quantity(own.mean, kind=kind)
    if base is None or relative is None or rule == against:
        why = f"no seed in common with {against}"
        if is_baseline(rule, group.against):
            why = "the baseline"
        spread = "one run" if own.runs == 1 else f"mean of {own.runs} runs"
        detail = why if group.has_baseline else "no baseline"
        return Tile(label, value, "", detail, spread, own.runs > 1)
    low, high = relative.interval or (0.0, 0.0)
    if is_accuracy:  # rule minus baseline
        large, ends = f"{-relative.mean:+z.2f}", f"{-high:z.2f} to {-low:z.2f}"
    else:
        large, ends = percent(relative.mean), f"{100 * max(low, 0):.0f} to {percent(high)}"
    interval = f"95 %: {ends}, {relative.runs} seeds"
    lost = group.describe_lost(rule) if is_accuracy else ""
    return Tile(
        label,
        large,
        "points" if is_accuracy else f"of {against}'s",
        f"{value}, {against} {format_quantity(base.mean, kind=kind)}",
        ", ".join(filter(None, (interval if relative.runs > 1 else "one seed, no interval", lost))),
        relative.runs > 1,
    )


def _unfinished(group: Group, rule: str) -> tuple[Tile, ...]:
    """Tiles of the run that is furthest, a running one first."""
    run = max(group.of(rule), key=lambda each: (_trains(each), each.history.step))
    past, state = run.history, describe_state(run.state, run.last_heard)
    done = _batches(run)
    if not _trains(run):
        end = Tile("Accuracy", state, detail=f"seed {run.seed}, after {done}")
        others = _QUANTITIES[1:]
        return end, *(Tile(label, _NONE, detail="no run has finished") for label, _ in others)
    points = [each for each in (*past.evaluations[-1:], *past.curve[-1:]) if each.top1 is not None]
    value, detail = _NONE, done
    if points:
        kind = "evaluated" if points[0] in past.evaluations else "of training batches"
        value, detail = f"{points[0].top1:.2%}", f"{kind} after {points[0].step} batches"
    steps = (event for event in reversed(run.journal()) if isinstance(event, Step))
    memory = next((event.memory_bytes for event in steps if event.memory_bytes), None)
    in_use = (
        (_NONE, "", "") if memory is None else (format_quantity(memory, kind="B"), "", "in use now")
    )
    return (
        Tile("Accuracy", value, detail=detail, spread=f"{state}, seed {run.seed}"),
        Tile("Memory", *in_use, "saved bytes follow at the end"),
        _time_left(run),
        Tile("Energy", _NONE, spread="estimated at the end"),
    )


def _trains(run: Run) -> bool:
    """Whether the run has reported lately."""
    heard = run.last_heard
    return run.state == "running" and (heard is None or not is_silent(run.state, heard))


def _batches(run: Run) -> str:
    return f"{run.history.step} of {run.total_steps or '?'} batches"


def _time_left(run: Run) -> Tile:
    """The batches that are left, at the mean time of those that are done."""
    past, total, done = run.history, run.total_steps, _batches(run)
    if not past.curve or not past.step or not total:
        return Tile("Time", _NONE, detail=done, spread="no batch is timed yet")
    seconds = past.curve[-1].seconds / past.curve[-1].step
    left = format_quantity(max(0, total - past.step) * seconds, kind="s")
    batch = f"{format_quantity(seconds, kind='s')} a batch"
    return Tile("Time", left, "left", done, batch, progress=past.step / total)
