"""The four tiles of a rule: accuracy, memory, time and energy, relative to the baseline.

A rule without a finished run has live tiles: its newest accuracy, its memory, and the time left.
"""

from typing import NamedTuple

from pipeline.core.units import format_quantity
from pipeline.recipe import is_baseline
from pipeline.report.metrics import COMPUTE, ENERGY, metric
from pipeline.report.results import Run, describe_state
from pipeline.report.study import Group, Spread
from pipeline.report.tables import headline, percent
from pipeline.track.events import Step

_NONE = "–"  # in the place of a value
_COSTS = (("Memory", "peak_saved_bytes"), ("Time", COMPUTE), ("Energy", ENERGY))


class Tile(NamedTuple):
    label: str
    value: str
    unit: str = ""  # such as `of BPTT's`
    detail: str = ""  # the absolute values, or why there is no ratio
    spread: str = ""  # the 95 % interval
    is_certain: bool = False  # whether there is an interval
    progress: float | None = None  # in 0..1, of a run that trains


def first_rule(group: Group) -> str:
    """The rule whose tiles a page shows first: the best one, or one that trains, or the first."""
    if best := headline(group):
        return best.rule
    others = [rule for rule in group.rules if rule != group.against] or group.rules
    running = [rule for rule in others if any(run.state == "running" for run in group.of(rule))]
    finished = [rule for rule in others if rule in group.finished_rules]
    return next(iter((*running, *finished, *others)))


def tiles(group: Group, rule: str) -> tuple[Tile, ...]:
    if rule not in group.finished_rules:
        return _unfinished(group, rule)
    return _accuracy(group, rule), *(_cost(group, rule, *each) for each in _COSTS)


def _accuracy(group: Group, rule: str) -> Tile:
    own, base = (group.spread(each, "top1") for each in (rule, group.against))
    if own is None:
        return Tile("Accuracy", _NONE, detail="not measured")
    loss = group.loss(rule)
    if base is None or loss is None or rule == group.against:
        return _alone("Accuracy", f"{own.mean:.2%}", own, group, rule)
    low, high = loss.interval or (0.0, 0.0)
    return Tile(
        "Accuracy",
        f"{-loss.mean:+z.2f}",
        "points",
        f"{own.mean:.2%}, {group.against} {base.mean:.2%}",
        ", ".join(
            filter(
                None, (_interval(loss, f"{-high:z.2f}", f"{-low:z.2f}"), group.describe_lost(rule))
            )
        ),
        loss.runs > 1,
    )


def _cost(group: Group, rule: str, label: str, name: str) -> Tile:
    own, against = group.spread(rule, name), group.base_of(name)
    if own is None:
        return Tile(label, _NONE, detail="not measured")
    text, base = format_quantity(own.mean, kind=metric(name).unit), group.spread(against, name)
    ratio = group.ratios(rule, name)
    if base is None or ratio is None or rule == against:
        return _alone(label, text, own, group, rule)
    low, high = ratio.interval or (0.0, 0.0)
    return Tile(
        label,
        percent(ratio.mean),
        f"of {against}'s",
        f"{text}, {against} {format_quantity(base.mean, kind=metric(name).unit)}",
        _interval(ratio, percent(max(low, 0.0)).removesuffix(" %"), percent(high)),
        ratio.runs > 1,
    )


def _alone(label: str, value: str, own: Spread, group: Group, rule: str) -> Tile:
    """A value without a ratio, and why there is none."""
    detail = f"no seed in common with {group.against}"
    if not group.has_baseline:
        detail = "no baseline"
    elif is_baseline(rule, group.against):
        detail = "the baseline"
    spread = "one run" if own.runs == 1 else f"mean of {own.runs} runs"
    return Tile(label, value, "", detail, spread, own.runs > 1)


def _interval(spread: Spread, low: str, high: str) -> str:
    if spread.interval is None:
        return "one seed, no interval"
    return f"95 %: {low} to {high}, {spread.runs} seeds"


def _unfinished(group: Group, rule: str) -> tuple[Tile, ...]:
    """Tiles of the run that is furthest, a running one first."""
    runs = group.of(rule)
    run = max(runs, key=lambda each: (each.state == "running", each.history.step))
    past, total = run.history, run.total_steps
    state = describe_state(run.state, run.last_heard)
    done = f"{past.step} of {total or '?'} batches"
    about = f"{state}, seed {run.seed}, {done}"
    points = [each for each in (*past.evaluations[-1:], *past.curve[-1:]) if each.top1 is not None]
    top1 = points[0].top1 if points else None
    kind = "evaluated" if points and points[0] in past.evaluations else "of training batches"
    accuracy = Tile(
        "Accuracy",
        _NONE if top1 is None else f"{top1:.2%}",
        detail=about if top1 is None else f"{kind} after {points[0].step} batches",
        spread="" if top1 is None else f"{state}, seed {run.seed}",
    )
    if run.state != "running":
        end = accuracy._replace(value=state, detail=f"seed {run.seed}, after {done}", spread="")
        return end, *(Tile(label, _NONE, detail="no run has finished") for label, _ in _COSTS)
    memory = _memory_in_use(run)
    return (
        accuracy,
        Tile("Memory", memory or _NONE, detail="in use now" if memory else "", spread=_LATER),
        _time_left(run, done),
        Tile("Energy", _NONE, spread="estimated at the end"),
    )


_LATER = "saved bytes follow at the end"


def _memory_in_use(run: Run) -> str:
    steps = (event for event in reversed(run.journal()) if isinstance(event, Step))
    used = next((event.memory_bytes for event in steps if event.memory_bytes), None)
    return "" if used is None else format_quantity(used, kind="B")


def _time_left(run: Run, done: str) -> Tile:
    """The batches that are left, at the mean time of those that are done."""
    past, total = run.history, run.total_steps
    newest = past.curve[-1] if past.curve else None
    if newest is None or not total or not newest.step:
        return Tile("Time", _NONE, detail=done, spread="no batch is timed yet")
    seconds = newest.seconds / newest.step
    left = format_quantity(max(0, total - past.step) * seconds, kind="s")
    batch = f"{format_quantity(seconds, kind='s')} a batch"
    return Tile("Time", left, "left", done, batch, progress=past.step / total)
