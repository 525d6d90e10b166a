"""Differences of accuracy between networks that were asked the same questions, resampled over groups of questions.

The questions come in groups (several scenes of one object), and groups in splits. One resample draws, within each split, as many
groups as it has, with replacement; all questions of a group come together, and every cell (a network) is judged on the same draw:

    a[c]   = mean over splits s of  sum_g m[s,g] right[s,g,c] / sum_g m[s,g] questions[s,g],      m[s] ~ multinomial(G_s, 1/G_s)
    value  = sum_c w[c] a[c]

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentiles); Davison & Hinkley 1997, Bootstrap Methods
and their Application, ch. 3 (strata, and groups drawn whole).

R resamples, S splits, G groups of a split, N questions of a split, C cells, K contrasts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Tally:
    """Of one split: how many questions each group has, and how many of them each cell answered right."""

    questions_G: Floats
    right_GC: Floats

    @property
    def effective_groups(self) -> float:
        """How many groups of one size would leave a mean as uncertain (Kish 1965): fewer than G where their sizes differ."""
        return float(self.questions_G.sum() ** 2 / (self.questions_G**2).sum())


def tally(group_N: NDArray[Any], right_NC: NDArray[np.bool_]) -> Tally:
    """Count by group; groups in the order of their names."""
    _, number_N, questions_G = np.unique(group_N, return_inverse=True, return_counts=True)
    right_GC = np.zeros((len(questions_G), right_NC.shape[1]))
    np.add.at(right_GC, number_N, right_NC)
    return Tally(questions_G.astype(np.float64), right_GC)


def estimated(tallies: Sequence[Tally], weights_CK: Floats) -> Floats:
    """The values `[S,K]` in each split on all groups, each once."""
    return np.concatenate([_values(each, weights_CK, np.ones((1, len(each.questions_G)))) for each in tallies])


def resampled(tallies: Sequence[Tally], weights_CK: Floats, *, resamples: int, seed: int) -> Floats:
    """The values `[R,K]` of as many draws."""
    draw = np.random.default_rng(seed)
    return np.mean([_values(each, weights_CK, _drawn(len(each.questions_G), resamples, draw)) for each in tallies], axis=0)


def stretch_of_few(tallies: Sequence[Tally]) -> float:
    """By how much percentiles must stand further from the estimate, because there are few groups.

    Resamples of G groups vary less than groups do, by the factor 1 - 1/G, and their percentiles are those of a normal
    distribution where Student's are due (Hesterberg 2014, arXiv:1411.5279). G is the effective number.
    """
    groups_S = np.array([each.effective_groups for each in tallies])
    freedom = float((groups_S - 1).sum())
    return float(stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975) / np.sqrt((1 - 1 / groups_S).mean()))


def interval_over_splits(points_S: Floats) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean over splits from how the splits differ; None of one split.

    Whatever differs between splits is in it, other seeds of training too: wide, for there are few splits.
    """
    if len(points_S) < 2:
        return None
    half = stats.t.ppf(0.975, len(points_S) - 1) * points_S.std(ddof=1) / np.sqrt(len(points_S))
    return float(points_S.mean() - half), float(points_S.mean() + half)


def _drawn(groups: int, resamples: int, draw: np.random.Generator) -> Floats:
    """How often each group is in each resample: `[R,G]`."""
    return draw.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(np.float64)


def _values(one: Tally, weights_CK: Floats, drawn_RG: Floats) -> Floats:
    # Cells are subtracted while they are whole numbers: alike cells leave exactly nothing.
    return drawn_RG @ (one.right_GC @ weights_CK) / (drawn_RG @ one.questions_G)[:, None]
