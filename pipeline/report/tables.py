"""The tables, captions and the headline of a comparison and of a report."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.core.units import counted, rounded, unit_of
from pipeline.measure.constants import MEMORY_EVERY, OPERATIONS_EVERY
from pipeline.recipe.recipe import Split
from pipeline.report.claims import Claim
from pipeline.report.drawing import Cell, Table
from pipeline.report.metrics import COMPUTE, ENERGY, METRICS, Metric, compared_metrics, metric
from pipeline.report.results import (
    UNKNOWN,
    Run,
    describe_machine,
    describe_state,
    metrics_of,
    micro_batches,
)
from pipeline.report.selection import (
    differing_conditions,
    differing_fields,
    recipe_value,
    tuned_keys,
)
from pipeline.report.study import Group, Spread, Study, spread_of
from pipeline.report.titles import difference, fields_of, shared_fields, title_of

_ALWAYS = ("top1", "peak_saved_bytes", "images_per_s", "wall_s")  # columns of every table of costs
_HELD = "held."
_SPLIT = ("world_size", "micro_batch")  # the conditions that follow from the number of workers
_SCALING_COLUMNS = (
    "rule",
    "workers",
    "images/s, measured",
    "deviation of images/s",
    "speed-up",
    "efficiency",
    "relative to",
    "runs",
    "study",
    "machine",
    "cores",
)
MEASURED_CAPTION = (
    "the energy of the cards per sample of an evaluation. It comes from their own counters "
    "(NVML), and includes idle power and waits for data"
)
_STATE_BYTES = (
    "State bytes are membranes, traces and shared tensors that backward does not save. The "
    "slices of a batch share these tensors: weights, the first features of a still image, and "
    "the accumulated gradient. A trace that backward saves counts as saved bytes."
)
HELD_CAPTION = (
    "Bytes of one worker by kind, without ZeRO. The rule's tensors are those that the rule "
    "learns or draws, such as OPZO's matrices and HLOP's rows. They include its records of a "
    "batch at their peak. State bytes are those of the worker with the most. States and records "
    f"exist only while a batch is trained on; all other bytes stay. {_STATE_BYTES}"
)
COSTS_CAPTION = (
    f"Bytes are those of the worker with the most. {_STATE_BYTES} Joules of training are the "
    "energy of a worker's card over the whole run, averaged over workers. They come from the "
    "card's own counter (NVML) and include idle power. The measured energy of an inference is "
    f"{MEASURED_CAPTION}. The other energies of an inference are estimates. Multiplications and "
    "additions are those of training on one sample, by purpose. They are counted on the third "
    f"batch of a run and every {OPERATIONS_EVERY}th after it. State bytes are counted on the "
    f"second batch of each start and every {MEMORY_EVERY}th after it. If one of these batches is "
    "skipped, the next one is counted. Wall clocks exclude start-up and comparisons with BPTT's "
    "gradient. Start-up ends with the first batch of each start. No rule needs the comparisons."
)
SCALING_CAPTION = (
    "All values are measured, not estimated. Images/s are those of the steady batches of "
    "finished runs. Each value is the mean over the runs of one rule with one number of workers. "
    "The global batch is the same for any number of workers. Efficiency is the speed-up relative "
    "to the fewest workers, divided by the ratio of the numbers of workers. The compared runs "
    "have one study key and equal machines, and all or none had reserved cores. A run with other "
    "micro-batches than its recipe sets, for example after it ran out of memory, is excluded. So "
    "is a run whose starts had different conditions."
)


class Shown(NamedTuple):
    """A quantity of a rule as text: `8 MB`, `± 0 MB`, `×0.25`. Spread and ratio may be empty."""

    mean: str
    spread: str
    ratio: str

    def in_a_line(self) -> str:
        return " ".join(filter(None, (self.mean, self.spread, self.ratio and f"({self.ratio})")))


def format_metric(group: Group, rule: str, metric: Metric) -> Shown | None:
    """A metric of a rule: mean and deviation over its finished runs, and ratio over paired seeds.

    A metric that is not compared has no ratio. None if no run measured the metric.
    """
    over_runs = group.spread(rule, metric.name)
    if over_runs is None:
        return None
    ratio = group.ratios(rule, metric.name) if metric.better else None
    ratio_text = ""
    if ratio is not None:
        ratio_text = f"×{ratio.mean:.2f}" if ratio.mean >= 0.1 else f"×{ratio.mean:.3g}"
    mean, deviation = over_runs.mean, over_runs.deviation
    spread = "" if deviation is None else f"± {_text(metric, deviation, like=mean)}"
    return Shown(_text(metric, mean), spread, ratio_text)


def columns_of_costs(group: Group) -> list[Metric]:
    """The compared metrics that a finished run has, and those that every table of costs shows."""
    return [
        each
        for each in compared_metrics()
        if each.name in _ALWAYS or any(run.value(each.name) is not None for run in group.finished)
    ]


def title(metric: Metric, runs: Iterable[Run]) -> str:
    """The title of a metric's column. The title of estimated energy also names its prices."""
    priced = prices(runs) if metric.name == ENERGY else ""
    return f"{metric.title} ({priced})" if priced else metric.title


def prices(runs: Iterable[Run]) -> str:
    """The names of the prices per operation that the estimates use, such as `45 nm, fp32`.

    The text is empty if no run has an estimate.
    """
    inferences = ((run.summary or {})["inference"] for run in runs if run.value(ENERGY) is not None)
    return "; ".join(
        dict.fromkeys(str(inference.get("prices", UNKNOWN)) for inference in inferences)
    )


class Headline(NamedTuple):
    rule: str
    sentence: str


def headline(group: Group) -> Headline | None:
    """The best rule of a group, and its costs and accuracy relative to the baseline in a sentence.

    The best rule has the smallest product of its ratios of saved bytes and of compute time, among
    the rules whose accuracy does not fail, or among all if all fail.

    Returns:
        None without a baseline, or without another rule that has both ratios.
    """
    failing = {each.rule for each in group.differences if each.verdict(group.within) == "fails"}
    ratios: dict[str, tuple[float, float]] = {}
    for rule in group.rules:
        memory, time = (group.ratios(rule, name) for name in ("peak_saved_bytes", COMPUTE))
        if rule != group.against and memory is not None and time is not None:
            ratios[rule] = memory.mean, time.mean
    if not ratios:
        return None
    best = min(
        ratios,
        key=lambda rule: (rule in failing or group.lost(rule) > 0, math.prod(ratios[rule])),
    )
    memory, time = (percent(ratio) for ratio in ratios[best])
    base = group.base_of(COMPUTE)
    whose = "its" if base == group.against else f"{base}'s"
    loss = group.loss(best)
    is_lost = loss is not None and loss.interval is not None and loss.interval[0] > 0
    parts = (
        f"{best} used {memory} of {group.against}'s memory and {time} of {whose} time at"
        f" {_points(loss, digits=1, unit=' points')}",
        "a clear loss of accuracy" if is_lost else "",
        group.describe_lost(best),
    )
    return Headline(best, ", ".join(filter(None, parts)))


def percent(ratio: float) -> str:
    return f"{100 * ratio:.{0 if ratio >= 0.01 else 2}f} %"


def conclusion(group: Group) -> str:
    """The headline of a group, or the costs of its only rule; "" if there is neither."""
    if best := headline(group):
        return best.sentence
    if len(group.finished_rules) != 1:
        return ""
    [rule] = group.finished_rules
    words = {"top1": "top-1", "peak_saved_bytes": "saved for backward", "wall_s": "of training"}
    shown = {text: format_metric(group, rule, metric(name)) for name, text in words.items()}
    costs = ", ".join(f"{each.mean} {text}" for text, each in shown.items() if each)
    return f"{rule}: {costs}"


def in_markdown(group: Group) -> str:
    """The conclusion of a group, and its costs as a table in Markdown."""
    columns = columns_of_costs(group)
    rows = [["rule", *(each.title for each in columns)], ["---"] * (len(columns) + 1)]
    for rule in group.finished_rules:
        cells = (format_metric(group, rule, each) for each in columns)
        rows.append([rule, *("-" if each is None else each.in_a_line() for each in cells)])
    answer = conclusion(group)
    lines = [f"**{answer}**", ""] if answer else []
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def costs(group: Group) -> Table:
    """One row for each rule: the means over its finished runs, and its numbers of runs by state.

    With a baseline, a column has the difference of accuracy and whether the rule loses at most
    `group.within` points.

    If the first metric has no value, its cell shows the states of the other runs.
    """
    metrics = columns_of_costs(group)
    rows = []
    for rule in group.rules:
        states = Counter(state_of(run) for run in group.of(rule))
        finished = states.pop("finished", 0)
        cells = _cells(group, rule, metrics)
        cells[0] = cells[0] or ", ".join(states) or None
        if group.has_baseline:
            cells.insert(1, _difference(group, rule))
        others = [f"{count} {state}" for state, count in states.items()]
        counts = ", ".join([str(finished), *others]) if others else finished
        rows.append((rule, *cells, counts))
    titles = [title(each, group.finished) for each in metrics]
    if group.has_baseline:
        titles.insert(1, f"points to {group.against}")
    return Table(columns=("rule", *titles, "finished runs"), rows=tuple(rows))


def other_metrics(group: Group) -> Table | None:
    """Metrics that are not compared, averaged over finished runs; None if none was measured."""
    metrics = [
        each
        for each in metrics_of(group.finished)
        if not each.better
        and not each.name.startswith(_HELD)
        and not each.title.endswith(f"({prices(group.finished)})")  # the table of costs has it
        and any(_is_measured(run, each) for run in group.finished)
    ]
    return _metrics_table(group, metrics) if metrics else None


def held_memory(group: Group) -> Table | None:
    """The bytes that each rule holds in training, by kind; None if no run measured them."""
    if all(run.value("held.parameters") is None for run in group.finished):
        return None
    return _metrics_table(
        group,
        [*(each for each in METRICS if each.name.startswith(_HELD)), metric("state_bytes")],
    )


def conditions_table(group: Group) -> Table:
    """For each rule: its baselines, the choices that affect the comparison, and the seeds of its
    finished runs.
    """
    rows = []
    for rule in group.rules:
        seeds = ", ".join(str(run.seed) for run in group.of(rule) if run.is_finished)
        rows.append({"rule": rule, **conditions_of_rule(group, rule), "seeds": seeds or "none"})
    return Table(columns=tuple(rows[0]), rows=tuple(tuple(row.values()) for row in rows))


def conditions_of_rule(group: Group, rule: str) -> dict[str, str]:
    runs = group.of(rule)
    recipe = runs[0].recipe
    conditions = next(filter(None, ((run.summary or {}).get("conditions") for run in runs)), {})
    every = recipe_value(recipe, "evaluation.every")
    evaluated = {None: UNKNOWN, 0: "once, at the end", 1: "after each epoch"}
    choices = {
        "ratios to": group.against if group.has_baseline else "no baseline",
        "time ratios to": group.fastest_baseline if group.has_baseline else "no baseline",
        "reset gradient": str(conditions.get("reset_gradient", UNKNOWN)),
        "norm statistics": str(conditions.get("norm_over", UNKNOWN)),
        "precision": str(conditions.get("precision", UNKNOWN)),
        "over time": _over_time(conditions.get("steps_per_forward"), recipe),
        "micro-batch": micro_batches(runs[0]),
        "evaluated": evaluated.get(every, f"every {every} epochs"),
    }
    if any(tuned_keys(run.recipe) for run in group.runs):
        choices["tuned"] = ", ".join(
            f"{key}={recipe_value(recipe, key)}" for key in tuned_keys(recipe)
        )
    return choices


def claims(all_claims: Sequence[Claim]) -> Table:
    return Table(
        columns=("rule", "claim", "published", "bound", "ours", "holds?"),
        rows=tuple(
            (c.about, c.claim, c.published, c.bound, c.ours, c.verdict or "not judged")
            for c in all_claims
        ),
    )


def recipe_differences(study: Study) -> Table:
    """The fields of recipes and machines in which each other group differs from the first group.

    Fields in which runs of one group may differ are excluded.
    """
    first, *others = study.groups
    rows: list[tuple[Cell, ...]] = []
    for group in others:
        pair = (first.runs[0], group.runs[0])
        names = tuple(", ".join(named(each, among=study.groups)) for each in (first, group))
        for name, *values in differing_fields(*pair):
            shown = [
                "each rule's own" if name in tuned_keys(run.recipe) else value
                for run, value in zip(pair, values, strict=True)
            ]
            if shown[0] != shown[1]:
                rows.append((name, *map(json.dumps, shown), *names))
        for name, *values in differing_conditions(*(run.trained_on for run in pair)):
            rows.append((name, *map(json.dumps, values), *names))
    return Table(
        columns=("field", "first group", "other group", "first", "other"), rows=tuple(rows)
    )


def provenance(study: Study) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for run in (run for group in study.groups for run in group.runs):
        past = run.history
        machines = dict.fromkeys(describe_machine(each["hardware"]) for each in run.trained_on)
        repeats = "" if past.again_from is None else f", repeating from {past.again_from}"
        cores = ("its own" if each["own_cores"] else "shared" for each in run.trained_on)
        rows.append(
            (
                run.name,
                run.rule,
                run.seed,
                run.study[:8],
                describe_state(run.state, run.last_heard),
                f"{past.step}/{run.total_steps or '?'}{repeats}",
                len(past.restarts),
                "; then ".join(machines) or describe_machine({}),
                _in_order(each["world_size"] for each in run.trained_on),
                _in_order(cores),
                ", ".join(run.commits) or None,
            )
        )
    return Table(
        columns=(
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
        ),
        rows=tuple(rows),
    )


def scaling(study: Study) -> Table | None:
    """The measured benefit of more workers; None if no rule finished with two worker counts.

        speed-up   = images/s of n workers / images/s of the fewest workers
        efficiency = speed-up / (n / the fewest workers)

    images/s are those of steady batches. The global batch is the recipe's for any worker count.
    """
    groups: dict[str, dict[int, list[Run]]] = {}
    for run in (run for group in study.groups for run in group.finished):
        if run.workers and run.value("images_per_s") and _is_split_as_written(run, run.workers):
            by_workers = groups.setdefault(_key_without_workers(run), {})
            by_workers.setdefault(run.workers, []).append(run)
    rows = [
        row
        for by_workers in groups.values()
        if len(by_workers) > 1
        for row in _scaling_rows(by_workers)
    ]
    return Table(columns=_SCALING_COLUMNS, rows=tuple(rows)) if rows else None


def named(group: Group, *, among: Sequence[Group]) -> tuple[str, str]:
    """A title of a group, and its difference from the group beside it in `among`.

    The difference is empty for the only group. For equal recipes, it is the study key.
    """
    other = next((each for each in among if each is not group), None)
    if other is None:
        return title_of_runs(group.runs), ""
    fields, others = (fields_of(each.runs[0]) for each in (group, other))
    return title_of_runs(group.runs), difference(fields, others) or f"study {group.study[:8]}"


def title_of_runs(runs: Sequence[Run]) -> str:
    """A title of what the recipes of some runs share."""
    names = [str(run.recipe.get("name", run.name)) for run in runs]
    return title_of(shared_fields(map(fields_of, runs)), names) or runs[0].name


def state_of(run: Run) -> str:
    return "without a summary" if run.state == "finished" and not run.is_finished else run.state


def _text(metric: Metric, value: float, *, like: float | None = None) -> str:
    """Format a quantity with its unit.

    If `like` is given, `value` is a deviation and `like` is its mean. The deviation has the unit of
    the mean; hours are written as minutes.
    """
    size = value if like is None else like
    if metric.unit == "share":
        return f"{value:.2%}"
    if metric.name == "wall_s":
        if like is None and size >= 3600:
            return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"
        return f"{value / 60:.1f} min" if size >= 60 else f"{value:.1f} s"
    scale, unit = unit_of(metric.unit, [size])
    return f"{rounded(value / scale, digits=4 if like is None else 2)} {unit}".rstrip()


def _points(loss: Spread | None, *, digits: int, unit: str = "") -> str:
    """Rule minus baseline with its interval: `-0.3 points (-0.9 to 0.3)`."""
    if loss is None:
        return "an accuracy that was not measured"
    mean, interval = f"{-loss.mean:z.{digits}f}{unit}", "one seed"
    if loss.interval is not None:
        low, high = loss.interval
        interval = f"{-high:z.{digits}f} to {-low:z.{digits}f}"
    return f"{mean} ({interval})"


def _difference(group: Group, rule: str) -> str | None:
    """`-0.12 (-0.66 to 0.41): holds`: rule minus baseline, and the verdict on the claim."""
    if rule == group.against:
        return "baseline"
    loss, verdicts = group.loss(rule), {each.rule: each for each in group.differences}
    text = "" if loss is None else _points(loss, digits=2)
    if rule in verdicts:
        text += f": {verdicts[rule].verdict(group.within)}"
    return ", ".join(filter(None, (text, group.describe_lost(rule)))) or None


def _cells(group: Group, rule: str, metrics: Sequence[Metric]) -> list[Cell]:
    cells = [format_metric(group, rule, each) for each in metrics]
    return [None if each is None else each.in_a_line() for each in cells]


def _metrics_table(group: Group, metrics: Sequence[Metric]) -> Table:
    rows = [(rule, *_cells(group, rule, metrics)) for rule in group.rules]
    return Table(columns=("rule", *(each.title for each in metrics)), rows=tuple(rows))


def _is_measured(run: Run, metric: Metric) -> bool:
    """Whether the metric was measured. Without a device, the peaks of the device are 0."""
    value = run.value(metric.name)
    return value is not None and (value != 0 or "peak_" not in metric.name)


def _over_time(steps_per_forward: int | None, recipe: Mapping[str, Any]) -> str:
    time_steps = recipe_value(recipe, "time_steps")
    if steps_per_forward == 1:
        mode = "step by step"
    elif steps_per_forward is None or time_steps is None:
        return UNKNOWN
    else:
        mode = "folded" if steps_per_forward == time_steps else f"in slices of {steps_per_forward}"
    return f"{mode}, recomputed" if recipe_value(recipe, "rule.recompute") else mode


def _in_order(values: Iterable[Cell]) -> Cell:
    """The only value, or the distinct values in their order: `2, then 1`."""
    distinct = list(dict.fromkeys(values))
    return distinct[0] if len(distinct) == 1 else ", then ".join(map(str, distinct)) or None


def _scaling_rows(by_workers: Mapping[int, Sequence[Run]]) -> Iterator[tuple[Cell, ...]]:
    fewest = min(by_workers)
    base_speed = 0.0  # of the fewest workers, which come first
    for workers, runs in sorted(by_workers.items()):
        first = runs[0]
        speed = spread_of([run.value("images_per_s") or 0.0 for run in runs])
        assert speed is not None, "each number of workers has a run"
        base_speed = base_speed or speed.mean
        speed_up = speed.mean / base_speed
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
            describe_machine(first.hardware),
            "its own" if first.trained_on[0]["own_cores"] else "shared",
        )


def _is_split_as_written(run: Run, workers: int) -> bool:
    """Whether all starts had equal conditions and the recipe's micro-batches."""
    batch_size, max_micro_batch = run.recipe.get("batch_size"), run.recipe.get("micro_batch")
    if len(run.trained_on) != 1 or not batch_size or batch_size % workers:
        return False
    split = Split.of(batch_size, workers=workers, most=max_micro_batch)
    return run.trained_on[0]["micro_batch"] == split.micro_batch


def _key_without_workers(run: Run) -> str:
    """A key of runs that may differ only in their number of workers."""
    rule = run.recipe.get("rule") if isinstance(run.recipe.get("rule"), Mapping) else run.rule
    conditions = {name: value for name, value in run.trained_on[0].items() if name not in _SPLIT}
    return json.dumps([run.study, rule, conditions], sort_keys=True, default=str)
