"""How far a rule is from the baseline, from runs that share everything but the rule: seed by seed,
with its interval.

    d_i = top1(baseline, seed i) - top1(rule, seed i),     mean d with its 95 % interval (spread.py)

Runs of one seed begin with the same weights and see the same order, so most of what a seed does is
in both and drops out. The interval is over seeds; that the test set is itself a sample is in it
only as far as it acts on the difference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.report.spread import spread_of

WITHIN = 0.7  # points of accuracy: what SLTT and OTTT claim to lose at most


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Baseline minus rule in points of accuracy, with the 95 % interval of its mean."""

    baseline: str
    rule: str
    seeds: int
    mean: float
    low: float
    high: float
    diverged: int = 0
    """more seeds, in which the baseline finished and the rule diverged: in no mean"""

    def verdict(self, within: float) -> Literal["holds", "fails", "is undecided"]:
        """Whether "at most `within` points below the baseline" is true of the whole interval, of
        none of it, or of a part.

        A rule that diverged lost more than any points, whatever the seeds say in which it did not.
        """
        if self.diverged:
            return "fails"
        if self.high <= within:
            return "holds"
        return "fails" if self.low > within else "is undecided"

    def text(self, within: float) -> str:
        lost = f" of those that did not diverge, as {self.diverged} did" if self.diverged else ""
        return (
            f"{self.baseline} - {self.rule}: {self.mean:+.2f} points over {self.seeds} paired"
            f" seeds{lost}, 95 % interval {self.low:+.2f} to {self.high:+.2f}; at most {within:g}"
            f" points below {self.verdict(within)}"
        )


def paired_difference(
    baseline: Mapping[int, float],
    rule: Mapping[int, float],
    *,
    names: tuple[str, str],
    diverged: int = 0,
) -> Difference | None:
    """From top-1 in 0..1 by seed; None with fewer than two seeds in common. `diverged`: see
    `Difference`.
    """
    found = spread_of(
        [100 * (baseline[seed] - rule[seed]) for seed in sorted(baseline.keys() & rule.keys())]
    )
    if found is None or found.interval is None:
        return None
    low, high = found.interval
    baseline_name, rule_name = names
    return Difference(
        baseline=baseline_name,
        rule=rule_name,
        seeds=found.runs,
        mean=found.mean,
        low=low,
        high=high,
        diverged=diverged,
    )
