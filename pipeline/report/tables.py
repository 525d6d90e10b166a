"""The tables of a report: costs, what stands behind each row, claims, how recipes differ, hardware
and commits.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.core.units import shown, unit_of
from pipeline.measure.sampled import MEMORY_EVERY, OPERATIONS_EVERY
from pipeline.recipe.json import differing
from pipeline.report.claims import Claim
from pipeline.report.differences import of_the_study, trained_apart, tuned_in, written
from pipeline.report.figure import Cell, Table
from pipeline.report.figures import MEASURED_SAID, QUANTITIES, prices
from pipeline.report.places import NOT_SAID, machine, micro_batches, places
from pipeline.report.silence import state_told
from pipeline.report.spread import Spread
from pipeline.report.study import COMPUTE, ENERGY, ENERGY_MEASURED, KEPT, Group, Study, StudyRun

STATES = "states beside saved bytes"
_BESIDE = {
    "state_bytes": (STATES, "B"),
    "peak_device_bytes": ("peak on the device", "B"),
    "peak_reserved_bytes": ("peak reserved there", "B"),
    "peak_rss_bytes": ("peak RSS", "B"),
    "peak_pss_bytes": ("PSS between batches, at its peak", "B"),
    "evaluation_peak_device_bytes": ("peak on the device while evaluating", "B"),
    "evaluation_peak_reserved_bytes": ("peak reserved there while evaluating", "B"),
    "evaluation_peak_rss_bytes": ("peak RSS while evaluating", "B"),
    "startup_s": ("start-up", "s"),
    "net_s": ("wall clock net of restarts", "s"),
    "device_j": ("joules of training, measured", "J"),
    ENERGY_MEASURED: ("joules of an inference, measured", "J"),
}
_BY_TABLE = "energy_j_by_table"
_HELD = {
    "held.parameters": "parameters",
    "held.buffers": "buffers",
    "held.gradients": "gradients",
    "held.optimizer": "optimizer",
    "held.teacher": "teacher",
    "held.rule": "the rule's own",
    "state_bytes": STATES,
}
HELD_SAID = (
    "Bytes of one worker, each kind apart, as they are without ZeRO. The rule's own is what it"
    " learns, or draws, by itself, as OPZO's matrices and HLOP's rows, and what it notes of a"
    " batch, at its most. States, of the worker that holds most, are there while a batch is trained"
    " on; the rest stays. What backward keeps of states, as of traces, is a saved byte, and not"
    " here."
)
BESIDE_SAID = (
    "Bytes are of the worker that holds most; states are membranes, traces, and what the slices of"
    " a batch share, weights and the first features of a still image, with the gradient they"
    " collect, as far as backward does not keep them as well: saved bytes and states have no"
    " storage in common. Joules of training are of the whole of it, of one worker's card in the"
    " mean over workers, by the card's own counter (NVML), its idle power included; joules of an"
    f" inference are {MEASURED_SAID}. Those are measured, where the energy of an inference is an"
    " estimate. Multiplications and additions are of training on one sample, by what they serve,"
    " counted on the third batch of a run, which has hardly learnt yet, and every"
    f" {OPERATIONS_EVERY}th after it; states are looked at on the second of each start and every"
    f" {MEMORY_EVERY}th; where one of these is skipped, the next stands in its place. Wall clocks"
    " leave out start-up, which ends with the first batch of each start and takes longest in"
    " whichever run goes first, and what comparing gradients with BPTT's took, which no rule asks"
    " for."
)


def headlines(group: Group) -> list[tuple[str, str]]:
    """Each rule with a sentence: what it saves against the baseline, and what it costs in accuracy,
    or that it diverged.
    """
    if not group.has_baseline:
        return []
    told = {difference.rule: difference.text(group.within) for difference in group.differences}
    found = [
        (rule, _headline(group, rule, told.get(rule)))
        for rule in group.rules
        if rule != group.against
    ]
    return [(rule, line) for rule, line in found if line]


def costs(group: Group) -> Table:
    """One row for each rule: mean over seeds ± standard deviation, × the baseline over paired
    seeds; its other runs by state.
    """
    columns = ("rule", "top-1", *_titles(group.finished), "images/s", "finished runs")
    return Table(columns=columns, rows=tuple(tuple(_costs(group, rule)) for rule in group.rules))


def beside(group: Group) -> Table | None:
    """What else was measured of each rule, mean over seeds ± standard deviation; None where nothing
    was.
    """
    known = dict(_BESIDE)
    for priced in _other_prices(group):
        known[f"inference.{_BY_TABLE}.{priced}"] = (
            f"joules of an inference, estimated ({priced})",
            "J",
        )
    for purpose in _purposes(group):
        for name in ("multiplications", "additions"):
            known[f"operations.{purpose}.{name}"] = (f"{purpose}: {name}", "count")
    kept = {
        name: about
        for name, about in known.items()
        if any(_is_there(run, name) for run in group.finished)
    }
    if not kept:
        return None
    rows = [
        (rule, *(_spread(group.spread(rule, name), kind, None) for name, (_, kind) in kept.items()))
        for rule in group.rules
    ]
    return Table(columns=("rule", *(title for title, _ in kept.values())), rows=tuple(rows))


def held(group: Group) -> Table | None:
    """What each rule holds in training, mean over seeds; None where no run says so."""
    if not any(run.value("held.parameters") is not None for run in group.finished):
        return None
    rows = [
        (rule, *(_spread(group.spread(rule, name), "B", None) for name in _HELD))
        for rule in group.rules
    ]
    return Table(columns=("rule", *_HELD.values()), rows=tuple(rows))


def behind_the_rows(group: Group) -> Table:
    """What each rule is compared with, the choices that decide such a comparison, as far as recipes
    and runs tell, and the seeds of its means."""
    columns = [
        "rule",
        "ratios to",
        "time to",
        "reset gradient",
        "norm statistics",
        "precision",
        "over time",
    ]
    columns += ["micro-batch", "evaluated"]
    if any(tuned_in(run.recipe) for run in group.runs):
        columns.append("tuned")
    rows = [_behind(group, rule) for rule in group.rules]
    return Table(
        columns=(*columns, "seeds"),
        rows=tuple(tuple(row[name] for name in (*columns, "seeds")) for row in rows),
    )


def claims(found: Sequence[Claim]) -> Table:
    """{claim, published, held to, ours, holds?}"""
    columns = ("rule", "claim", "published", "held to", "ours", "holds?")
    rows = [
        (c.about, c.claim, c.published, c.bound, c.ours, c.verdict or "not judged") for c in found
    ]
    return Table(columns=columns, rows=tuple(rows))


def recipe_differences(study: Study) -> Table:
    """In what the recipes of each other group differ from those of the first, rule, seed and name
    apart.
    """
    first, *others = study.groups
    rows: list[tuple[Cell, ...]] = []
    for group in others:
        for name, mine, theirs in _apart(first.runs[0], group.runs[0]):
            rows.append(
                (
                    name,
                    json.dumps(mine),
                    json.dumps(theirs),
                    *(named(each, among=study.groups) for each in (first, group)),
                )
            )
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
    rows = [
        (
            run.name,
            run.rule,
            run.seed,
            run.study[:8],
            state_told(run.state, run.heard),
            _progress(run),
            len(run.restarts),
            "; then ".join(dict.fromkeys(machine(each.hardware) for each in run.trained_on))
            or machine({}),
            _one_after_another(each.workers for each in run.trained_on),
            _one_after_another(
                "its own" if each.own_cores else "shared" for each in run.trained_on
            ),
            ", ".join(run.commits) or None,
        )
        for group in study.groups
        for run in group.runs
    ]
    return Table(columns=columns, rows=tuple(rows))


def lone_runs(groups: Sequence[Group]) -> Table:
    """Runs of groups with one rule: there is nothing to set them beside."""
    columns = (
        "run",
        "rule",
        "seed",
        "top-1",
        *_titles([run for group in groups for run in group.finished]),
    )
    rows = [
        (
            run.name,
            run.rule,
            run.seed,
            _written(group, run, "top1") if run.is_finished else _unfinished(run),
            *(_written(group, run, name) for name in QUANTITIES),
        )
        for group in groups
        for run in group.runs
    ]
    return Table(columns=columns, rows=tuple(rows))


def named(group: Group, *, among: Sequence[Group] = ()) -> str:
    """`Study 01234567, shared settings, on a cpu, 2 cores, 1 thread, 2 workers, each on cores of
    its own`

    The protocol is told where one of the groups that it stands among was tuned.
    """
    run = group.runs[0]
    is_told = any(tuned_in(each.runs[0].recipe) for each in (group, *among))
    return (
        f"Study {group.study[:8] or 'unknown'}{_protocol(run.recipe) if is_told else ''} on"
        f" {places(run)}"
    )


def _titles(runs: Sequence[StudyRun]) -> Iterator[str]:
    """Of `QUANTITIES`; that of energy has the prices behind its joules."""
    priced = prices(runs)
    for name, (title, _) in QUANTITIES.items():
        yield f"{title} ({priced})" if name == ENERGY and priced else title


def _headline(group: Group, rule: str, difference: str | None) -> str:
    """Empty where nothing of it stands beside the baseline's."""
    saved = ", ".join(_saved(group, rule))
    if not saved and not group.lost(rule):
        return ""
    return f"{'. '.join(filter(None, (saved, difference or _without_interval(group, rule))))}."


def _saved(group: Group, rule: str) -> Iterator[str]:
    for name, (title, _) in QUANTITIES.items():
        if name != KEPT and (ratio := group.ratios(rule, name)) is not None:
            kept = group.ratios(rule, KEPT) if name == "peak_saved_bytes" else None
            with_states = "" if kept is None else f", {kept.mean:.2f} with states"
            yield f"{ratio.mean:.2f} of {group.base_of(name)}'s {title}{with_states}"


def _without_interval(group: Group, rule: str) -> str:
    """Of a rule with one seed in common with the baseline, or none. What diverged fails, whatever
    it did in another seed.
    """
    base = group.by_seed(group.against, "top1")
    points = [
        100 * (base[seed] - top1)
        for seed, top1 in group.by_seed(rule, "top1").items()
        if seed in base
    ]
    told = (
        f"{group.against} - {rule}: {points[0]:+.2f} points of one seed, so without an interval"
        if points
        else ""
    )
    if lost := group.lost_told(rule):
        return (
            f"{told}{', and ' if told else ''}{lost}; at most {group.within:g} points below fails"
        )
    return told or f"no seed in common with {group.against}, so accuracies are not subtracted"


def _costs(group: Group, rule: str) -> Iterator[Cell]:
    runs = group.of(rule)
    finished, others = (
        sum(run.is_finished for run in runs),
        Counter(_unfinished(run) for run in runs if not run.is_finished),
    )
    yield rule
    yield _spread(group.spread(rule, "top1"), "share", None) if finished else ", ".join(others)
    for name, kind in (
        *((name, kind) for name, (_, kind) in QUANTITIES.items()),
        ("images_per_s", "rate"),
    ):
        yield _spread(group.spread(rule, name), kind, group.ratios(rule, name))
    yield (
        ", ".join([str(finished), *(f"{count} {state}" for state, count in others.items())])
        if others
        else finished
    )


def _unfinished(run: StudyRun) -> str:
    """The state of a run that is in no mean; one that has finished waits for its summary."""
    return "without a summary" if run.state == "finished" else run.state


def _progress(run: StudyRun) -> str:
    again = "" if run.again_from is None else f", done again from {run.again_from} on"
    return f"{run.step}/{run.total_steps or '?'}{again}"


def _purposes(group: Group) -> list[str]:
    """What training operations served in any run, in the order of their counting."""
    counted = [(run.summary or {}).get("operations") for run in group.finished]
    return list(
        dict.fromkeys(purpose for work in counted if isinstance(work, Mapping) for purpose in work)
    )


def _other_prices(group: Group) -> list[str]:
    """Tables by which the joules of inferences were estimated as well, beside those behind the
    costs.
    """
    told = [
        each
        for run in group.finished
        if isinstance(each := (run.summary or {}).get("inference"), Mapping)
    ]
    first = {each.get("prices") for each in told}
    return [
        name
        for name in dict.fromkeys(name for each in told for name in each.get(_BY_TABLE, ()))
        if name not in first
    ]


def _is_there(run: StudyRun, name: str) -> bool:
    """Whether it was measured; where there is no device, its peaks are 0."""
    value = run.value(name)
    return value is not None and (
        value != 0 or not name.removeprefix("evaluation_").startswith("peak_")
    )


def _spread(found: Spread | None, kind: str, ratio: Spread | None) -> str | None:
    if found is None:
        return None
    text = shown(found.mean, kind=kind)
    if found.deviation is not None:
        number, _, unit = (
            text.partition(" ") if kind != "share" else (text.removesuffix("%"), "", "%")
        )
        spread = (
            100 * found.deviation
            if kind == "share"
            else found.deviation / unit_of(kind, [found.mean])[0]
        )
        text = f"{number} ± {float(f'{spread:.2g}'):g} {unit}".rstrip()
    return text if ratio is None else f"{text} ({shown(ratio.mean, kind='ratio')})"


def _written(group: Group, run: StudyRun, name: str) -> str | None:
    alone = Group((run,), group.against, group.within).spread(run.rule, name)
    return _spread(alone, "share" if name == "top1" else QUANTITIES[name][1], None)


def _behind(group: Group, rule: str) -> dict[str, Cell]:
    runs = group.of(rule)
    told = next(
        (
            run.summary["conditions"]
            for run in runs
            if run.summary and run.summary.get("conditions")
        ),
        {},
    )
    return {
        "rule": rule,
        "ratios to": group.against if group.has_baseline else "no baseline",
        "time to": group.base_of(COMPUTE) if group.has_baseline else "no baseline",
        "reset gradient": str(told.get("reset_gradient", NOT_SAID)),
        "norm statistics": str(told.get("norm_over", NOT_SAID)),
        "precision": str(told.get("precision", NOT_SAID)),
        "over time": _over_time(told.get("steps_per_forward"), runs[0].recipe),
        "micro-batch": micro_batches(runs[0]),
        "evaluated": _evaluated(runs[0].recipe),
        "tuned": ", ".join(
            f"{key}={written(runs[0].recipe, key)}" for key in tuned_in(runs[0].recipe)
        ),
        "seeds": ", ".join(str(run.seed) for run in runs if run.is_finished) or "none",
    }


def _over_time(steps: int | None, recipe: Mapping[str, Any]) -> str:
    """How many time steps a forward takes: all of them is folded. What the journal alone tells of a
    recipe is text.
    """
    whole = written(recipe, "time_steps")
    if steps is None or (steps != 1 and whole is None):
        return NOT_SAID
    how = (
        "step by step"
        if steps == 1
        else "folded"
        if str(steps) == str(whole)
        else f"in slices of {steps}"
    )
    return f"{how}, recomputed" if written(recipe, "rule.recompute") in (True, "true") else how


def _evaluated(recipe: Mapping[str, Any]) -> str:
    """How often the set was read that top-1 is of: what is read once has chosen nothing."""
    every = written(recipe, "evaluation.every")
    if every is None:
        return NOT_SAID
    return {"0": "once, at the end", "1": "after each epoch"}.get(
        str(every), f"every {every} epochs"
    )


def _apart(first: StudyRun, other: StudyRun) -> Iterator[tuple[str, Any, Any]]:
    yield from differing("", *(_shared(run.recipe) for run in (first, other)))
    yield from trained_apart(*([asdict(each) for each in run.trained_on] for run in (first, other)))


def _shared(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without what runs of a group may differ in; a value that each rule has of its own is
    nobody's.
    """
    kept = copy.deepcopy({**of_the_study(recipe), "init": recipe.get("init")})
    for key in (key for key in tuned_in(recipe) if written(recipe, key) is not None):
        *parts, last = key.split(".")
        inner: Any = kept
        for name in parts:
            inner = inner.get("kwargs", inner)[name]
        inner.get("kwargs", inner)[last] = "each rule's own"
    return kept


def _protocol(recipe: Mapping[str, Any]) -> str:
    fields = ", ".join(tuned_in(recipe))
    return f", tuned {fields}," if fields else ", shared settings,"


def _one_after_another(values: Iterable[Cell]) -> Cell:
    """`2, then 1`; what did not change stands alone."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else ", then ".join(map(str, found)) or None
