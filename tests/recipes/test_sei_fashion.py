"""The study of 1-bit weights on Fashion-MNIST: its cells, its files of answers, its intervals."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recipes.compare import sei_fashion
from recipes.compare.sei_fashion import (
    ALL,
    CELLS_OF,
    MAIN,
    contrasts,
    contrasts_of,
    read_answers,
    recipe,
    report,
    verdict,
    write_answers,
)

GAIN, INTERACTION = "1-bit: both - neither", "gain in 1-bit - gain in real"


def test_a_launch_trains_the_seeds_that_have_no_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sei_fashion, "ANSWERS", tmp_path)
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


def test_answers_are_written_for_complete_seeds_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sei_fashion, "ANSWERS", tmp_path / "answers")
    few = partial(contrasts_of, resamples=50)
    monkeypatch.setattr(sei_fashion, "contrasts_of", few)
    rng, runs, right = np.random.default_rng(0), {}, {}
    for seed in (8, 9):
        for cell in CELLS_OF[seed]:
            run = tmp_path / sei_fashion._name(cell, seed)
            run.mkdir()
            target = rng.integers(0, 10, 10_000)
            top = np.where(rng.random(10_000) < 0.9, target, 10)[:, None]
            arrays = {"index": np.arange(10_000), "target": target, "top": top}
            np.savez(run / "answers.npz", **arrays, probability=np.ones((10_000, 1)))
            summary = {"epochs": 14, "commit": "abc", "hardware": {"cpu": "a cpu"}}
            (run / "summary.json").write_text(json.dumps(summary))
            runs[run.name], right[seed, cell] = run, top[:, 0] == target
    (runs.popitem()[1] / "summary.json").unlink()  # seed 9 is not complete
    from pipeline.core.printing import new_console

    report(runs, new_console())
    assert [each.name for each in (tmp_path / "answers").iterdir()] == ["seed-8.json"]
    read = read_answers(tmp_path / "answers" / "seed-8.json")
    for cell in MAIN:
        assert np.array_equal(read[", ".join(cell)], right[8, cell])
    assert "1-bit: both - neither" in capsys.readouterr().out
    path = runs[sei_fashion._name(MAIN[0], 8)]
    np.savez(path / "answers.npz", index=[1], target=[1], top=[[1]], probability=[[1.0]])
    with pytest.raises(ValueError, match="10,000"):
        write_answers(tmp_path / "x.json", {MAIN[0]: path})


def drawn(
    rng: np.random.Generator, *, gain: float, seeds: int = 10, images: int = 500
) -> dict[int, pd.DataFrame]:
    """Answers with effects of seeds and of images, and a gain of the ingredients in 1-bit alone."""
    hard_N = rng.normal(0, 0.15, images)
    frames = {}
    for seed in range(seeds):
        columns = {}
        for cell in ALL if seed < 5 else MAIN:
            share = 0.7 + gain * (cell[0] == "1-bit" and cell[1:3] == ("multiple", "teacher"))
            share_N = share + hard_N + rng.normal(0, 0.02)
            columns[", ".join(cell)] = rng.random(images) < share_N
        frames[seed] = pd.DataFrame(columns)
    return frames


def test_contrasts_are_differences_of_accuracies() -> None:
    right = drawn(np.random.default_rng(0), gain=0.1)
    table = contrasts_of(right, resamples=200)
    assert {*table.index} == {*contrasts()} and all(
        abs(sum(w.values())) < 1e-12 for w in contrasts().values()
    )
    mean = pd.DataFrame({seed: frame.mean() for seed, frame in right.items()}).mean(axis=1) * 100
    both, neither = "multiple, teacher", "block, labels"
    gain = {
        kind: mean[f"{kind}, {both}"] - mean[f"{kind}, {neither}"] for kind in ("1-bit", "real")
    }
    assert table.points[GAIN] == pytest.approx(gain["1-bit"])
    assert table.points[INTERACTION] == pytest.approx(gain["1-bit"] - gain["real"])
    assert (table.seeds[GAIN], table.seeds["1-bit: multiple - block"]) == (10, 5)
    assert table.loc[GAIN].low < table.loc[GAIN].points < table.loc[GAIN].high


def test_intervals_hold_the_truth_at_least_as_often_as_they_say() -> None:
    """Over fresh seeds and images; the bootstrap of both is conservative."""
    rng = np.random.default_rng(1)
    held = [
        (
            row := contrasts_of(drawn(rng, gain=0.05, seeds=5, images=200), resamples=300).loc[GAIN]
        ).low
        <= 5
        <= row.high
        for _ in range(60)
    ]
    assert np.mean(held) >= 0.93


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
