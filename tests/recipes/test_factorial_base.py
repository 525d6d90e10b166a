"""Effects in a factorial study: their definitions, the bootstrap over groups, and the share of
intervals that hold the truth.
"""

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats

from pipeline.recipe.recipe import spec, write_json
from pipeline.train.evaluation import Predictions, write_predictions
from recipes.compare.factorial_base import all_effects, effect, factorial, read_right
from tests.helpers.small import small_recipe

FACTORS = {"weights": ("fp", "1-bit"), "shortcut": ("block", "multiple"), "teacher": ("none", "kd")}
CELLS = list(itertools.product(*FACTORS.values()))
NAMES = [", ".join(cell) for cell in CELLS]
SCENES = 8  # of each object
A_MINUS_B = {"a - b": {("a",): 1.0, ("b",): -1.0}}


def value(weights: dict, of: tuple[float, ...]) -> float:
    return sum(weight * of[CELLS.index(cell)] for cell, weight in weights.items())


def test_effects_by_their_definitions() -> None:
    score = (3.0, 5.0, 8.0, 13.0, 21.0, 34.0, 55.0, 89.0)
    cube = np.array(score).reshape(2, 2, 2)
    by_weights = cube[1] - cube[0]
    by_both = by_weights[1] - by_weights[0]
    for weights, expected in (
        (effect(FACTORS, "weights"), by_weights.mean()),
        (effect(FACTORS, "weights", "shortcut"), by_both.mean()),
        (effect(FACTORS, "weights", "shortcut", "teacher"), by_both[1] - by_both[0]),
        (
            effect(FACTORS, "teacher", at={"weights": "1-bit"}),
            (cube[1, :, 1] - cube[1, :, 0]).mean(),
        ),
    ):
        assert value(weights, score) == expected
    assert list(all_effects(FACTORS)) == [
        "weights (1-bit - fp)",
        "shortcut (multiple - block)",
        "teacher (kd - none)",
        "weights x shortcut",
        "weights x teacher",
        "shortcut x teacher",
        "weights x shortcut x teacher",
    ]


def study(right_of, objects: int = 12) -> dict[str, pd.DataFrame]:
    """Splits "0" and "1": `right_of(levels, number)` of an object's 8 scenes are answered right by
    a cell.
    """
    levels = list(itertools.product((0, 1), repeat=3))
    right = {}
    for split in "01":
        columns = {
            name: [
                scene < right_of(of, number) for number in range(objects) for scene in range(SCENES)
            ]
            for name, of in zip(NAMES, levels, strict=True)
        }
        right[split] = pd.DataFrame(
            columns, index=np.repeat([f"{split}/{n}" for n in range(objects)], SCENES)
        )
    return right


def test_an_additive_design_comes_out_exactly() -> None:
    """How easy an object is drops out of the interval, because cells are judged on the same
    draw.
    """
    right = study(lambda levels, number: number % 4 + levels[0] + 2 * levels[1] + levels[2])
    found = factorial(right, all_effects(FACTORS), resamples=500).contrasts
    assert found["points"].tolist() == [12.5, 25, 12.5, 0, 0, 0, 0]
    assert found["points"].tolist() == found["low"].tolist() == found["high"].tolist()


def test_splits_count_alike_whatever_their_size() -> None:
    right = {
        "0": pd.DataFrame(
            {"a": [True] * 16, "b": [True, False] * 8}, index=np.repeat(["p", "q"], 8)
        ),
        "1": pd.DataFrame(
            {"a": [True, False, False, False] * 20, "b": [True, False] * 40},
            index=np.repeat(list("0123456789"), 8),
        ),
    }
    found = factorial(right, A_MINUS_B)
    assert found.cells["mean"].tolist() == [62.5, 50]
    assert found.contrasts["points"].tolist() == [12.5]
    assert found.sizes["groups"].tolist() == found.sizes["effective"].tolist() == [2, 10]


def made(draw: np.random.Generator, groups: int, chance: NDArray | None = None) -> pd.DataFrame:
    """Answers of cells "a" and "b" to groups of 1 to 6 samples, or of 6 where `chance[g, c]` is
    given.
    """
    sizes = draw.integers(1, 7, groups) if chance is None else np.full(groups, 6)
    chance_NC = (
        np.full((sizes.sum(), 2), (0.3, 0.7)) if chance is None else np.repeat(chance, 6, axis=0)
    )
    return pd.DataFrame(
        draw.random(chance_NC.shape) < chance_NC,
        columns=["a", "b"],
        index=np.repeat(np.arange(groups), sizes),
    )


def test_a_slow_bootstrap_finds_the_same_interval() -> None:
    """Piles of samples, group by group, for the same draws."""
    draw, again = np.random.default_rng(3), np.random.default_rng(11)
    right = {"0": made(draw, 5), "1": made(draw, 9)}
    points, by_split = [], {}
    for split, frame in right.items():
        groups = [frame.loc[[name]] for name in sorted(set(frame.index))]
        drawn = again.multinomial(len(groups), [1 / len(groups)] * len(groups), size=40)
        piles = [
            pd.concat([each for each, n in zip(groups, row, strict=True) for _ in range(n)])
            for row in drawn
        ]
        points.append([100 * (pile["a"].mean() - pile["b"].mean()) for pile in piles])
        by_split[split] = 100 * (frame["a"].mean() - frame["b"].mean())
    found = factorial(right, A_MINUS_B, resamples=40, seed=11)
    row = found.contrasts.iloc[0]
    estimate = np.mean(list(by_split.values()))
    assert {split: row[split] for split in right} == pytest.approx(by_split)
    effective = [len(f) ** 2 / (f.groupby(level=0).size() ** 2).sum() for f in right.values()]
    assert found.sizes["effective"].tolist() == pytest.approx(effective)
    widening = (
        stats.t.ppf(0.975, sum(effective) - 2)
        / 1.959963984540054
        / math.sqrt(1 - np.mean(1 / np.array(effective)))
    )
    low, high = np.percentile(np.mean(points, axis=0), (2.5, 97.5))
    assert (row["low"], row["high"]) == pytest.approx(
        (estimate + widening * (low - estimate), estimate + widening * (high - estimate))
    )
    students = stats.ttest_1samp(list(by_split.values()), 0).confidence_interval(0.95)
    assert (row["splits_low"], row["splits_high"]) == pytest.approx((students.low, students.high))
    assert factorial(right, A_MINUS_B, resamples=40, seed=12).contrasts["low"].iloc[0] != row["low"]


def test_intervals_of_few_groups_hold_the_truth_as_often_as_they_say() -> None:
    """Two equally good cells on 3 splits of 6 groups, which differ in how well each group suits
    each cell.
    """
    draw, studies, held = np.random.default_rng(0), 300, 0
    for _ in range(studies):
        found = factorial(
            {s: made(draw, 6, draw.uniform(0, 1, (6, 2))) for s in "012"}, A_MINUS_B, resamples=300
        ).contrasts
        held += bool((found["low"] <= 0).all() and (found["high"] >= 0).all())
    assert abs(held / studies - 0.95) < 3 * math.sqrt(0.95 * 0.05 / studies)


def test_the_tables() -> None:
    right = {"0": made(np.random.default_rng(1), 12), "1": made(np.random.default_rng(2), 12)}
    found, out = factorial(right, A_MINUS_B), io.StringIO()
    found.render(Console(file=out, width=110), by="object")
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert f"a {' '.join(f'{share:.2f}%' for share in found.cells.loc['a'])}" in lines
    row = found.contrasts.iloc[0]
    assert (
        f"a - b {row['0']:+.2f} {row['1']:+.2f} {row['points']:+.2f} {row['low']:+.2f} to"
        f" {row['high']:+.2f} excludes 0 {row['splits_low']:+.2f} to {row['splits_high']:+.2f}"
    ) in lines
    assert any(line.startswith("12 + 12 groups by object, as good as ") for line in lines)


class Objects:
    """Data of which nothing is known but its groups."""

    def __init__(self, *, names: tuple[str, ...]) -> None:
        self.names = names

    def fingerprint(self) -> str:
        return "-".join(self.names)

    def groups(self, use: str, *, by: str) -> list[str]:
        return list(self.names)


def write_run(
    folder: Path, names: str, *, right: int = 1, first: int = 0, **summary: object
) -> Path:
    """A run that answered `right` of the samples from `first` on right."""
    folder.mkdir()
    data = spec(Objects, names=tuple(names))
    index = np.arange(first, len(names))
    answers = Predictions(
        index=index,
        target=np.zeros_like(index),
        top=np.asarray(index >= first + right, np.int64)[:, None],
        probability=np.ones((len(index), 1), np.float32),
    )
    write_json(folder / "recipe.json", small_recipe(data=data).to_json())
    write_predictions(folder / "answers.npz", [[answers]], has_task_column=False)
    summary = {"data_fingerprint": data.build().fingerprint(), "world_size": 2} | summary
    write_json(folder / "summary.json", summary)
    return folder


def read(
    tmp_path: Path, *, b: str = "ppqq", other: str = "rrss", **changes: object
) -> dict[str, pd.DataFrame]:
    """Runs of cells a and b on splits 0 and 1; `changes` are those of b's run on split 0."""
    cells = {
        ("a",): {"0": write_run(tmp_path / "a0", "ppqq"), "1": write_run(tmp_path / "a1", other)},
        ("b",): {
            "0": write_run(tmp_path / "b0", b, **changes),
            "1": write_run(tmp_path / "b1", other),
        },  # type: ignore[arg-type]
    }
    return read_right(cells, by="object", trust=("tests",))


def test_samples_of_the_runs_are_paired_and_grouped(tmp_path: Path) -> None:
    found = read(tmp_path, right=3)
    assert ["".join(found[split].index) for split in "01"] == ["ppqq", "rrss"]
    assert found["0"].astype(int).to_numpy().T.tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"b": "ppqr"}, "on the same samples; split 0's were not"),
        ({"first": 1}, "on the same samples; split 0's were not"),
        ({"other": "ppss"}, "on different groups; got 'p' in several"),
        ({"world_size": 4}, r"by as many workers; got \[2, 4\]"),
        (
            {"data_fingerprint": "elsewhere"},
            "b0 was evaluated on content elsewhere; its data now has p-p-q-q",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(tmp_path, **changes)


def test_a_run_that_has_not_finished_is_refused(tmp_path: Path) -> None:
    (write_run(tmp_path / "a", "pq") / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"a must have finished; it has no summary\.json"):
        read_right({("a",): {"0": tmp_path / "a"}}, by="object")
