"""What one page or dashboard shows: runs, in groups of those that may be compared.

    study.groups[0].spread("SLTT", "peak_saved_bytes")       mean and standard deviation over seeds
    study.groups[0].ratios("SLTT", "peak_saved_bytes")       over the baseline's runs of the same
    seed, seed by seed

Nothing is divided across groups: their runs have another study key, or were trained on something
else. Only the speeds of groups that differ in their number of workers alone are (scaling.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import remedy
from pipeline.core.units import counted, shown
from pipeline.recipe import BASELINE, is_baseline
from pipeline.report.differences import tuned_in, written
from pipeline.report.paired import WITHIN, Difference, paired_difference
from pipeline.report.spread import Spread, spread_of
from pipeline.report.study_run import StudyRun, from_folder, study_run
from pipeline.track.journal import number

if TYPE_CHECKING:
    from pipeline.report.claims import Claim

__all__ = [
    "COMPUTE",
    "ENERGY",
    "ENERGY_MEASURED",
    "KEPT",
    "Group",
    "Spread",
    "Study",
    "StudyRun",
    "from_folder",
    "kind",
    "measured",
    "spread_of",
    "study_run",
]

COMPUTE = "compute_s"
"""forward and backward of a steady batch, in the mean; no field of a summary"""
KEPT = "kept_bytes"
"""saved bytes, and those of states beside them: no storage twice; no field of a summary"""
ENERGY = "inference.energy_j"
"""of an inference, estimated"""
ENERGY_MEASURED = "inference.measured_j"
"""of an inference, by the cards' own counters"""
_WALL = ("wall_s", "net_s")
"""clocks of a whole run; left out are start-up, which takes longest in whichever run goes first,
and comparing gradients, which no rule asks for"""
FOLDED_ALONE = (
    f"times are divided by those of {BASELINE} folded over time; step by step, which may be faster,"
    " none among these has finished"
)
RECOMPUTED = f"{BASELINE}-recompute"
RECOMPUTES_NOTHING = (
    f"bytes are divided by those of {BASELINE} that recomputes nothing; no {RECOMPUTED}, which"
    " keeps less, has finished"
)


@dataclass(frozen=True)
class Group:
    """Runs of one study key, trained on the same alone."""

    runs: tuple[StudyRun, ...]
    """the baseline's first"""
    against: str = BASELINE
    within: float = WITHIN
    diverged_beside: frozenset[tuple[str, int]] = frozenset()
    """rule and seed of runs that diverged, where they are not among `runs`"""

    @property
    def study(self) -> str:
        return self.runs[0].study

    @property
    def key(self) -> str:
        """The same whatever other groups stand beside it, and whatever runs come to it: a digest of
        the `kind` of its runs.
        """
        return f"g{hashlib.sha256(kind(self.runs[0]).encode()).hexdigest()[:8]}"

    @property
    def finished(self) -> tuple[StudyRun, ...]:
        return tuple(run for run in self.runs if run.is_finished)

    @property
    def rules(self) -> list[str]:
        """Of all runs, the baseline first."""
        return list(dict.fromkeys(run.rule for run in self.runs))

    @property
    def has_baseline(self) -> bool:
        return any(run.rule == self.against for run in self.finished)

    @property
    def several_baselines(self) -> str:
        """`several BPTTs with different optimizer.lr; name one`, where each has a label of its own
        and none is `against`.
        """
        told_apart = [run for run in self.runs if run.rule.startswith(f"{self.against} (")]
        if self.has_baseline or not any(run.is_finished for run in told_apart):
            return ""
        return f"several {self.against}s with different {', '.join(_apart(told_apart))}; name one"

    @property
    def undivided(self) -> str:
        """Why nothing is divided; empty where there is a baseline."""
        return (
            ""
            if self.has_baseline
            else self.several_baselines or f"no run of {self.against} among these has finished"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of its means and ratios must know beside them."""
        return tuple(_notes(self))

    @property
    def differences(self) -> list[Difference]:
        """Baseline minus rule in points of accuracy, of every rule with at least two seeds in
        common with it.
        """
        base = self.by_seed(self.against, "top1")
        found = [
            paired_difference(
                base,
                self.by_seed(rule, "top1"),
                names=(self.against, rule),
                diverged=self.lost(rule),
            )
            for rule in self.rules
            if rule != self.against
        ]
        return [difference for difference in found if difference is not None]

    def of(self, rule: str) -> tuple[StudyRun, ...]:
        return tuple(run for run in self.runs if run.rule == rule)

    def diverged(self, rule: str) -> set[int]:
        """Seeds in which the rule diverged, in every run of it."""
        found = {run.seed for run in self.of(rule) if run.state == "diverged"}
        found |= {seed for of, seed in self.diverged_beside if of == rule}
        return found - self.by_seed(rule, "top1").keys()

    def lost(self, rule: str) -> int:
        """Of the seeds in which the rule diverged those in which the baseline finished."""
        return len(self.diverged(rule) & self.by_seed(self.against, "top1").keys())

    def lost_told(self, rule: str) -> str:
        """`diverged in 2 of BPTT's 3 seeds`; empty where it did in none of them."""
        lost, seeds = self.lost(rule), len(self.by_seed(self.against, "top1"))
        return f"diverged in {lost} of {self.against}'s {counted(seeds, 'seed')}" if lost else ""

    def spread(self, rule: str, name: str) -> Spread | None:
        """Of a number of the summaries, over the rule's finished runs; None where none of them has
        it.
        """
        return spread_of(
            [value for run in self.of(rule) if (value := measured(run, name)) is not None]
        )

    def ratios(self, rule: str, name: str) -> Spread | None:
        """Of `paired`; None without a seed in common."""
        return spread_of(list(self.paired(rule, name).values()))

    def paired(self, rule: str, name: str) -> dict[int, float]:
        """By seed, over `base_of(name)`'s of the same seed, each the mean of a seed's runs."""
        over, values = self.by_seed(self.base_of(name), name), self.by_seed(rule, name)
        return {
            seed: value / over[seed] for seed, value in sorted(values.items()) if over.get(seed)
        }

    def by_seed(self, rule: str, name: str) -> dict[int, float]:
        """Of a number of the summaries, the mean of the finished runs of each seed."""
        found: dict[int, list[float]] = {}
        for run in self.of(rule):
            if (value := measured(run, name)) is not None:
                found.setdefault(run.seed, []).append(value)
        return {seed: statistics.fmean(values) for seed, values in found.items()}

    def base_of(self, name: str) -> str:
        """The rule whose `name` others' is divided by: of time and speed the faster of BPTT folded
        over time and step by step.
        """
        return self.fastest_baseline if name in (COMPUTE, *_WALL, "images_per_s") else self.against

    @property
    def fastest_baseline(self) -> str:
        """Of BPTT folded over time and step by step the one that computes faster, on the seeds of
        all where there are such.
        """
        kinds = [rule for rule in self.rules if is_baseline(rule, self.against)]
        times = {rule: seconds for rule in kinds if (seconds := self.by_seed(rule, COMPUTE))}
        if self.against not in times:
            return self.against
        shared = set.intersection(*map(set, times.values()))
        return min(
            times,
            key=lambda rule: statistics.fmean(times[rule][seed] for seed in shared or times[rule]),
        )


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs of a page, and what was claimed and swept beside them."""

    title: str
    runs: tuple[StudyRun, ...]
    against: str = BASELINE
    within: float = WITHIN
    claims: tuple[Claim, ...] = ()
    sweeps: tuple[Mapping[str, Any], ...] = ()
    """each what `spiketrain sweep --format json` prints"""
    notes: tuple[str, ...] = ()
    printed: str = ""
    """what the suite's own report prints"""

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Those with most rules first, else in the order of their runs."""
        by_kind: dict[str, list[StudyRun]] = {}
        for run in self.runs:
            by_kind.setdefault(kind(run), []).append(run)
        groups = [
            Group(self._sorted(_told_apart(runs)), self.against, self.within)
            for runs in by_kind.values()
        ]
        return tuple(sorted(groups, key=lambda group: -len(group.rules)))

    def _sorted(self, runs: Sequence[StudyRun]) -> tuple[StudyRun, ...]:
        def place(run: StudyRun) -> tuple[bool, str, int, str]:
            return run.rule != self.against, run.rule, run.seed, run.name

        return tuple(sorted(runs, key=place))


def kind(run: StudyRun) -> str:
    """Equal for runs that may be compared: of one study key, trained from the first step to the
    last on as many workers, as large micro-batches and equal machines, with as many loader threads,
    on cores of their own or not."""
    return json.dumps(
        [run.study, [asdict(each) for each in run.trained_on]], sort_keys=True, default=str
    )


def measured(run: StudyRun, name: str) -> float | None:
    """A number of a finished run: of its summary, COMPUTE or KEPT. None: not measured. Runs of
    versions that did not tell start-up apart have no wall clock to compare."""
    if name == COMPUTE:
        forward, backward = run.value("steady_forward_s"), run.value("steady_backward_s")
        return None if forward is None or backward is None else forward + backward
    if name == KEPT:
        saved, states = run.value("peak_saved_bytes"), run.value("state_bytes")
        return None if saved is None or states is None else saved + states
    found = run.value(name)
    if found is None or name not in _WALL:
        return found
    startup = run.value("startup_s")
    if startup is None:
        return None
    return (
        found - (startup if name == "wall_s" else 0.0) - (run.value("fidelity_s") or 0.0)
    )  # net_s has no start-up in it


def _told_apart(runs: Sequence[StudyRun]) -> list[StudyRun]:
    """Two rules of one label, such as SLTT-1 rescaled and not, or one with two values of what was
    tuned, get what tells them apart into it."""
    by_rule: dict[str, list[StudyRun]] = {}
    for run in runs:
        by_rule.setdefault(run.rule, []).append(run)
    apart = {rule: _apart(namesakes) for rule, namesakes in by_rule.items()}
    return [
        _labelled(
            run, [value for name, value in _written(run.recipe).items() if name in apart[run.rule]]
        )
        for run in runs
    ]


def _apart(runs: Sequence[StudyRun]) -> list[str]:
    """Names of what `_written` tells of them that is not the same in all."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in _written(run.recipe).items():
            values.setdefault(name, set()).add(value)
    return [name for name, several in values.items() if len(several) > 1]


def _labelled(run: StudyRun, apart: Sequence[str]) -> StudyRun:
    if not apart:
        return run
    label = f"{run.rule} ({', '.join(apart)})"
    return replace(
        run, rule=label, summary=None if run.summary is None else {**run.summary, "rule": label}
    )


def _written(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The rule's keywords, and the value of each field that was tuned, as text."""
    rule = recipe.get("rule")
    told = {"keywords": _keywords(rule) or "as it comes"} if isinstance(rule, Mapping) else {}
    return told | {key: f"{key}={written(recipe, key)}" for key in tuned_in(recipe)}


def _keywords(part: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_said(value)}" for name, value in (part.get("kwargs") or {}).items())


def _said(value: Any) -> str:
    """A part of a recipe as Python has it: `SLTT(k=1)`."""
    is_part = isinstance(value, Mapping) and "target" in value
    return (
        f"{str(value['target']).rpartition('.')[2]}({_keywords(value)})" if is_part else str(value)
    )


def _notes(group: Group) -> Iterator[str]:
    """Rules written out, commits, seeds with several runs, what wall clocks have in them and what
    not, whose bytes nobody counted, what no count of operations knows, and what is divided by
    what."""
    of_rule = {rule: [run for run in group.of(rule) if run.is_finished] for rule in group.rules}
    of_rule = {rule: runs for rule, runs in of_rule.items() if runs}
    for rule, (run, *_) in of_rule.items():
        part = run.recipe.get("rule")
        if isinstance(part, Mapping) and (keywords := _keywords(part)) and keywords not in rule:
            yield f"{rule} is {_said(part)}"
    for run in group.runs:
        if how := _divergence(run):
            yield (
                f"{run.name} ({run.rule}) {how}: its figures and ratios compare no rules;"
                f" {what_to_change(run.recipe)}"
            )
    commits = sorted({commit for run in group.finished for commit in run.commits})
    if len(commits) > 1:
        yield f"the runs are of different commits: {', '.join(commits)}"
    for rule, runs in of_rule.items():
        for seed, count in Counter(run.seed for run in runs).items():
            if count > 1:
                yield (
                    f"{rule} has {count} runs of seed {seed}, which count as one, their mean, in"
                    " ratios and differences"
                )
    restarts = {
        rule: sum(run.value("restarts") or 0 for run in runs) for rule, runs in of_rule.items()
    }
    if told := [f"{count:g} of {rule}" for rule, count in restarts.items() if count]:
        yield (
            f"wall clocks have restarts in them, with the batches that each lost: {', '.join(told)}"
        )
    if told := [
        f"{shown(spread.mean, kind='s')} of {rule}"
        for rule in of_rule
        if (spread := _startup(group, rule))
    ]:
        yield (
            "wall clocks leave out start-up, which ends with each start's first batch:"
            f" {', '.join(told)}"
        )
    if looked := [
        rule for rule, runs in of_rule.items() if any(run.value("fidelity_s") for run in runs)
    ]:
        yield (
            "wall clocks leave out what comparing gradients with BPTT's took, in runs of"
            f" {', '.join(looked)}"
        )
        if others := [rule for rule in of_rule if rule not in looked]:
            told = (
                f"runs of {', '.join(looked)} compared gradients, and those of {', '.join(others)}"
                " did not"
            )
            yield (
                f"{told}: one that has may compute some 2 % slower from then on, so a difference as"
                " small is none"
            )
    if uncounted := [
        rule
        for rule, runs in of_rule.items()
        if any(run.value("peak_saved_bytes") is None for run in runs)
    ]:
        why = "no batch was whole on which bytes are counted"
        yield f"saved bytes were not measured in runs of {', '.join(uncounted)}, in which {why}"
    unknown = {name for runs in of_rule.values() for run in runs for name in _not_counted(run)}
    if unknown:
        yield (
            "operations, and the energy of an inference, leave out what no count knows:"
            f" {', '.join(sorted(unknown))}"
        )
    if group.has_baseline:
        yield from _divisions_told(
            group, {rule: {run.seed for run in runs} for rule, runs in of_rule.items()}
        )


def _startup(group: Group, rule: str) -> Spread | None:
    """Seconds of start-up, where there were any."""
    found = group.spread(rule, "startup_s")
    return found if found is not None and found.mean else None


def _divergence(run: StudyRun) -> str:
    """`went back 2 times as its training diverged`; empty where training did not diverge."""
    loss, back = (
        number((run.summary or {}).get("loss")),
        int(run.value("rollbacks") or 0),
    )  # StudyRun.value knows no NaN
    if run.state == "diverged":
        return "diverged"
    if run.is_finished and loss is not None and not math.isfinite(loss):
        return f"ended with a loss of {loss} in its evaluation"
    # A run also goes back for replicas that differ, and then skips nothing.
    if run.is_finished and back and run.value("skipped_batches"):
        return f"went back {counted(back, 'time')} as its training diverged"
    return ""


def what_to_change(recipe: Mapping[str, Any]) -> str:
    """In all recipes of a comparison of which one diverged."""
    return (
        f"{remedy(*(number(written(recipe, key)) for key in ('optimizer.lr', 'clip_norm')))} for"
        " every rule, and train again"
    )


def _not_counted(run: StudyRun) -> list[str]:
    """Products that the network made and nobody counted, in training or in an inference."""
    summary = run.summary or {}
    told = [summary.get("not_counted"), (summary.get("inference") or {}).get("not_counted")]
    return [str(name) for names in told if isinstance(names, list) for name in names]


def _divisions_told(group: Group, seeds: Mapping[str, set[int]]) -> Iterator[str]:
    """The faster BPTT, or that there is but one, and rules without a seed to divide by."""
    kinds = [rule for rule in seeds if is_baseline(rule, group.against)]
    is_compared = (
        group.against == BASELINE
        and len(seeds) > len(kinds)
        and any(run.recipe.get("time_steps") != 1 for run in group.finished)
    )
    if is_compared and kinds == [BASELINE]:
        yield FOLDED_ALONE
    if is_compared and not any(rule.startswith(RECOMPUTED) for rule in seeds):
        yield RECOMPUTES_NOTHING
    if group.fastest_baseline != group.against:
        yield (
            f"images/s, wall clock and compute time are divided by {group.fastest_baseline}'s, the"
            f" faster {group.against}"
        )
        divided = {
            group.against: "its top-1 and bytes are not divided",
            group.fastest_baseline: "its times are not divided",
        }
    else:
        divided = {group.against: "nothing of it is divided"}
    for rule in seeds:
        for base, what in divided.items():
            if not seeds[rule] & seeds[base]:
                yield f"{rule} has no seed in common with {base}, so {what}"
