"""The contrasts of 2^k designs, from their definitions."""

from __future__ import annotations

import itertools
import statistics

import pytest

from pipeline.report.effects import Weights, all_effects, effect

FACTORS = {"weights": ("fp", "1-bit"), "shortcut": ("block", "multiple"), "teacher": ("none", "kd")}
CELLS = list(itertools.product(*FACTORS.values()))
SCORE = dict(zip(CELLS, (3.0, 5.0, 8.0, 13.0, 21.0, 34.0, 55.0, 89.0), strict=True))


def value(weights: Weights) -> float:
    return sum(weight * SCORE[cell] for cell, weight in weights.items())


def mean(weights: str | None = None, shortcut: str | None = None, teacher: str | None = None) -> float:
    """Of the cells at these levels."""
    wanted = (weights, shortcut, teacher)
    return statistics.fmean(
        score for cell, score in SCORE.items() if all(w in (None, level) for w, level in zip(wanted, cell, strict=True))
    )


def test_main_effects_are_differences_of_means() -> None:
    assert value(effect(FACTORS, "weights")) == mean(weights="1-bit") - mean(weights="fp")
    assert value(effect(FACTORS, "teacher")) == mean(teacher="kd") - mean(teacher="none")


def test_an_interaction_is_a_difference_of_effects() -> None:
    at = {b: mean("1-bit", b) - mean("fp", b) for b in FACTORS["shortcut"]}
    assert value(effect(FACTORS, "weights", "shortcut")) == at["multiple"] - at["block"]
    assert effect(FACTORS, "weights", "shortcut") == effect(FACTORS, "shortcut", "weights")


def test_a_three_way_interaction_is_a_difference_of_interactions() -> None:
    def between(c: str) -> float:
        return (mean("1-bit", "multiple", c) - mean("fp", "multiple", c)) - (mean("1-bit", "block", c) - mean("fp", "block", c))

    assert value(effect(FACTORS, "weights", "shortcut", "teacher")) == between("kd") - between("none")
    assert value(effect(FACTORS, "weights", "shortcut", at={"teacher": "kd"})) == between("kd")


def test_effects_within_a_level() -> None:
    found = effect(FACTORS, "teacher", at={"weights": "1-bit"})
    assert value(found) == mean("1-bit", teacher="kd") - mean("1-bit", teacher="none") and len(found) == 4
    inside = effect(FACTORS, "teacher", at={"weights": "1-bit", "shortcut": "block"})
    assert inside == {("1-bit", "block", "kd"): 1, ("1-bit", "block", "none"): -1}


def test_all_of_them_by_name() -> None:
    found = all_effects(FACTORS)
    names = ["weights (1-bit - fp)", "shortcut (multiple - block)", "teacher (kd - none)"]
    names += ["weights x shortcut", "weights x teacher", "shortcut x teacher", "weights x shortcut x teacher"]
    assert list(found) == names and found["weights x teacher"] == effect(FACTORS, "weights", "teacher")
    assert list(all_effects(FACTORS, most=1)) == names[:3]
    assert all(sum(weights.values()) == 0 for weights in found.values())
    pairs = {tuple(weights.values()) for weights in found.values()}
    assert all(sum(a * b for a, b in zip(x, y, strict=True)) == 0 for x, y in itertools.combinations(pairs, 2))  # orthogonal


@pytest.mark.parametrize(
    ("of", "at", "said"),
    [
        (("weight",), {}, "must name factors of weights, shortcut, teacher, each once; got weight$"),
        ((), {}, "each once; got none$"),
        (("weights", "weights"), {}, "each once; got weights, weights$"),
        (("weights",), {"weights": "fp"}, "each once; got weights, weights$"),
        (("weights",), {"teacher": "tet"}, "teacher must be none or kd; got tet$"),
    ],
)
def test_what_is_no_effect_is_refused(of: tuple[str, ...], at: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        effect(FACTORS, *of, at=at)


def test_a_factor_of_other_than_two_levels_is_refused() -> None:
    for levels in (("a", "a"), ("a", "b", "c")):
        with pytest.raises(ValueError, match="a factor must have two levels; got weights="):
            all_effects({"weights": levels})
        with pytest.raises(ValueError, match="a factor must have two levels; got weights="):
            effect({"teacher": ("none", "kd"), "weights": levels}, "teacher", at={"weights": "a"})
