"""The study of memory budgets: its cells, equal seconds, its files of answers, its tables."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import memory_budget as measuring
from benchmarks.memory_budget import HoldsInput, batch_seconds, fewest_slices, largest_micro_batches
from pipeline.core.printing import new_console
from pipeline.forecast.step_counts import FakeBench, count_rule
from pipeline.recipe import Recipe
from pipeline.recipe.json import write_json
from pipeline.train.evaluation import read_predictions
from recipes.compare import memory_budget
from recipes.compare.blocks_base import cell_name
from recipes.compare.memory_budget import (
    BATCH,
    BUDGETS,
    EVALUATED_ON,
    FASHION,
    FLASHES,
    SECONDS,
    SETS,
    STEPS,
    TRAINED_ON,
    Row,
    recipe,
    report,
    shared,
    sizes_of,
    steps_in,
    study,
    table,
)

RULES = [*sizes_of(6)]
# Micro-batches of 2, 8 and 32 samples of BPTT's; one rule keeps half as much, one too much for 2.
MICRO = {"BPTT": (2, 8, 32), "SLTT": (4, 16, 16), "OTTT": (0, 8, 32)}


@pytest.fixture
def speeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Made-up speeds of three rules, and a place for answers."""
    cells = [
        {
            "set": of,
            "budget": budget,
            "rule": rule,
            "micro_batch": size,
            "slice": sizes_of(STEPS[of])[rule][0],
            "bytes": size * 10**5,
            "limit": budget * 10**5,
            **({"seconds": 0.1 + 0.4 / size} if size else {}),
        }
        for of in SETS
        for at, budget in enumerate(BUDGETS)
        for rule in MICRO
        for size in [MICRO[rule][at]]
    ]
    found = {"machine": {"cpu": "a cpu", "torch": "2"}, "cells": cells}
    monkeypatch.setattr(memory_budget, "measured", lambda: found)
    monkeypatch.setattr(memory_budget, "SEEDS", range(2))
    for module in (memory_budget, measuring):
        monkeypatch.setattr(module, "ANSWERS", tmp_path / "answers")
    return found


def test_the_largest_micro_batch_divides_the_batch_and_keeps_no_more_than_bptt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rules keep made-up bytes a + b B beside an input of 3 B, so the largest B is known."""
    bytes_of = {"SLTT": (150, 7), "BPTT-truncate-3": (301, 1)}

    def bench(recipe: Recipe, samples: int) -> Any:
        return SimpleNamespace(samples=samples, batch_bytes=3 * samples)

    def count(bench: Any, rule: Any) -> Any:
        fixed, each = bytes_of.get(rule.build().label, (100, 97))
        return SimpleNamespace(all_bytes=fixed + each * bench.samples * rule.kwargs.get("chunk", 1))

    monkeypatch.setattr(measuring, "HoldsInput", bench)
    monkeypatch.setattr(measuring, "count_rule", count)
    cells = largest_micro_batches("fashion")
    found = {(cell["budget"], cell["rule"], cell["slice"]): cell for cell in cells}
    assert [*found] == [
        (budget, rule, size)
        for budget in BUDGETS
        for rule, sizes in sizes_of(6).items()
        for size in sizes
    ]
    assert [found[budget, "BPTT", 6]["micro_batch"] for budget in BUDGETS] == [2, 8, 32]
    # (100 + 100 * 2 - 150) / (7 + 3) = 15; a divisor of 96 below it is 12.
    assert [found[budget, "SLTT", 1]["micro_batch"] for budget in BUDGETS] == [12, 48, 96]
    assert [found[budget, "SLTT", 6]["micro_batch"] for budget in BUDGETS] == [3, 16, 48]
    assert [found[budget, "BPTT-truncate", 3]["micro_batch"] for budget in BUDGETS] == [0, 96, 96]
    assert found[2, "SLTT", 1]["bytes"] == 270 and found[2, "SLTT", 1]["limit"] == 300


def test_a_batch_is_computed_in_the_fewest_slices_that_fit() -> None:
    cell = {"set": "fashion", "budget": 2, "rule": "SLTT"}
    cells = [
        {**cell, "slice": 1, "micro_batch": 12},  # 8 micro-batches of 6 slices
        {**cell, "slice": 3, "micro_batch": 6},  # 16 of 2
        {**cell, "slice": 6, "micro_batch": 1},  # 96 of 1
        {**cell, "budget": 8, "slice": 1, "micro_batch": 48},
        {**cell, "budget": 8, "slice": 6, "micro_batch": 0},
        {**cell, "budget": 32, "slice": 3, "micro_batch": 2},
        {**cell, "budget": 32, "slice": 6, "micro_batch": 1},
        {**cell, "rule": "OTTT", "slice": 1, "micro_batch": 0},
        {**cell, "rule": "OTTT", "slice": 2, "micro_batch": 0},
    ]
    assert fewest_slices(cells) == [cells[1], cells[3], cells[5], cells[7]]


@pytest.mark.parametrize("of", SETS)
def test_each_rule_holds_its_input_once(of: str) -> None:
    """BPTT saves the input of all steps itself, SLTT a copy of one step at a time."""
    made = shared(of, "BPTT", STEPS[of])
    whole, plain = HoldsInput(made, 6), FakeBench(made, 6)
    inputs = whole.batch_bytes - whole.target_B.nbytes
    sizes = sizes_of(STEPS[of])
    for rule, has_saved_it in {"BPTT": True, "SLTT": of == FASHION}.items():
        spec = shared(of, rule, sizes[rule][0]).rule
        without, with_ = (count_rule(bench, spec).all_bytes for bench in (whole, plain))
        assert with_ - without == has_saved_it * inputs, rule


def test_equal_seconds_become_steps(speeds: Any) -> None:
    made = [each for each in recipe().recipes if each.seed == 1]
    found = {(Path(each.data.kwargs["folder"]).name, each.micro_batch) for each in made}
    sizes = {size for of_rule in MICRO.values() for size in of_rule} - {0}
    assert found == {(of, size) for of in SETS for size in sizes}
    # Two budgets in which a rule has one micro-batch share its run.
    assert len(made) == 2 * (3 + 2 + 2) and len(recipe().recipes) == 2 * len(made)
    for each in made:
        of = Path(each.data.kwargs["folder"]).name
        assert each.micro_batch is not None and each.stop_after is not None
        seconds = 0.1 + 0.4 / each.micro_batch
        assert abs(each.stop_after * seconds - SECONDS[of]) <= seconds / 2
        per_epoch = TRAINED_ON[of] // BATCH
        assert (each.epochs - 1) * per_epoch < each.stop_after <= each.epochs * per_epoch
    assert [steps_in(180.0, each) for each in (0.1, 7.0, 1000.0)] == [1800, 26, 1]


@pytest.mark.parametrize("of", SETS)
def test_cells_of_a_set_differ_in_what_is_compared_alone(of: str) -> None:
    made = [shared(of, rule, sizes[0]) for rule, sizes in sizes_of(STEPS[of]).items()]
    steps = made[0].time_steps
    for each in made:
        written, other = (x.to_json()["recipe"] for x in (each, made[0]))
        assert {name for name in written if written[name] != other[name]} <= {"rule", "optimizer"}
        assert replace(each, micro_batch=4).split(1).accumulation == BATCH // 4
        assert not any("Norm" in type(part).__name__ for part in each.model.build().modules())
    labels = ["BPTT", "BPTT-recompute", f"BPTT-truncate-{steps // 2}", "SLTT", "SLTT-1", "OTTT-A"]
    assert [each.rule.build().label for each in made] == labels
    rates = {rule: each.optimizer.kwargs["lr"] for rule, each in zip(RULES, made, strict=True)}
    assert rates["BPTT"] == rates["BPTT-recompute"] and rates["SLTT"] == rates["SLTT-1"]


def test_speeds_are_shares_of_rounds_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    machine = {1: 1.0, 2: 5.0, 3: 3.0, 4: 2.0, 5: 9.0}  # how slow it is in each round

    def bench(recipe: Recipe) -> Any:
        def seconds(rule: Any, *, batches: int, accumulation: int) -> dict[str, float]:
            calls.append((recipe.name, accumulation))
            turn = sum(name == recipe.name for name, _ in calls)
            one = {"BPTT": 1.0, "SLTT": 8.0 if turn == 1 else 3.0}[recipe.name]
            return {"forward": one * machine[turn], "optimizer": one, "communication": 100.0}

        return SimpleNamespace(seconds=seconds)

    monkeypatch.setattr(measuring, "Bench", bench)
    recipes = {
        rule: replace(shared(FASHION, rule, 1), name=rule, micro_batch=8)
        for rule in ("BPTT", "SLTT")
    }
    monkeypatch.setattr(measuring, "ROUNDS", 5)
    found, _ = batch_seconds(torch.device("cpu"), recipes)
    # Rounds take 18, 24, 16, 12 and 40, and SLTT three quarters of all but the first.
    assert found == {"BPTT": {"batch": 4.5}, "SLTT": {"batch": 13.5}}
    names = [each.name for each in recipes.values()]
    turns = [names, names[::-1], names, names[::-1], names]
    assert calls == [(name, 12) for turn in turns for name in turn]


SHARES = {"fashion, BPTT, 2, 6": 0.7, "fashion, SLTT, 4, 1": 0.8}  # right answers; others .75


def made_up(folder: Path, seed: int, *, cpu: str = "a cpu") -> dict[str, Path]:
    rng, runs = np.random.default_rng(seed), {}
    for cell in study().cells_of[seed]:
        name = study().run_name(cell, seed)
        runs[name] = run = folder / name
        run.mkdir(parents=True)
        made = replace(memory_budget.trained(cell), name=name, seed=seed)
        write_json(run / "recipe.json", made.to_json())
        samples = EVALUATED_ON[cell[0]]
        target = rng.integers(0, 8, samples)
        right = rng.random(samples) < SHARES.get(cell_name(cell), 0.75)
        top = np.where(right, target, 8)[:, None]
        arrays = {"index": np.arange(samples), "target": target, "top": top}
        np.savez(run / "answers.npz", **arrays, probability=np.ones((samples, 1)))
        summary = {
            "commits": ["abc"],
            "data_fingerprint": cell[0],
            "hardware": {"cpu": cpu, "torch": "2"},
            "train_s": 100.0 + seed,
            "world_size": 1,
            "trained_on": [{}],
        }
        write_json(run / "summary.json", summary)
    return runs


def by_cell(rows: Sequence[Row]) -> dict[tuple[str, int, str], Row]:
    return {(row.of, row.budget, row.rule): row for row in rows}


def test_the_report_of_made_up_runs(
    speeds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {name: run for seed in (0, 1) for name, run in made_up(tmp_path, seed).items()}
    assert report({}, new_console()) == {"rows": []}
    assert "budget: 0 of 2 seeds have answers." in capsys.readouterr().out
    diverged = {"event": "diverged", "error": "NaN", "time": 0.0, "attempt": 0}
    journal = tmp_path / "budget-1-flashes-16-4-ottt-32-1" / "journal.jsonl"
    journal.write_text(json.dumps(diverged) + "\n")
    report(runs, new_console())
    out = capsys.readouterr().out
    assert "budget: seed 1 lacks flashes-16-4, OTTT, 32, 1: it diverged." in out
    assert "holds no sample" in out and "best of BPTT" in out and "(1 of 2)" in out
    assert "by speeds that were measured in turn" in out
    names = {each.name for each in memory_budget.ANSWERS.iterdir()}
    assert names == {"seed-0.json", "seed-1.json"}
    rows = by_cell(table(new_console()))

    def top1(rule: str) -> list[float]:
        folders = [runs[f"budget-{seed}-fashion-{rule}"] for seed in range(2)]
        right = [read_predictions(folder / "answers.npz").is_correct for folder in folders]
        return [100 * float(each.mean()) for each in right]

    bptt, sltt = rows[FASHION, 2, "BPTT"], rows[FASHION, 2, "SLTT"]
    assert sltt.top1 == pytest.approx(top1("sltt-4-1")) and bptt.is_best
    assert sltt.less is not None
    points, low, high = sltt.less
    assert points == pytest.approx(np.subtract(top1("sltt-4-1"), top1("bptt-2-6")).mean())
    assert low < points < high and sltt.train_s == 100.5
    assert sltt.steps == round(SECONDS[FASHION] / 0.2)
    assert rows[FASHION, 2, "OTTT"].top1 == ()
    assert rows[FASHION, 8, "SLTT"].top1 == rows[FASHION, 32, "SLTT"].top1
    assert len(rows[FLASHES, 32, "OTTT"].top1) == 1 and len(rows[FLASHES, 32, "SLTT"].top1) == 2


def test_the_best_form_of_bptt_is_what_others_are_compared_with(
    speeds: Any, tmp_path: Path
) -> None:
    for cell in speeds["cells"]:
        cell["rule"] = {"OTTT": "BPTT-recompute"}.get(cell["rule"], cell["rule"])
    report(made_up(tmp_path, 0) | made_up(tmp_path, 1), new_console())
    rows = by_cell(table(new_console()))
    for budget in (8, 32):
        forms = [rows[FASHION, budget, rule] for rule in ("BPTT", "BPTT-recompute")]
        best = max(forms, key=lambda row: np.mean(row.top1))
        assert [row.is_best for row in forms] == [row is best for row in forms]
        assert {row.less for row in forms} == {None}
        sltt = rows[FASHION, budget, "SLTT"]
        assert sltt.less is not None
        assert sltt.less[0] == pytest.approx(np.subtract(sltt.top1, best.top1).mean())


def test_runs_of_another_machine_are_refused(speeds: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be on a cpu, torch 2; got another cpu, torch 2"):
        report(made_up(tmp_path, 0, cpu="another cpu"), new_console())
    assert not memory_budget.ANSWERS.exists()
    report(made_up(tmp_path / "own", 0), new_console())
    with pytest.raises(ValueError, match="measured before the first run"):
        measuring.measure()


def test_the_picture_is_what_the_command_draws(
    speeds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(made_up(tmp_path, 0) | made_up(tmp_path, 1), new_console())
    for name in ("one.svg", "other.svg"):
        measuring.draw(table(new_console()), tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "other.svg").read_text()
    assert all(f">{text}<" in drawn for text in (*MICRO, "0.2", "fashion, 120 s of computation"))
    monkeypatch.undo()
    measuring.draw(table(new_console()), tmp_path / "budget.svg")
    committed = measuring.DOCS / "budget.svg"
    assert (tmp_path / "budget.svg").read_text() == committed.read_text()


def test_the_page_has_what_the_kept_answers_tell() -> None:
    _, page = (measuring.DOCS / "results.md").read_text().split("## Accuracy in a memory budget")
    lines = [line for line in page.split("\n## ")[0].splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    found = by_cell(table(new_console()))
    limits = [[f"{found[of, each, 'BPTT'].limit / 1e6:.2f} MB" for each in BUDGETS] for of in SETS]
    fashion, flashes, counts = (row[1:] for row in rows if row[0] not in RULES)
    assert [fashion[::2], flashes[::2]] == limits and counts == [*limits[0], *limits[1]]
    for rule in RULES:
        *accuracies, counts = (row[1:] for row in rows if row[0] == rule)
        ran = [[found[of, budget, rule] for budget in BUDGETS] for of in SETS]
        for cells, of_set in zip(accuracies, ran, strict=True):
            reached = [
                f"{statistics.fmean(each.top1):.2f} ± {statistics.stdev(each.top1):.2f}"
                for each in of_set
            ]
            above = [
                "best of BPTT"
                if each.is_best
                else "{:+.2f} ({:+.2f} to {:+.2f})".format(*each.less)
                if each.less
                else "–"
                for each in of_set
            ]
            assert [cells[::2], cells[1::2]] == [reached, above], rule
        assert counts == [
            f"{each.micro_batch}, {each.slice}, {each.steps:,}" for each in [*ran[0], *ran[1]]
        ], rule
