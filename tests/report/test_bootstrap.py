"""The bootstrap over groups against a slow one, closed forms, and the share of intervals that hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from pipeline.report.bootstrap import Tally, estimated, interval_over_splits, resampled, stretch_of_few, tally

CONTRASTS_CK = np.array([[1.0, 0.5, 1.0], [-1.0, 0.5, 0.0], [0.0, -1.0, -1.0]])


def answers(groups: int, draw: np.random.Generator, *, most: int = 6) -> tuple[NDArray, NDArray]:
    """Group names and right answers of three cells for groups of 1 to `most` questions, in no order."""
    group_N = draw.permutation(np.repeat([f"g{i}" for i in range(groups)], draw.integers(1, most + 1, groups)))
    return group_N, draw.random((len(group_N), 3)) < [0.3, 0.5, 0.8]


def test_counts_by_group() -> None:
    found = tally(np.array(["b", "a", "b", "b"]), np.array([[1, 0], [1, 1], [0, 0], [1, 1]], bool))
    assert found.questions_G.tolist() == [1, 3] and found.right_GC.tolist() == [[1, 1], [2, 1]]


def slow(splits: list[tuple[NDArray, NDArray]], weights_CK: NDArray, *, resamples: int, draws: list[NDArray]) -> NDArray:
    """A pile of questions for each resample, group by group, and then plain means."""
    values = []
    for r in range(resamples):
        of_splits = []
        for (group_N, right_NC), drawn_RG in zip(splits, draws, strict=True):
            pile = []
            for name, times in zip(sorted(set(group_N)), drawn_RG[r], strict=True):
                for _ in range(times):
                    pile += [right_NC[n] for n in range(len(group_N)) if group_N[n] == name]
            of_splits.append(np.mean(pile, axis=0))
        a_C = sum(of_splits) / len(of_splits)
        values.append([sum(w * a for w, a in zip(w_C, a_C, strict=True)) for w_C in weights_CK.T])
    return np.array(values)


def test_a_slow_bootstrap_finds_the_same() -> None:
    draw = np.random.default_rng(3)
    splits = [answers(5, draw), answers(9, draw)]
    tallies = [tally(*each) for each in splits]
    found = resampled(tallies, CONTRASTS_CK, resamples=40, seed=11)
    again = np.random.default_rng(11)
    draws = [again.multinomial(groups, [1 / groups] * groups, size=40) for groups in (5, 9)]
    np.testing.assert_allclose(found, slow(splits, CONTRASTS_CK, resamples=40, draws=draws), atol=1e-12)
    once = [np.ones((1, groups), int) for groups in (5, 9)]
    points_SK = estimated(tallies, CONTRASTS_CK)
    np.testing.assert_allclose(points_SK.mean(0), slow(splits, CONTRASTS_CK, resamples=1, draws=once)[0])
    np.testing.assert_allclose(points_SK[1], slow(splits[1:], CONTRASTS_CK, resamples=1, draws=once[1:])[0])


def test_effective_groups() -> None:
    """As many as there are where all have one size; one large group of many small ones counts for all that it outweighs."""
    right_N2 = np.zeros((12, 2), bool)
    assert tally(np.repeat(list("abc"), 4), right_N2).effective_groups == 3
    assert tally(np.array(list("aaaaaaaaabcd")), right_N2).effective_groups == 12**2 / (9**2 + 3)


def test_other_draws_of_whole_groups_are_distributed_alike() -> None:
    """Groups chosen one by one with replacement, from another generator."""
    draw = np.random.default_rng(4)
    splits = [answers(7, draw), answers(5, draw)]
    draws = []
    for groups in (7, 5):
        chosen = [draw.choice(groups, groups) for _ in range(1000)]
        draws.append(np.array([np.bincount(each, minlength=groups) for each in chosen]))
    other = slow(splits, CONTRASTS_CK, resamples=1000, draws=draws)
    found = resampled([tally(*each) for each in splits], CONTRASTS_CK, resamples=20_000, seed=0)
    for q in (0.025, 0.5, 0.975):
        x_K = np.quantile(found, q, axis=0) + 1e-9  # values stand in heaps; rounding must not divide one
        shares_K, others_K = ((each <= x_K).mean(0) for each in (found, other))
        assert (abs(shares_K - others_K) < 4 * np.sqrt(shares_K * (1 - shares_K) / 1000)).all()


def test_the_variance_for_groups_of_one_size_is_the_closed_form() -> None:
    """1/S^2 sum_s var_g(d) / G_s, with d the difference within a group, and var that of the groups in hand (not G_s - 1)."""
    draw = np.random.default_rng(5)
    tallies = [Tally(np.full(groups, 4.0), draw.integers(0, 5, (groups, 3)).astype(float)) for groups in (15, 40)]
    found_K = resampled(tallies, CONTRASTS_CK, resamples=40_000, seed=1).var(0)
    expected_K = sum(((each.right_GC / 4) @ CONTRASTS_CK).var(0) / len(each.questions_G) for each in tallies) / 4
    assert found_K == pytest.approx(expected_K, rel=0.03)  # 4 standard errors: sqrt(2 / 40000) each


def test_the_seed_decides() -> None:
    tallies = [tally(*answers(9, np.random.default_rng(6)))]
    one, same, other = (resampled(tallies, CONTRASTS_CK, resamples=10, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def study(draw: np.random.Generator) -> list[tuple[NDArray, NDArray]]:
    """Two splits of 30 objects, 6 scenes of each. Some are hard, and some harder for the second cell, by 0.1 in the mean."""
    splits = []
    for _ in range(2):
        hard_G, harder_G = draw.uniform(0.4, 0.8, 30), draw.uniform(-0.2, 0.4, 30)
        chance_GC = np.stack([hard_G, hard_G - harder_G], axis=1)
        right_GnC = draw.random((30, 6, 2)) < chance_GC[:, None]
        splits.append((np.repeat(np.arange(30), 6), right_GnC.reshape(-1, 2)))
    return splits


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw, weights_CK, studies, held = np.random.default_rng(7), np.array([[1.0], [-1.0]]), 300, 0
    for _ in range(studies):
        tallies = [tally(*split) for split in study(draw)]
        low, high = np.percentile(resampled(tallies, weights_CK, resamples=300, seed=0), (2.5, 97.5))
        held += low <= 0.1 <= high
    assert abs(held / studies - 0.95) < 3 * math.sqrt(0.95 * 0.05 / studies)


def test_whoever_takes_scenes_of_one_object_for_independent_is_too_sure() -> None:
    splits, weights_CK = study(np.random.default_rng(8)), np.array([[1.0], [-1.0]])
    alone = [(np.arange(len(group_N)), right_NC) for group_N, right_NC in splits]
    objects, scenes = (
        resampled([tally(*split) for split in each], weights_CK, resamples=1000, seed=0).std() for each in (splits, alone)
    )
    # Of a difference the variance is 2 p (1 - p) = 0.49 of scenes, and n times 0.6^2 / 12 = 0.03 of objects of n scenes.
    assert 1.05 < objects / scenes < 1.5


def test_an_interval_of_few_groups_covers_as_often_as_it_says() -> None:
    """Two equally good cells on 3 splits of 6 groups, which differ in how well each group suits each cell: 95 % of intervals over
    groups must hold 0. Without the stretch fewer do, by more than chance."""
    draw = np.random.default_rng(0)
    studies, questions = 600, 20
    inside = np.zeros(2)
    for _ in range(studies):
        tallies = [
            Tally(np.full(6, float(questions)), draw.binomial(questions, draw.uniform(0, 1, (6, 2))) + 0.0) for _ in range(3)
        ]
        weights_CK = np.array([[1.0], [-1.0]])
        point = estimated(tallies, weights_CK).mean()
        low, high = np.percentile(resampled(tallies, weights_CK, resamples=400, seed=1), [2.5, 97.5])
        for number, stretch in enumerate((1.0, stretch_of_few(tallies))):
            inside[number] += point + stretch * (low - point) <= 0 <= point + stretch * (high - point)
    assert inside[0] / studies < 0.93
    assert abs(inside[1] / studies - 0.95) < 0.02


def test_the_interval_over_splits_is_students() -> None:
    points_S = np.array([1.0, 4.0, 2.5])
    expected = stats.ttest_1samp(points_S, 0).confidence_interval(0.95)
    assert interval_over_splits(points_S) == pytest.approx((expected.low, expected.high))
    assert interval_over_splits(points_S[:1]) is None
