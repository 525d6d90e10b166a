"""Tables of a factorial study from run folders: closed forms, what pairs, what is printed, and what is refused."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.answers import Answers, write_answers
from pipeline.data.errors import DataError
from pipeline.data.synthetic import Synthetic
from pipeline.printing import NO_WIDTH
from pipeline.recipe import Spec, spec, write_json
from pipeline.report.effects import all_effects, effect
from pipeline.report.factorial import Factorial, factorial
from tests.small import small_recipe

FACTORS = {"weights": ("fp", "1-bit"), "shortcut": ("block", "multiple"), "teacher": ("none", "kd")}
CELLS = list(itertools.product(*FACTORS.values()))
SCENES = 8  # of each object
MINUS = {"a - b": {"a": 1.0, "b": -1.0}}


class Objects:
    """Data of which nothing is known but its groups."""

    def __init__(self, *, names: tuple[str, ...]) -> None:
        self.names = names

    def fingerprint(self) -> str:
        return f"objects-{'-'.join(self.names)}"

    def groups(self, use: str, *, by: str) -> list[str]:
        if by != "object":
            raise DataError(f"Objects: must group its samples by {by!r}; it groups them by object")
        return list(self.names)


def names(split: str, objects: int) -> tuple[str, ...]:
    return tuple(f"{split}/{number}" for number in range(objects) for _ in range(SCENES))


def write_run(folder: Path, right: Sequence[bool], data: Spec, *, first: int = 0, tasks: bool = False, **summary: Any) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "recipe.json", small_recipe(data=data).to_json())
    index = np.arange(first, first + len(right))
    found = Answers(index=index, target=np.zeros_like(index), answer=1 - np.asarray(right, np.int64))
    write_answers(folder / "answers.npz", [[found]], tasks=tasks)
    made = {"data_fingerprint": data.build().fingerprint(), "world_size": 2, "commits": ["c0ffee"]}
    write_json(folder / "summary.json", made | summary)
    return folder


def study(folder: Path, right_of: Callable[[tuple[int, ...], str, int], int], *, objects: int = 12) -> dict[Any, dict[str, Path]]:
    """The 2x2x2 cells in splits "0" and "1": `right_of(levels, split, object)` of its 8 scenes are answered right."""
    found: dict[Any, dict[str, Path]] = {}
    for cell, levels in zip(CELLS, itertools.product((0, 1), repeat=3), strict=True):
        found[cell] = {}
        for split in "01":
            counts = [right_of(levels, split, number) for number in range(objects)]
            right = [scene < count for count in counts for scene in range(SCENES)]
            data = spec(Objects, names=names(split, objects))
            found[cell][split] = write_run(folder / "-".join((*cell, split)), right, data)
    return found


def read(runs: dict[Any, dict[str, Path]], contrasts: Any, **options: Any) -> Factorial:
    return factorial(runs, contrasts, **{"by": "object", "resamples": 500, "trust": ("tests",), **options})


def base(split: str, number: int) -> int:
    """Of an object, whatever the cell: some are easy."""
    return (number + int(split)) % 4


def test_an_additive_design_comes_out_exactly(tmp_path: Path) -> None:
    """What all cells share, how easy an object is, drops out of the interval too: that is what pairing is for."""
    runs = study(tmp_path, lambda levels, split, number: base(split, number) + levels[0] + 2 * levels[1] + levels[2])
    found = {each.name: each for each in read(runs, all_effects(FACTORS)).contrasts}
    points = {name: (each.estimate, each.low, each.high) for name, each in found.items()}
    assert points == {
        "weights (1-bit - fp)": (12.5, 12.5, 12.5),
        "shortcut (multiple - block)": (25, 25, 25),
        "teacher (kd - none)": (12.5, 12.5, 12.5),
        "weights x shortcut": (0, 0, 0),
        "weights x teacher": (0, 0, 0),
        "shortcut x teacher": (0, 0, 0),
        "weights x shortcut x teacher": (0, 0, 0),
    }
    assert [name for name, each in found.items() if each.excludes_0] == list(points)[:3]


def test_interactions_come_out_where_they_were_put(tmp_path: Path) -> None:
    runs = study(tmp_path, lambda levels, split, number: base(split, number) + levels[0] + levels[0] * levels[1] + levels[2])
    within = {
        f"{of} at {level}": effect(FACTORS, of, at={at: level})
        for of, at, level in (
            ("weights", "shortcut", "block"),
            ("weights", "shortcut", "multiple"),
            ("shortcut", "weights", "fp"),
        )
    }
    found = {each.name: each.estimate for each in read(runs, all_effects(FACTORS) | within).contrasts}
    assert found["weights x shortcut"] == 12.5 and found["weights x teacher"] == found["weights x shortcut x teacher"] == 0
    assert found["weights (1-bit - fp)"] == 12.5 + 6.25
    assert [found[name] for name in within] == [12.5, 25, 0]


def test_alike_cells_differ_by_exactly_nothing(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    counts = {(split, number): int(draw.integers(0, 9)) for split in "01" for number in range(12)}
    runs = study(tmp_path, lambda levels, split, number: counts[split, number])
    for each in read(runs, {"two": {CELLS[0]: 1, CELLS[7]: -1}} | all_effects(FACTORS)).contrasts:
        assert (each.estimate, each.low, each.high) == (0, 0, 0) and not each.excludes_0


def test_splits_count_alike_whatever_their_size(tmp_path: Path) -> None:
    """And so the accuracy of a cell is not that of all images together."""
    runs: dict[str, dict[str, Path]] = {"a": {}, "b": {}}
    for cell, split, objects, count in (("a", "0", 2, 8), ("a", "1", 10, 2), ("b", "0", 2, 4), ("b", "1", 10, 4)):
        right = [scene < count for _ in range(objects) for scene in range(SCENES)]
        data = spec(Objects, names=names(split, objects))
        runs[cell][split] = write_run(tmp_path / f"{cell}{split}", right, data)
    found = read(runs, MINUS)
    assert [cell.accuracy for cell in found.cells] == [0.625, 0.5]
    assert found.cells[0].accuracies == {"0": 1.0, "1": 0.25}
    assert found.contrasts[0].estimate == 12.5
    assert (found.groups, found.samples) == ({"0": 2, "1": 10}, {"0": 16, "1": 80})


def noisy(tmp_path: Path) -> dict[Any, dict[str, Path]]:
    draw = np.random.default_rng(1)
    counts = {key: int(draw.integers(0, 7)) for key in itertools.product(CELLS, "01", range(12))}

    def right_of(levels: tuple[int, ...], split: str, number: int) -> int:
        cell = tuple(levels_of[level] for levels_of, level in zip(FACTORS.values(), levels, strict=True))
        return counts[cell, split, number] + 2 * levels[1]

    return study(tmp_path, right_of)


def test_groups_are_found_by_the_place_of_a_sample_in_its_file(tmp_path: Path) -> None:
    """Samples 12 to 19 show the second half of one object and the first of the next; 16 to 23 show one alone."""
    data = spec(Objects, names=names("0", 3))
    two, one = (
        {cell: {"0": write_run(tmp_path / f"{cell}{first}", [True] * 8, data, first=first)} for cell in "ab"}
        for first in (12, 16)
    )
    assert read(two, MINUS).groups == {"0": 2}
    with pytest.raises(ValueError, match="split 0 must have two groups or more by 'object'; it has 1"):
        read(one, MINUS)


def test_the_tables_and_the_json(tmp_path: Path) -> None:
    runs = noisy(tmp_path)
    runs["control"] = runs[CELLS[0]]
    contrasts = {**all_effects(FACTORS), "fp - control": {CELLS[7]: 1, "control": -1}}
    out = io.StringIO()
    factorial(runs, contrasts, by="object", resamples=500, trust=("tests",)).render(Console(file=out, width=110))
    found = read(runs, contrasts)
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    cell = found.cells[3]
    assert "cell split 0 split 1 mean" in lines and "contrast split 0 split 1 points 95 % over objects 95 % over splits" in lines
    shares = (cell.accuracies["0"], cell.accuracies["1"], sum(cell.accuracies.values()) / 2)
    assert f"fp, multiple, kd {' '.join(f'{share:.2%}' for share in shares)}" in lines
    assert any(line.startswith("control ") for line in lines)
    shortcut, interaction = found.contrasts[1], found.contrasts[6]
    assert shortcut.low < shortcut.estimate < shortcut.high and shortcut.low > 0
    shortcut_weights = [shortcut.weights.get(each.name, 0.0) for each in found.cells]
    of_splits = [100 * sum(w * c.accuracies[split] for c, w in zip(found.cells, shortcut_weights, strict=True)) for split in "01"]
    assert list(shortcut.estimates.values()) == pytest.approx(of_splits)
    points = " ".join(f"{value:+.2f}" for value in (*of_splits, shortcut.estimate))
    interval = f"{shortcut.low:+.2f} to {shortcut.high:+.2f}"
    assert shortcut.over_splits is not None
    splits = f"{shortcut.over_splits[0]:+.2f} to {shortcut.over_splits[1]:+.2f}"
    assert f"shortcut (multiple - block) {points} {interval} excludes 0 {splits}" in lines
    assert interaction.low < 0 < interaction.high
    assert any(line.startswith("weights x shortcut x teacher ") and " includes 0 " in line for line in lines)
    assert any(
        line.startswith("12 + 12 groups by object, as good as 12 + 12 of one size, 96 + 96 samples; 500 resamples")
        for line in lines
    )

    value = json.loads(json.dumps(found.to_json()))
    assert value["cells"][3] == {
        "cell": "fp, multiple, kd",
        "accuracy": cell.accuracy,
        "accuracies": cell.accuracies,
        "runs": {"0": "fp-multiple-kd-0", "1": "fp-multiple-kd-1"},
    }
    assert value["splits"] == [{"split": split, "groups": 12, "effective_groups": 12, "samples": 96} for split in "01"]
    mine = value["contrasts"][1]
    assert (mine["points"], mine["low"], mine["high"]) == (shortcut.estimate, shortcut.low, shortcut.high)
    assert mine["excludes_0"] is True and mine["weights"]["fp, block, none"] == -0.25


def test_the_same_seed_gives_the_same_interval_and_no_contrast_a_table_of_cells(tmp_path: Path) -> None:
    runs, contrasts = noisy(tmp_path), all_effects(FACTORS)
    assert read(runs, contrasts) == read(runs, contrasts)
    assert read(runs, contrasts).contrasts[0].low != read(runs, contrasts, seed=1).contrasts[0].low
    assert read(runs, {}).contrasts == () and len(read(runs, {}).cells) == 8


@pytest.mark.full
def test_a_set_of_stamps_is_grouped_by_its_objects(tmp_path: Path) -> None:
    """The manifest's groups, through a recipe as training leaves it."""
    pytest.importorskip("ffcv")
    from pipeline.data.beton import Beton
    from pipeline.data.stamps.pictures import installed, parts
    from pipeline.data.stamps.write import write_stamps
    from tests.data.stamps.made import make

    share = make(tmp_path / "share")
    sizes = {"size": 40, "samples": 13, "val_samples": 40, "mode": "raw"}
    runs: dict[str, dict[str, Path]] = {"a": {}, "b": {}}
    for split in (0, 1):
        write_stamps(tmp_path / f"stamps-{split}", source=share, split=split, **sizes)
        data = spec(Beton, folder=str(tmp_path / f"stamps-{split}"), classes=13, size=40)
        for cell in runs:
            runs[cell][str(split)] = write_run(tmp_path / f"{cell}{split}", [cell == "a"] * 40, data)
    found = read(runs, MINUS, trust=())
    shown = {str(split): sum(map(len, parts(installed(share), split)[1].objects.values())) for split in (0, 1)}
    assert found.groups == shown and found.contrasts[0].low == 100


# ------------------------------------------------------------------------------------------------------------------- refusals


def pair(folder: Path, **second: Any) -> dict[str, dict[str, Path]]:
    """Two cells in one split; `second` is what is different in the second."""
    data = spec(Objects, names=names("0", 3))
    written = {"right": [True] * 24, "data": data}
    return {"a": {"0": write_run(folder / "a", **written)}, "b": {"0": write_run(folder / "b", **{**written, **second})}}


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"data": spec(Objects, names=names("1", 3))}, "a and b have data of content objects-0/0- and objects-1/0-$"),
        ({"right": [True] * 23}, "in split 0 a and b have 24 and 23 samples, 23 in common$"),
        ({"right": [True] * 20, "first": 4}, "have 24 and 20 samples, 20 in common$"),
        ({"data": spec(Synthetic)}, "the data of b must group its samples by 'object'; Synthetic has no groups$"),
        ({"data_fingerprint": "other"}, "b was evaluated on content other; got objects-0/0-: another file lies where"),
        ({"first": 1}, "the samples that b answered must lie in its data's evaluation file, of 24; got index 24$"),
        ({"first": -2}, "the samples that b answered must lie in its data's evaluation file, of 24; got index -2$"),
        ({"tasks": True}, "b must be of one task; it has phases$"),
    ],
)
def test_runs_that_do_not_stand_comparison_are_refused(tmp_path: Path, second: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        read(pair(tmp_path, **second), MINUS)
    assert "\n" not in str(refused.value) and str(refused.value).startswith("factorial: ")


def test_samples_of_one_place_in_two_files_are_refused(tmp_path: Path) -> None:
    """One file's content and places, but another target: the one run was evaluated on a share held out."""
    runs = pair(tmp_path)
    index = np.arange(24)
    other = Answers(index=index, target=np.ones_like(index), answer=np.ones_like(index))
    write_answers(runs["b"]["0"] / "answers.npz", [[other]], tasks=False)
    with pytest.raises(ValueError, match="a and b have samples of one place in two files"):
        read(runs, MINUS)


@pytest.mark.parametrize(
    ("contrasts", "said"),
    [
        ({"x": {"a": 1, "c": -1}}, "factorial: x must weigh cells of the study; got c; there are a; b$"),
        ({"x": {("a", "b"): 1, "a": -1}}, "got a, b; there are a; b$"),
        ({"x": {"a": 1, "b": -0.5}}, "the weights of x must sum to 0, some of them not 0; they sum to 0.5$"),
        ({"x": {"a": float("nan"), "b": -1}}, "must sum to 0, some of them not 0; they sum to nan$"),
        ({"x": {"a": 0, "b": 0}}, "must sum to 0, some of them not 0; they sum to 0$"),
        ({"x": {}}, "must sum to 0, some of them not 0; they sum to 0$"),
    ],
)
def test_what_is_no_contrast_is_refused(tmp_path: Path, contrasts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(pair(tmp_path), contrasts)


def test_runs_that_are_missing_are_refused(tmp_path: Path) -> None:
    runs = pair(tmp_path)
    with pytest.raises(ValueError, match=r"every cell must have a run of each split, 0, 1; b has none of 1$"):
        read({"a": {**runs["a"], "1": runs["a"]["0"]}, "b": runs["b"]}, MINUS)
    with pytest.raises(ValueError, match="needs a run for each cell and split; got 0 cells without runs"):
        read({}, {})
    with pytest.raises(ValueError, match="resamples must be 1 or more; got 0"):
        read(runs, MINUS, resamples=0)
    with pytest.raises(ValueError, match="must group its samples by 'ground'; it groups them by object"):
        read(runs, MINUS, by="ground")
    (runs["b"]["0"] / "answers.npz").unlink()
    with pytest.raises(ValueError, match=r"answers\.npz must be there; a run writes it at its end"):
        read(runs, MINUS)
    (runs["b"]["0"] / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"factorial: b must have finished; it has no summary\.json"):
        read(runs, MINUS)


def test_runs_of_unlike_numbers_of_workers_are_refused(tmp_path: Path) -> None:
    runs = pair(tmp_path)
    change_summary(runs["b"]["0"], world_size=1)
    with pytest.raises(ValueError, match=r"must be trained by as many workers, .*; a was by 2, b by 1$"):
        read(runs, MINUS)


def test_the_commits_that_runs_were_trained_at_are_told(tmp_path: Path) -> None:
    runs = pair(tmp_path)
    assert read(runs, MINUS).commits == {"c0ffee": 2}
    change_summary(runs["b"]["0"], commits=["c0ffee", "decade"])
    found = read(runs, MINUS)
    assert found.commits == {"c0ffee": 1, "c0ffee, decade": 1}
    out = io.StringIO()
    found.render(Console(file=out, width=NO_WIDTH))
    assert out.getvalue().endswith("Trained at c0ffee (1 runs), c0ffee, decade (1 runs).\n")


def change_summary(run: Path, **changes: Any) -> None:
    write_json(run / "summary.json", json.loads((run / "summary.json").read_text()) | changes)


def test_splits_that_share_an_object_are_refused(tmp_path: Path) -> None:
    """Their draws would not be independent, and the interval too narrow."""
    runs = pair(tmp_path)
    for cell in runs:
        runs[cell]["1"] = Path(shutil.copytree(runs[cell]["0"], tmp_path / f"{cell}1"))
    with pytest.raises(ValueError, match="splits must evaluate on different groups; 0 and 1 both have '0/0'"):
        read(runs, MINUS)
