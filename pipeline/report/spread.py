"""A quantity over the seeds of a rule: its mean, its spread, and the interval that the mean lies
in.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Over the seeds of a rule."""

    mean: float
    deviation: float | None
    """None of one run"""
    runs: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean, at 95 %: mean +- t(0.975, n - 1) deviation / sqrt(n); None of one run."""
        if self.deviation is None:
            return None
        reach = float(stats.t.ppf(0.975, self.runs - 1)) * self.deviation / self.runs**0.5
        return self.mean - reach, self.mean + reach


def spread_of(values: Sequence[float]) -> Spread | None:
    """None without values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), deviation=deviation, runs=len(values))
