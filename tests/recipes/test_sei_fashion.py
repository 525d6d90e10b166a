"""The study of 1-bit weights on Fashion-MNIST: its cells, its files of answers, its intervals."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pipeline.core.printing import new_console
from pipeline.recipe.json import write_json
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.suite import fill_references
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.train.distillation import Distillation
from pipeline.train.evaluation import read_predictions
from recipes.compare import sei_fashion, sei_fashion_rates, sei_fashion_temperature
from recipes.compare.blocks_base import cell_name, interval
from recipes.compare.sei_fashion import (
    ALL,
    CELLS_OF,
    FACTORS,
    MAIN,
    RATE,
    SMOOTHED,
    SMOOTHING,
    STUDY,
    TEACHER,
    contrasts,
    contrasts_of,
    recipe,
    report,
    teacher,
    trained,
    verdict,
)

GAIN, INTERACTION = "1-bit: both - neither", "gain in 1-bit - gain in real"


def test_a_launch_trains_the_seeds_that_have_no_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sei_fashion, "STUDY", replace(STUDY, folder=tmp_path))
    assert len(recipe().recipes) == 1 + 5 * 11 + 5 * 4
    for seed in range(9):
        (tmp_path / f"seed-{seed}.json").touch()
    teacher, *cells = recipe().recipes
    assert [each.seed for each in cells] == [9] * 4
    taught = [each for each in cells if each.teacher is not None]
    assert len(taught) == 2 and all(f"@{teacher.name}" in str(each.teacher) for each in taught)
    binary = ["binarized" in str(each.model.target) for each in cells]
    assert binary == [False, False, True, True]
    (tmp_path / "seed-9.json").touch()
    assert len(recipe().recipes) == 76


def test_cells_differ_in_what_is_compared_alone() -> None:
    """Names of fields and keywords, which a change of one factor changes."""

    def changed(one: tuple[str, ...], other: tuple[str, ...]) -> set[str]:
        left, right = (trained(cell).to_json()["recipe"] for cell in (one, other))
        return {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}

    neither, both = ("1-bit", "block", "labels"), ("1-bit", "multiple", "teacher")
    assert changed(neither, ("real", "block", "labels")) == {"model"}  # both have one rate
    assert changed(neither, ("1-bit", "multiple", "labels")) == {"model"}
    assert changed(neither, ("1-bit", "block", "teacher")) == {"objective", "teacher"}
    assert changed(neither, (*neither, "BPTT")) == changed(both, (*both, "BPTT")) == {"rule"}
    assert changed(both, SMOOTHED) == {"objective", "teacher"}
    network: Any = trained(both).model.kwargs["network"]
    assert network.kwargs["shortcut"] == "multiple"
    assert trained(neither).model.kwargs["network"].kwargs["shortcut"] == "membrane"
    objective: Any = trained(both).objective.build()
    assert isinstance(objective, Distillation) and objective.label_weight == 0
    assert trained(SMOOTHED).objective.kwargs == {"label_smoothing": SMOOTHING}
    for cell in ALL:
        made = trained(cell)
        assert made.data.kwargs.get("held_out", 0) == 0 and made.epochs == 14
        assert made.optimizer.kwargs["lr"] == RATE[cell[0]]
        assert isinstance(made.rule.build(), BPTT if cell[3:] else SLTT)
    assert teacher().data.kwargs["held_out"] == 0.1


def test_settings_are_tried_on_the_held_out_tenth_with_other_seeds() -> None:
    for suite in (sei_fashion_rates.recipe(), sei_fashion_temperature.recipe()):
        assert all(each.data.kwargs["held_out"] == 0.1 for each in suite.recipes)
        trials = [each for each in suite.recipes if each.name != TEACHER]
        assert {each.seed for each in trials} == {100, 101} and {100, 101}.isdisjoint(CELLS_OF)
        assert all(each.epochs == 8 for each in trials)
    rates = {each.optimizer.kwargs["lr"] for each in sei_fashion_rates.recipe().recipes}
    assert rates == {0.02, 0.06, 0.2, 0.6}
    _, *trials = sei_fashion_temperature.recipe().recipes
    assert {each.objective.kwargs["temperature"] for each in trials} == {1, 4}


SUMMARY = {
    "commits": ["abc"],
    "data_fingerprint": "f",
    "hardware": {"cpu": "a cpu", "torch": "2"},
    "train_s": 300.04,
    "world_size": 1,
    "trained_on": [{}],
}


def made_up(folder: Path, seed: int, *, top1: float = 0.94) -> dict[tuple[str, ...], Path]:
    """Finished runs of the four main cells, and of their teacher."""
    rng, alone = np.random.default_rng(seed), folder / "teacher"
    alone.mkdir(parents=True, exist_ok=True)
    (alone / "weights.safetensors").write_bytes(b"weights")
    write_json(alone / "recipe.json", teacher().to_json())
    write_json(alone / "summary.json", {"top1": top1})
    runs = {}
    for cell in MAIN:
        runs[cell] = run = folder / STUDY.run_name(cell, seed)
        run.mkdir()
        made = replace(trained(cell), name=run.name, seed=seed)
        made = fill_references(made, lambda _: alone / "weights.safetensors")
        write_json(run / "recipe.json", made.to_json())
        target = rng.integers(0, 10, 10_000)
        top = np.where(rng.random(10_000) < 0.9, target, 10)[:, None]
        arrays = {"index": np.arange(10_000), "target": target, "top": top}
        np.savez(run / "answers.npz", **arrays, probability=np.ones((10_000, 1)))
        write_json(run / "summary.json", SUMMARY)
    return runs


def test_answers_are_written_for_complete_seeds_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = replace(STUDY, folder=tmp_path / "answers")
    monkeypatch.setattr(sei_fashion, "STUDY", study)
    monkeypatch.setattr(sei_fashion, "contrasts_of", partial(contrasts_of, resamples=50))
    runs = {seed: made_up(tmp_path, seed) for seed in (7, 8, 9)}
    (runs[9][MAIN[0]] / "summary.json").unlink()  # seed 9 is not complete
    diverged = {"event": "diverged", "error": "NaN", "time": 0.0, "attempt": 0}
    (runs[8][MAIN[0]] / "journal.jsonl").write_text(json.dumps(diverged) + "\n")
    report({run.name: run for of in runs.values() for run in of.values()}, new_console())
    out = capsys.readouterr().out
    assert "sei-fashion: seed 8 lacks real, block, labels: it diverged." in out
    assert {each.name for each in study.folder.iterdir()} == {"seed-7.json", "seed-8.json"}
    assert "sei-fashion: 2 of 10 seeds have answers." in out and "contrast" not in out
    block = json.loads((study.folder / "seed-7.json").read_text())
    assert block["commits"] == ["abc"] and block["machine"] == "a cpu, torch 2"
    assert block["teacher"] == [[hashlib.sha256(b"weights").hexdigest(), 0.94]]
    assert block["contents"] == {"fashion": "f"} and set(block["train_s"].values()) == {300.0}
    both = replace(study, cells_of=dict.fromkeys((7, 8), MAIN))
    read = both.read(new_console())
    for cell in MAIN:
        right = read_predictions(runs[7][cell] / "answers.npz").is_correct
        assert np.array_equal(read[7][", ".join(cell)], right)
    table = contrasts_of(read, resamples=50)
    assert (table.seeds[GAIN], table.seeds[INTERACTION]) == (2, 1)
    monkeypatch.setitem(RATE, "real", 0.3)
    with pytest.raises(ValueError, match="seed 7 must be of today's recipe of real, block, labels"):
        both.read(new_console())
    monkeypatch.undo()
    other = {**block, "contents": {"fashion": "g"}}
    (study.folder / "seed-8.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="answers of seed 8 must be on the fashion of others"):
        both.read(new_console())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("optimizer.lr", "must have the recipe of its cell and seed"),
        ("seed", "must have the recipe of its cell and seed"),
        ("images", "must have answered 10,000 samples"),
        ("content", "must have the content of the others' fashion"),
        ("workers", "must have one worker and one start"),
        ("machine", "must have one machine"),
        ("teacher", "must have one teacher"),
        ("weak teacher", "must reach 93.5%; got 93.00%"),
        ("other teacher", "must have the recipe of the study's"),
    ],
)
def test_answers_of_other_runs_are_refused(wrong: str, says: str, tmp_path: Path) -> None:
    study = replace(STUDY, folder=tmp_path / "answers")
    runs = made_up(tmp_path, 9, top1=0.93 if wrong == "weak teacher" else 0.94)
    run, alone = runs["real", "multiple", "teacher"], tmp_path / "teacher"
    made = Recipe.read(run / "recipe.json")
    if wrong in ("optimizer.lr", "seed"):
        write_json(run / "recipe.json", made.override({wrong: 1}).to_json())
    elif wrong == "images":
        np.savez(run / "answers.npz", index=[1], target=[1], top=[[1]], probability=[[1.0]])
    elif wrong == "teacher":
        other = shutil.copytree(alone, tmp_path / "other") / "weights.safetensors"
        other.write_bytes(b"others")
        write_json(run / "recipe.json", made.override({"teacher.weights": str(other)}).to_json())
    elif wrong == "other teacher":
        write_json(alone / "recipe.json", replace(teacher(), epochs=15).to_json())
    changed = {
        "content": {"data_fingerprint": "g"},
        "workers": {"world_size": 2},
        "machine": {"hardware": {"cpu": "another", "torch": "2"}},
    }
    write_json(run / "summary.json", {**SUMMARY, **changed.get(wrong, {})})
    with pytest.raises(ValueError, match=says):
        study.write({each.name: each for each in runs.values()}, new_console())
    assert not study.folder.exists()


def test_contrasts_are_differences_of_accuracies() -> None:
    rng = np.random.default_rng(0)
    right = {
        seed: {cell_name(cell): rng.random(500) < 0.7 for cell in CELLS_OF[seed]}
        for seed in CELLS_OF
    }
    table = contrasts_of(right, resamples=200)
    assert {*table.index} == {*contrasts()}
    assert all(abs(sum(w.values())) < 1e-12 for w in contrasts().values())
    mean = pd.DataFrame(right).map(np.mean).mean(axis=1) * 100
    both, neither = "multiple, teacher", "block, labels"
    gain = {
        kind: mean[f"{kind}, {both}"] - mean[f"{kind}, {neither}"] for kind in ("1-bit", "real")
    }
    assert table.points[GAIN] == pytest.approx(gain["1-bit"])
    assert table.points[INTERACTION] == pytest.approx(gain["1-bit"] - gain["real"])
    assert (table.seeds[GAIN], table.seeds["1-bit: multiple - block"]) == (10, 5)
    at = {cell: np.mean([right[seed][cell_name(cell)].mean() for seed in range(5)]) for cell in ALL}
    for weights in ("1-bit", "real"):
        (bl, bt), (ml, mt) = (
            [100 * at[weights, shortcut, by] for by in ("labels", "teacher")]
            for shortcut in ("block", "multiple")
        )
        shortcuts, taught = f"{weights}: multiple - block", f"{weights}: teacher - labels"
        assert table.points[shortcuts] == pytest.approx((ml + mt - bl - bt) / 2)
        assert table.points[taught] == pytest.approx((bt + mt - bl - ml) / 2)
    assert table.loc[GAIN].low < table.loc[GAIN].points < table.loc[GAIN].high


def test_the_page_has_what_the_kept_answers_tell() -> None:
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text()
    _, section = page.split("## Parts of SEI-BWSNN")
    rows = dict(re.findall(r"\| ([^|]*) \| ([+-].*) \|\n", section.split("\n## ")[0]))
    right = STUDY.read(new_console())
    table = contrasts_of(right)
    for words, name in {
        "shortcuts and teacher, in 1-bit weights": GAIN,
        "shortcuts and teacher, in real weights": "real: both - neither",
        "the difference of these two gains": INTERACTION,
        "1 bit, with neither": "neither: 1-bit - real",
        "1 bit, with both": "both: 1-bit - real",
        "the shortcuts, in 1-bit weights, over labels and teacher": "1-bit: multiple - block",
        "the teacher, in 1-bit weights, over both kinds of shortcuts": "1-bit: teacher - labels",
        "the teacher with the shortcuts, against labels as uncertain as its answers": (
            "1-bit, multiple: teacher - smoothed labels"
        ),
        "SLTT against BPTT, in 1-bit weights with both": "1-bit, both: SLTT - BPTT",
    }.items():
        found = [float(each) for each in re.findall(r"[-+]?\d+\.\d+", rows.pop(words))]
        points, low, high = table.loc[name, ["points", "low", "high"]]
        assert found[0] == pytest.approx(points, abs=0.0051), name
        # Another numpy may draw other resamples.
        assert found[1:] == pytest.approx([low, high], abs=0.025), name
    assert not rows
    for weights in ("real", "1-bit"):
        names = [cell_name(cell) for cell in product(*FACTORS.values()) if cell[0] == weights]
        row = [
            100 * np.mean([cells[name] for cells in right.values() if name in cells])
            for name in names
        ]
        [found] = re.findall(rf"\| {weights} weights \| (\d.*) \|", section)
        assert [float(each) for each in found.split(" | ")] == pytest.approx(row, abs=0.0051)


@pytest.mark.parametrize(
    ("seeds", "images", "rest"), [(1.0, 0, 0), (0, 20.0, 0), (0, 0, 40.0), (0.4, 10.0, 20.0)]
)
def test_intervals_are_as_wide_as_seeds_and_images_make_them(
    seeds: float, images: float, rest: float
) -> None:
    """Over fresh seeds and images, whose effects have these standard deviations. What is of one
    seed and one image alone counts with both.
    """
    rng, S, N = np.random.default_rng(1), 5, 400
    held, half = [], []
    for _ in range(200):
        value_SN = 3 + seeds * rng.normal(size=(S, 1)) + images * rng.normal(size=(1, N))
        low, high = interval(value_SN + rest * rng.normal(size=(S, N)), rng, 400)
        held.append(low <= 3 <= high)
        half.append((high - low) / 2)
    student, normal = stats.t.ppf(0.975, S - 1), stats.norm.ppf(0.975)
    expected = student**2 * (seeds**2 + rest**2 / N) / S + normal**2 * (images**2 + rest**2 / S) / N
    assert np.mean(held) >= 0.93
    assert np.mean(np.square(half)) == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 0.8, "helps"),
        (-0.9, -0.1, "harms"),
        (-0.3, 0.2, "smaller than 0.4"),
        (-0.3, 0.5, "undecided"),
    ],
)
def test_the_verdict_in_words(low: float, high: float, words: str) -> None:
    assert verdict(low, high) == words
