"""Groups of comparable runs, and the statistics of each rule in a group.

    study.groups[0].spread("SLTT", "peak_saved_bytes")   mean and standard deviation over seeds
    study.groups[0].ratios("SLTT", "peak_saved_bytes")   over the baseline, seed by seed

Values of different groups form no ratios, because their study keys or conditions differ. There is
one exception: `tables.scaling` compares groups that differ only in the number of workers.
"""

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from pipeline.core.errors import remedy
from pipeline.core.units import counted, format_quantity
from pipeline.recipe import BASELINE, is_baseline
from pipeline.report.metrics import COMPUTE
from pipeline.report.results import Run, comparison_key, flat
from pipeline.report.selection import recipe_value, tuned_keys
from pipeline.track.journal import number

if TYPE_CHECKING:
    from pipeline.report.claims import Claim

WITHIN = 0.7  # points of accuracy: the largest loss that SLTT and OTTT claim
_TIME_METRICS = (COMPUTE, "wall_s", "net_s", "images_per_s")
FOLDED_ALONE = (
    f"times are divided by those of {BASELINE} folded over time; no {BASELINE} in slices of time,"
    " which may be faster, has finished"
)
RECOMPUTED = f"{BASELINE}-recompute"
RECOMPUTES_NOTHING = (
    f"bytes are divided by those of {BASELINE} without recomputation; no {RECOMPUTED}, which stores"
    " fewer bytes, has finished"
)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A quantity over the seeds of a rule."""

    mean: float
    deviation: float | None  # None for one run
    runs: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean: mean ± t(0.975, n - 1) deviation / √n.

        None for one run.
        """
        if self.deviation is None:
            return None
        from scipy import stats

        half_width = float(stats.t.ppf(0.975, self.runs - 1)) * self.deviation / self.runs**0.5
        return self.mean - half_width, self.mean + half_width


def spread_of(values: Sequence[float]) -> Spread | None:
    """The spread of some values; None if there are none."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), deviation=deviation, runs=len(values))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Baseline minus rule in points of accuracy, paired by seed, with the 95 % interval.

    d_i = top1(baseline, seed i) - top1(rule, seed i). Runs of one seed share initial weights and
    sample order, so most of the seed's effect cancels in the difference. The interval covers the
    variation between seeds, but not the sampling of the test set.
    """

    baseline: str
    rule: str
    seeds: int
    mean: float
    low: float
    high: float
    diverged: int = 0  # further seeds in which the baseline finished and the rule diverged

    def verdict(self, within: float) -> Literal["holds", "fails", "is undecided"]:
        """Compare the interval with the tolerated loss of `within` points.

        The verdict is "fails" if the rule diverged in a seed, or if no part of the interval is
        within the tolerance. Otherwise it is "holds" if the whole interval is within the tolerance,
        and "is undecided" if only a part is.
        """
        if self.diverged:
            return "fails"
        if self.high <= within:
            return "holds"
        return "fails" if self.low > within else "is undecided"

    def text(self, within: float) -> str:
        lost = f" ({self.diverged} more diverged)" if self.diverged else ""
        return (
            f"{self.baseline} - {self.rule}: {self.mean:+.2f} points over {self.seeds} paired "
            f"seeds{lost}, 95 % interval {self.low:+.2f} to {self.high:+.2f}; the claim (at most "
            f"{within:g} points below) {self.verdict(within)}"
        )


@dataclass(frozen=True)
class Group:
    """Comparable runs: they share a study key and their training conditions."""

    runs: tuple[Run, ...]  # runs of the baseline first
    against: str = BASELINE
    within: float = WITHIN
    page_rules: tuple[str, ...] = ()  # of all groups of a page, which give each rule one colour

    @property
    def study(self) -> str:
        return self.runs[0].study

    @property
    def key(self) -> str:
        """A digest of the runs' `comparison_key`. It does not depend on other groups."""
        return f"g{hashlib.sha256(comparison_key(self.runs[0]).encode()).hexdigest()[:8]}"

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.is_finished)

    @property
    def rules(self) -> list[str]:
        """The rules of all runs, the baseline first."""
        return list(dict.fromkeys(run.rule for run in self.runs))

    def place_of(self, rule: str) -> int:
        """The position of a rule among all rules of the page, which decides its colour."""
        return (self.page_rules or self.rules).index(rule)

    @property
    def finished_rules(self) -> list[str]:
        return list(dict.fromkeys(run.rule for run in self.finished))

    @property
    def has_baseline(self) -> bool:
        return self.against in self.finished_rules

    @property
    def undivided(self) -> str:
        """The reason why the group has no ratios; empty if a run of the baseline has finished."""
        labelled = [run for run in self.runs if run.rule.startswith(f"{self.against} (")]
        if self.has_baseline:
            return ""
        if any(run.is_finished for run in labelled):
            fields = ", ".join(_differing(labelled))
            return f"several {self.against}s with different {fields}; name one"
        return f"no finished run of {self.against} is shown"

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(_notes(self))

    @property
    def differences(self) -> list[Difference]:
        """The difference of each rule that shares at least two seeds with the baseline."""
        differences: list[Difference] = []
        for rule in (rule for rule in self.rules if rule != self.against):
            loss = self.loss(rule)
            if loss is not None and loss.interval is not None:
                low, high = loss.interval
                differences.append(
                    Difference(
                        baseline=self.against,
                        rule=rule,
                        seeds=loss.runs,
                        mean=loss.mean,
                        low=low,
                        high=high,
                        diverged=self.lost(rule),
                    )
                )
        return differences

    def loss(self, rule: str) -> Spread | None:
        """Baseline minus rule in points of accuracy, over paired seeds; None if none is common."""
        base, top1 = (self.by_seed(each, "top1") for each in (self.against, rule))
        return spread_of([100 * (base[seed] - top1[seed]) for seed in base if seed in top1])

    def of(self, rule: str) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.rule == rule)

    def diverged(self, rule: str) -> set[int]:
        """The seeds in which a run of the rule diverged and none finished."""
        seeds = {run.seed for run in self.of(rule) if run.state == "diverged"}
        return seeds - self.by_seed(rule, "top1").keys()

    def lost(self, rule: str) -> int:
        """The number of the baseline's finished seeds in which the rule diverged."""
        return len(self.diverged(rule) & self.by_seed(self.against, "top1").keys())

    def describe_lost(self, rule: str) -> str:
        """A text such as `diverged in 2 of BPTT's 3 seeds`, or an empty text."""
        lost, seeds = self.lost(rule), len(self.by_seed(self.against, "top1"))
        return f"diverged in {lost} of {self.against}'s {counted(seeds, 'seed')}" if lost else ""

    def values(self, rule: str, name: str) -> list[tuple[int, float]]:
        """The seed and the value of each finished run of the rule that has the quantity.

        Args:
            name: a metric, or the dotted path of a number in the summaries.
        """
        values = [(run.seed, run.value(name)) for run in self.of(rule) if run.is_finished]
        return [(seed, value) for seed, value in values if value is not None]

    def spread(self, rule: str, name: str) -> Spread | None:
        """The spread over the rule's finished runs; None if no run has the quantity."""
        return spread_of([value for _, value in self.values(rule, name)])

    def by_seed(self, rule: str, name: str) -> dict[int, float]:
        """The mean over the finished runs of each seed."""
        by_seed: dict[int, list[float]] = {}
        for seed, value in self.values(rule, name):
            by_seed.setdefault(seed, []).append(value)
        return {seed: statistics.fmean(values) for seed, values in sorted(by_seed.items())}

    def paired(self, rule: str, name: str) -> dict[int, float]:
        """The ratio to the rule `base_of(name)` in the same seed, by seed."""
        base = self.by_seed(self.base_of(name), name)
        return {
            seed: value / base[seed]
            for seed, value in self.by_seed(rule, name).items()
            if base.get(seed)
        }

    def ratios(self, rule: str, name: str) -> Spread | None:
        """The spread of `paired`; None if no seed is common."""
        return spread_of(list(self.paired(rule, name).values()))

    def base_of(self, name: str) -> str:
        """The rule that a quantity is divided by: the faster BPTT for time and speed, else the
        baseline.
        """
        return self.fastest_baseline if name in _TIME_METRICS else self.against

    @cached_property
    def fastest_baseline(self) -> str:
        """The fastest form of the baseline: BPTT folded over time, or BPTT in slices of time.

        The mean times are over the common seeds. Without a common seed, each form's mean is over
        all seeds of the form.
        """
        times = {
            rule: seconds
            for rule in self.rules
            if is_baseline(rule, self.against) and (seconds := self.by_seed(rule, COMPUTE))
        }
        if self.against not in times:
            return self.against
        shared = set.intersection(*map(set, times.values()))
        means = {
            rule: statistics.fmean(seconds[seed] for seed in shared or seconds)
            for rule, seconds in times.items()
        }
        return min(means, key=lambda rule: means[rule])


@dataclass(frozen=True, kw_only=True)
class Study:
    """The runs of a page, with claims and sweeps."""

    title: str
    runs: tuple[Run, ...]
    against: str = BASELINE
    within: float = WITHIN
    claims: "tuple[Claim, ...]" = ()
    sweeps: tuple[Mapping[str, Any], ...] = ()  # outputs of `spiketrain sweep --format json`
    notes: tuple[str, ...] = ()
    printed: str = ""  # the text that the suite's own report printed

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups in descending number of rules, and then in the order of the runs."""
        by_key: dict[str, list[Run]] = {}
        for run in self.runs:
            by_key.setdefault(comparison_key(run), []).append(run)
        groups: list[Group] = []
        for runs in by_key.values():
            labelled = _with_distinct_labels(runs)
            labelled.sort(key=lambda run: place(run, self.against))
            groups.append(Group(tuple(labelled), self.against, self.within))
        groups.sort(key=lambda group: -len(group.rules))
        others = sorted({rule for group in groups for rule in group.rules} - {self.against})
        rules = (self.against, *others)
        return tuple(replace(group, page_rules=rules) for group in groups)


def place(run: Run, against: str) -> tuple[bool, str, int, str]:
    """A sort key: runs of the baseline come first."""
    return run.rule != against, run.rule, run.seed, run.name


def _with_distinct_labels(runs: Sequence[Run]) -> list[Run]:
    """Extend equal labels of different rules by the values that distinguish the rules.

    Examples are SLTT-1 with and without rescaling, or two values of a tuned field.
    """
    fields = {
        rule: _differing([run for run in runs if run.rule == rule])
        for rule in {run.rule for run in runs}
    }
    labelled: list[Run] = []
    for run in runs:
        values = [
            text for name, text in _label_values(run.recipe).items() if name in fields[run.rule]
        ]
        labelled.append(replace(run, rule=f"{run.rule} ({', '.join(values)})") if values else run)
    return labelled


def _differing(runs: Sequence[Run]) -> list[str]:
    values = pd.DataFrame([_label_values(run.recipe) for run in runs])
    return list(values.columns[values.nunique() > 1])


def _label_values(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The rule's keywords and the value of each tuned field, as text."""
    rule = recipe.get("rule")
    tuned = {key: f"{key}={recipe_value(recipe, key)}" for key in tuned_keys(recipe)}
    if not isinstance(rule, Mapping):
        return tuned
    return {"keywords": _keywords(rule) or "defaults", **tuned}


def _keywords(part: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={_python(value)}" for name, value in (part.get("kwargs") or {}).items()
    )


def _python(value: Any) -> str:
    """A part of a recipe in Python notation: `SLTT(k=1)`."""
    if not isinstance(value, Mapping) or "target" not in value:
        return str(value)
    return f"{str(value['target']).rpartition('.')[2]}({_keywords(value)})"


def _notes(group: Group) -> Iterator[str]:
    finished = {
        rule: [run for run in group.of(rule) if run.is_finished] for rule in group.finished_rules
    }
    for rule, (run, *_) in finished.items():
        part = run.recipe.get("rule")
        if isinstance(part, Mapping) and (keywords := _keywords(part)) and keywords not in rule:
            yield f"{rule} is {_python(part)}"
    for run in group.runs:
        if problem := _divergence(run):
            lr, clip_norm = (recipe_value(run.recipe, key) for key in ("optimizer.lr", "clip_norm"))
            yield (
                f"{run.name} ({run.rule}) {problem}: a comparison of rules must not use its values;"
                f" {remedy(lr, clip_norm)} for every rule, and train again"
            )
    commits = sorted({commit for run in group.finished for commit in run.commits})
    if len(commits) > 1:
        yield f"the runs have different commits: {', '.join(commits)}"
    for (rule, seed), count in Counter((run.rule, run.seed) for run in group.finished).items():
        if count > 1:
            yield (
                f"{rule} has {count} runs of seed {seed}: ratios and differences use their mean as"
                " one run"
            )
    yield from _notes_on_clocks(group)
    if uncounted := [
        rule
        for rule, runs in finished.items()
        if len(group.values(rule, "peak_saved_bytes")) < len(runs)
    ]:
        yield (
            f"saved bytes were not measured in runs of {', '.join(uncounted)}, because no batch"
            " with counted bytes was completed"
        )
    if unknown := {
        str(name)
        for summary in (flat(run.summary or {}) for run in group.finished)
        for path in ("not_counted", "inference.not_counted")
        for name in summary.get(path) or ()
    }:
        yield (
            "operations and the energy of an inference exclude operators without a known count:"
            f" {', '.join(sorted(unknown))}"
        )
    if group.has_baseline:
        yield from _notes_on_divisions(group)


def _notes_on_clocks(group: Group) -> Iterator[str]:
    rules = group.finished_rules
    totals = {rule: sum(value for _, value in group.values(rule, "restarts")) for rule in rules}
    if texts := [f"{count:g} of {rule}" for rule, count in totals.items() if count]:
        yield f"wall clocks include restarts and the batches that they repeat: {', '.join(texts)}"
    startups = {rule: group.spread(rule, "startup_s") for rule in rules}
    if texts := [
        f"{format_quantity(startup.mean, kind='s')} of {rule}"
        for rule, startup in startups.items()
        if startup is not None and startup.mean > 0
    ]:
        yield (
            "wall clocks exclude start-up, which ends with the first batch of each start:"
            f" {', '.join(texts)}"
        )
    with_fidelity = [
        rule for rule in rules if any(value for _, value in group.values(rule, "fidelity_s"))
    ]
    without = [rule for rule in rules if rule not in with_fidelity]
    if with_fidelity:
        yield (
            "wall clocks exclude the time of comparisons with BPTT's gradient, in runs of"
            f" {', '.join(with_fidelity)}"
        )
    if with_fidelity and without:
        yield (
            f"runs of {', '.join(with_fidelity)} compared gradients, runs of {', '.join(without)}"
            " did not: a comparison can slow the later batches by about 2 %, so smaller differences"
            " of time mean nothing"
        )


def _divergence(run: Run) -> str:
    """A text such as `diverged and was rolled back 2 times`, or an empty text."""
    loss = number((run.summary or {}).get("loss"))
    if run.state == "diverged":
        return "diverged"
    if loss is not None and not math.isfinite(loss):
        return f"ended with an evaluation loss of {loss}"
    # Differing replicas also cause a rollback, but then no batch is skipped.
    if (rollbacks := run.value("rollbacks")) and run.value("skipped_batches"):
        return f"diverged and was rolled back {counted(int(rollbacks), 'time')}"
    return ""


def _notes_on_divisions(group: Group) -> Iterator[str]:
    seeds = {
        rule: {run.seed for run in group.of(rule) if run.is_finished}
        for rule in group.finished_rules
    }
    kinds = [rule for rule in seeds if is_baseline(rule, group.against)]
    has_time = any(run.recipe.get("time_steps") != 1 for run in group.finished)
    if group.against == BASELINE and len(seeds) > len(kinds) and has_time:
        if kinds == [BASELINE]:
            yield FOLDED_ALONE
        if not any(rule.startswith(RECOMPUTED) for rule in seeds):
            yield RECOMPUTES_NOTHING
    faster = group.fastest_baseline
    missing = {group.against: "it has no ratios"}
    if faster != group.against:
        yield (
            f"images/s, wall clock and compute time are divided by those of {faster}, the faster"
            f" {group.against}"
        )
        missing = {
            group.against: "its top-1 and bytes have no ratios",
            faster: "its times have no ratios",
        }
    for rule in seeds:
        for base, consequence in missing.items():
            if not seeds[rule] & seeds[base]:
                yield f"{rule} has no seed in common with {base}, so {consequence}"
