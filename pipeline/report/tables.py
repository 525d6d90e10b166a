"""The tables of a comparison and of a report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.core.units import counted, rounded, unit_of
from pipeline.measure.constants import MEMORY_EVERY, OPERATIONS_EVERY
from pipeline.recipe.recipe import Split
from pipeline.report.claims import Claim
from pipeline.report.drawing import Cell, Table
from pipeline.report.metrics import ENERGY, KEPT, METRICS, Metric, compared, metric
from pipeline.report.results import (
    UNKNOWN,
    Run,
    describe_state,
    expanded,
    machine,
    micro_batches,
    places,
)
from pipeline.report.selection import differing_recipes, recipe_value, trained_apart, tuned_keys
from pipeline.report.study import Group, Study, spread_of

_ALWAYS = ("top1", "peak_saved_bytes", "images_per_s", "wall_s")  # columns of every table of costs
_HELD = "held."
_SPLIT = ("world_size", "micro_batch")  # the conditions that follow from the number of workers
_OF_SCALING = (
    "rule",
    "workers",
    "images/s, measured",
    "its deviation",
    "speed-up",
    "efficiency",
    "over",
    "runs",
    "study",
    "machine",
    "cores",
)
MEASURED_SAID = (
    "what the cards used for a sample while the set was evaluated, by their own counters (NVML), "
    "with idle power and waits for data"
)
HELD_SAID = (
    "Bytes of one worker, each kind apart, as they are without ZeRO. The rule's own is what it "
    "learns or draws by itself, such as OPZO's matrices and HLOP's rows, and what it notes of a "
    "batch, at its most. States, of the worker that holds most, exist while a batch is trained "
    "on; the rest stays. What backward keeps of states, such as traces, is a saved byte and is "
    "not counted here."
)
BESIDE_SAID = (
    "Bytes are of the worker that holds most. States are membranes, traces, and what the slices "
    "of a batch share: weights, the first features of a still image, and the gradient that they "
    "collect, as far as backward does not keep them as well. Saved bytes and states have no "
    "storage in common. Joules of training are of all of it and of one worker's card, in the mean "
    "over workers, by the card's own counter (NVML), with its idle power; the measured energy of "
    f"an inference is {MEASURED_SAID}. The other energies of an inference are estimates. "
    "Multiplications and additions are of training on one sample, by their purpose, counted on "
    f"the third batch of a run, which has hardly learnt yet, and every {OPERATIONS_EVERY}th after "
    f"it. States are counted on the second batch of each start and every {MEMORY_EVERY}th. Where "
    "one of these is skipped, the next one counts. Wall clocks leave out start-up, which ends with "
    "the first batch of each start and takes longest in the run that goes first, and comparisons "
    "of gradients with BPTT's, which no rule asks for."
)
SCALING_SAID = (
    "Measured, not a model: steady images/s of finished runs, the mean over those of one rule and "
    "number of workers; the global batch is the same for any number. Efficiency is the speed-up "
    "over the fewest workers, divided by how many times as many there are. Compared are runs of "
    "one study key on equal machines, all with cores of their own or all without. A run in other "
    "micro-batches than its recipe asks for, such as one that ran out of memory, is left out."
)


class Shown(NamedTuple):
    """A quantity of a rule as text: `8 MB`, `± 0 MB`, `×0.25`. The last two may be empty."""

    mean: str
    spread: str
    ratio: str

    def in_a_line(self) -> str:
        return " ".join(filter(None, (self.mean, self.spread, self.ratio and f"({self.ratio})")))


def format_metric(
    group: Group, rule: str, metric: Metric, *, is_divided: bool = True
) -> Shown | None:
    """A rule's mean over its finished runs, its deviation, and its ratio over paired seeds.

    None if no run measured it.
    """
    over_seeds = group.spread(rule, metric.name)
    if over_seeds is None:
        return None
    ratio = group.ratios(rule, metric.name) if is_divided else None
    over = "" if ratio is None else f"×{ratio.mean:{'.2f' if ratio.mean >= 0.1 else '.3g'}}"
    mean, deviation = over_seeds.mean, over_seeds.deviation
    spread = "" if deviation is None else f"± {_text(metric, deviation, like=mean)}"
    return Shown(_text(metric, mean), spread, over)


def columns_of_costs(group: Group) -> list[Metric]:
    """The columns of every table, plus the compared metrics that a finished run has."""
    return [
        each
        for each in compared()
        if each.name in _ALWAYS or any(run.value(each.name) is not None for run in group.finished)
    ]


def title(metric: Metric, runs: Iterable[Run]) -> str:
    """The title of a metric's column. For energy it names the price table."""
    priced = prices(runs) if metric.name == ENERGY else ""
    return f"{metric.title} ({priced})" if priced else metric.title


def prices(runs: Iterable[Run]) -> str:
    """The price tables of the estimated joules, such as `45 nm, fp32`; may be empty."""
    inferences = ((run.summary or {})["inference"] for run in runs if run.value(ENERGY) is not None)
    return "; ".join(
        dict.fromkeys(str(inference.get("prices", UNKNOWN)) for inference in inferences)
    )


def headlines(group: Group) -> list[tuple[str, str]]:
    """A sentence for each rule: its savings and its loss of accuracy."""
    if not group.has_baseline:
        return []
    texts = {each.rule: each.text(group.within) for each in group.differences}
    sentences: list[tuple[str, str]] = []
    for rule in group.rules:
        saved = ", ".join(_saved(group, rule))
        if rule != group.against and (saved or group.lost(rule)):
            lost = texts.get(rule) or _without_interval(group, rule)
            sentences.append((rule, f"{'. '.join(filter(None, (saved, lost)))}."))
    return sentences


def costs(group: Group) -> Table:
    """One row for each rule: means over seeds, and the number of finished runs."""
    metrics = columns_of_costs(group)
    rows = []
    for rule in group.rules:
        states = Counter(state_of(run) for run in group.of(rule))
        finished, cells = states.pop("finished", 0), _cells(group, rule, metrics)
        cells[0] = cells[0] or ", ".join(states) or None
        others = [f"{times} {state}" for state, times in states.items()]
        rows.append((rule, *cells, ", ".join([str(finished), *others]) if others else finished))
    return Table(
        columns=("rule", *(title(each, group.finished) for each in metrics), "finished runs"),
        rows=tuple(rows),
    )


def other_metrics(group: Group) -> Table | None:
    """Metrics that are not compared, averaged over seeds; None if none was measured."""
    metrics = [
        each
        for each in expanded(group.finished)
        if not each.better
        and not each.name.startswith(_HELD)
        and not each.title.endswith(f"({prices(group.finished)})")  # a column of the costs
        and any(_is_measured(run, each) for run in group.finished)
    ]
    return _of_metrics(group, metrics) if metrics else None


def held_memory(group: Group) -> Table | None:
    """The bytes that each rule holds in training, by kind; None if no run measured them."""
    if all(run.value("held.parameters") is None for run in group.finished):
        return None
    kinds = [each for each in METRICS if each.name.startswith(_HELD)]
    return _of_metrics(group, [*kinds, metric("state_bytes")])


def conditions_table(group: Group) -> Table:
    """For each rule: its divisor, the choices that affect the comparison, and its seeds."""
    rows = []
    for rule in group.rules:
        seeds = ", ".join(str(run.seed) for run in group.of(rule) if run.is_finished)
        rows.append({"rule": rule, **conditions_of_rule(group, rule), "seeds": seeds or "none"})
    return Table(columns=tuple(rows[0]), rows=tuple(tuple(row.values()) for row in rows))


def conditions_of_rule(group: Group, rule: str) -> dict[str, str]:
    """The rules that a rule is divided by, and the choices that affect the comparison."""
    runs = group.of(rule)
    conditions = ((run.summary or {}).get("conditions") for run in runs)
    found, recipe = next(filter(None, conditions), {}), runs[0].recipe
    steps, every = found.get("steps_per_forward"), recipe_value(recipe, "evaluation.every")
    evaluated = {None: UNKNOWN, 0: "once, at the end", 1: "after each epoch"}
    choices = {
        "ratios to": group.against if group.has_baseline else "no baseline",
        "time to": group.fastest_baseline if group.has_baseline else "no baseline",
        "reset gradient": str(found.get("reset_gradient", UNKNOWN)),
        "norm statistics": str(found.get("norm_over", UNKNOWN)),
        "precision": str(found.get("precision", UNKNOWN)),
        "over time": _over_time(steps, recipe),
        "micro-batch": micro_batches(runs[0]),
        "evaluated": evaluated.get(every, f"every {every} epochs"),
    }
    if any(tuned_keys(run.recipe) for run in group.runs):
        choices["tuned"] = ", ".join(
            f"{key}={recipe_value(recipe, key)}" for key in tuned_keys(recipe)
        )
    return choices


def claims(found: Sequence[Claim]) -> Table:
    return Table(
        columns=("rule", "claim", "published", "held to", "ours", "holds?"),
        rows=tuple(
            (c.about, c.claim, c.published, c.bound, c.ours, c.verdict or "not judged")
            for c in found
        ),
    )


def recipe_differences(study: Study) -> Table:
    """How the recipes and machines of each other group differ from those of the first.

    Fields in which runs of a group may differ are left out.
    """
    first, *others = study.groups
    rows: list[tuple[Cell, ...]] = []
    for group in others:
        pair = (first.runs[0], group.runs[0])
        names = tuple(named(each, among=study.groups) for each in (first, group))
        for name, *values in differing_recipes(*pair):
            shown = [
                "each rule's own" if name in tuned_keys(run.recipe) else value
                for run, value in zip(pair, values, strict=True)
            ]
            if shown[0] != shown[1]:
                rows.append((name, *map(json.dumps, shown), *names))
        for name, *values in trained_apart(*(run.trained_on for run in pair)):
            rows.append((name, *map(json.dumps, values), *names))
    return Table(
        columns=("field", "first group", "other group", "first", "other"), rows=tuple(rows)
    )


def provenance(study: Study) -> Table:
    """Each run's state, machine and commit."""
    columns = (
        "run",
        "rule",
        "seed",
        "study",
        "state",
        "step",
        "restarts",
        "hardware",
        "workers",
        "cores",
        "commit",
    )
    rows: list[tuple[Cell, ...]] = []
    for run in (run for group in study.groups for run in group.runs):
        past = run.history
        machines = dict.fromkeys(machine(on["hardware"]) for on in run.trained_on)
        again = "" if past.again_from is None else f", done again from {past.again_from} on"
        cores = ("its own" if on["own_cores"] else "shared" for on in run.trained_on)
        rows.append(
            (
                run.name,
                run.rule,
                run.seed,
                run.study[:8],
                describe_state(run.state, run.last_heard),
                f"{past.step}/{run.total_steps or '?'}{again}",
                len(past.restarts),
                "; then ".join(machines) or machine({}),
                _in_turn(on["world_size"] for on in run.trained_on),
                _in_turn(cores),
                ", ".join(run.commits) or None,
            )
        )
    return Table(columns=columns, rows=tuple(rows))


def lone_runs(groups: Sequence[Group]) -> Table:
    """Runs of groups with a single rule. They have no comparison."""
    metrics = [metric("top1"), *(each for each in compared() if each.name != "top1")]
    rows: list[tuple[Cell, ...]] = []
    for group in groups:
        for run in group.runs:
            alone = Group((run,), group.against)
            top1, *others = _cells(alone, run.rule, metrics, is_divided=False)
            top1 = top1 if run.is_finished else state_of(run)
            rows.append((run.name, run.rule, run.seed, top1, *others))
    finished = [run for group in groups for run in group.finished]
    return Table(
        columns=("run", "rule", "seed", *(title(each, finished) for each in metrics)),
        rows=tuple(rows),
    )


def scaling(study: Study) -> Table | None:
    """The measured benefit of more workers; None if no rule finished with two worker counts.

        speed-up   = images/s of n workers / images/s of the fewest
        efficiency = speed-up / (n / the fewest)

    images/s are those of steady batches. The global batch is the recipe's for any worker count.
    """
    alike: dict[str, dict[int, list[Run]]] = {}
    for run in (run for group in study.groups for run in group.finished):
        if run.workers and run.value("images_per_s") and _is_split_as_written(run, run.workers):
            by_workers = alike.setdefault(_key_without_workers(run), {})
            by_workers.setdefault(run.workers, []).append(run)
    rows = [
        row
        for by_workers in alike.values()
        if len(by_workers) > 1
        for row in _scaling_rows(by_workers)
    ]
    return Table(columns=_OF_SCALING, rows=tuple(rows)) if rows else None


def named(group: Group, *, among: Sequence[Group] = ()) -> str:
    """`Study 01234567, shared settings, on a cpu, 2 cores, 1 thread, 2 workers`

    The protocol is named if one of the groups beside it was tuned.
    """
    run, protocol = group.runs[0], ""
    if any(tuned_keys(each.runs[0].recipe) for each in (group, *among)):
        fields = ", ".join(tuned_keys(run.recipe))
        protocol = f", {f'tuned {fields}' if fields else 'shared settings'},"
    return f"Study {group.study[:8] or 'unknown'}{protocol} on {places(run)}"


def state_of(run: Run) -> str:
    return "without a summary" if run.state == "finished" and not run.is_finished else run.state


def _text(metric: Metric, value: float, *, like: float | None = None) -> str:
    """Format a quantity with its unit. A deviation has the unit of the mean, `like`."""
    size, digits = (value, 4) if like is None else (like, 2)
    if metric.unit == "share":
        return f"{value:.2%}"
    if metric.name == "wall_s":
        if like is None and size >= 3600:
            return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"
        return f"{value / 60:.1f} min" if size >= 60 else f"{value:.1f} s"
    scale, unit = unit_of(metric.unit, [size])
    return f"{rounded(value / scale, digits=digits)} {unit}".rstrip()


def _saved(group: Group, rule: str) -> Iterator[str]:
    for each in compared():
        ratio = group.ratios(rule, each.name) if each.better == "less" else None
        if ratio is not None and each.name != KEPT:
            kept = group.ratios(rule, KEPT) if each.name == "peak_saved_bytes" else None
            with_states = "" if kept is None else f", {kept.mean:.2f} with states"
            yield f"{ratio.mean:.2f} of {group.base_of(each.name)}'s {each.title}{with_states}"


def _without_interval(group: Group, rule: str) -> str:
    """The difference of a rule that shares at most one seed with the baseline."""
    base, own = (group.by_seed(each, "top1") for each in (group.against, rule))
    texts = [
        f"{group.against} - {rule}: {100 * (base[seed] - own[seed]):+.2f} points of one seed, so"
        " without an interval"
        for seed in own
        if seed in base
    ]
    if lost := group.describe_lost(rule):
        return f"{', and '.join([*texts, lost])}; at most {group.within:g} points below fails"
    nothing = f"no seed in common with {group.against}, so accuracies are not subtracted"
    return texts[0] if texts else nothing


def _cells(
    group: Group, rule: str, metrics: Sequence[Metric], *, is_divided: bool = True
) -> list[Cell]:
    cells = [format_metric(group, rule, each, is_divided=is_divided) for each in metrics]
    return [each and each.in_a_line() for each in cells]


def _of_metrics(group: Group, metrics: Sequence[Metric]) -> Table:
    rows = [(rule, *_cells(group, rule, metrics, is_divided=False)) for rule in group.rules]
    return Table(columns=("rule", *(each.title for each in metrics)), rows=tuple(rows))


def _is_measured(run: Run, metric: Metric) -> bool:
    """Whether the metric was measured. Without a device, its peaks are 0."""
    value = run.value(metric.name)
    return value is not None and (value != 0 or "peak_" not in metric.name)


def _over_time(steps: int | None, recipe: Mapping[str, Any]) -> str:
    """Time steps per forward."""
    whole = recipe_value(recipe, "time_steps")
    if steps is None or (steps != 1 and whole is None):
        return UNKNOWN
    how = "folded" if steps == whole else f"in slices of {steps}"
    how = "step by step" if steps == 1 else how
    return f"{how}, recomputed" if recipe_value(recipe, "rule.recompute") else how


def _in_turn(values: Iterable[Cell]) -> Cell:
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else ", then ".join(map(str, distinct)) or None


def _scaling_rows(by_workers: Mapping[int, Sequence[Run]]) -> Iterator[tuple[Cell, ...]]:
    fewest, alone = min(by_workers), 0.0
    for workers, runs in sorted(by_workers.items()):
        first, speed = runs[0], spread_of([run.value("images_per_s") or 0.0 for run in runs])
        assert speed is not None, "each number of workers has a run"
        alone = alone or speed.mean
        speed_up = speed.mean / alone
        yield (
            first.rule,
            workers,
            speed.mean,
            speed.deviation,
            speed_up,
            speed_up * fewest / workers,
            counted(fewest, "worker"),
            speed.runs,
            first.study[:8],
            machine(first.hardware),
            "its own" if first.trained_on[0]["own_cores"] else "shared",
        )


def _is_split_as_written(run: Run, workers: int) -> bool:
    """Whether all starts had equal conditions and the recipe's micro-batches."""
    size, most = run.recipe.get("batch_size"), run.recipe.get("micro_batch")
    if len(run.trained_on) != 1 or not size or size % workers:
        return False
    return (
        run.trained_on[0]["micro_batch"] == Split.of(size, workers=workers, most=most).micro_batch
    )


def _key_without_workers(run: Run) -> str:
    """A key of runs that may differ only in their number of workers."""
    (on,) = run.trained_on
    rule = run.recipe.get("rule") if isinstance(run.recipe.get("rule"), Mapping) else run.rule
    conditions = {name: value for name, value in on.items() if name not in _SPLIT}
    return json.dumps([run.study, rule, conditions], sort_keys=True, default=str)
