"""The study of credit over time: its cells, what a rule loses, and what `probe` advises."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.credit_flashes import draw
from benchmarks.memory_picture import DOCS
from pipeline.core.printing import new_console
from pipeline.recipe.json import read_json, write_json
from pipeline.spiking.neuron import LIF, PLIF
from recipes.compare import credit_flashes, credit_flashes_rates
from recipes.compare.blocks_base import Answers, _hash, cell_name
from recipes.compare.credit_flashes import (
    CELLS,
    PAIRS,
    RULES,
    SETS,
    STUDY,
    Advice,
    Loss,
    advice_of,
    holds,
    losses_of,
    neurons_of,
    top1_of,
    trained,
)


def test_the_runs_of_a_set_share_all_but_rule_neuron_and_rate(tmp_path: Path) -> None:
    made = replace(STUDY, folder=tmp_path).recipes()
    assert [sum(each.seed == seed for each in made) for seed in range(3)] == [59, 59, 17]
    assert {each.time_steps for each in made if each.seed == 2} == {4, 8}
    assert {2 * gap < T for T, gap in PAIRS} == {True}
    for name, label in CELLS:
        recipe, baseline = trained((name, label)), trained((name, neurons_of(label)))
        rate = {"optimizer": baseline.optimizer}
        assert replace(recipe, rule=baseline.rule, **rate) == baseline
        assert recipe.optimizer.with_(lr=0) == baseline.optimizer.with_(lr=0)
        neurons = {type(each) for each in recipe.model.build().modules() if isinstance(each, LIF)}
        assert neurons == {PLIF if "learnt" in label else LIF}
        if name != "fashion":
            T, gap = map(int, name.removeprefix("flashes-").split("-"))
            assert recipe.time_steps == recipe.data.kwargs["steps"] == T and (T, gap) in PAIRS
    trials = credit_flashes_rates.recipe().recipes
    assert len(trials) == 36 and {each.seed for each in trials} == {100}
    assert {each.data.kwargs["held_out"] for each in trials} == {0.1}
    assert all(each.time_steps < 32 for each in trials)


def answers(rng: np.random.Generator, lost: dict[str, float], *, per_seed: float) -> Answers:
    """Right in 99 % by BPTT; a set loses so many points with every other rule."""
    right = {}
    for name, rule in CELLS:
        is_baseline = rule == neurons_of(rule)
        share = 0.99 if is_baseline else 0.99 - (lost[name] + per_seed * rng.normal()) / 100
        right[cell_name((name, rule))] = rng.random(10_000 if name == "fashion" else 4_000) < share
    return right


def probes(share: Callable[[str], float]) -> dict[str, Any]:
    """Of each set the largest share, and gradients that are BPTT's."""
    cosines = {rule: {"conv": 1.0, "classifier": 1.0} for rule in RULES}
    return {
        cell_name((name, rule)): {
            "before": {"temporal share": {"conv": share(name), "classifier": 0.0}, **cosines},
            "after": {"temporal share": {"conv": 0.5, "classifier": 0.0}, **cosines},
        }
        for name, rule in CELLS
    }


SAME = probes(lambda name: 0.5)


def test_what_a_rule_loses_has_an_interval_of_pooled_seeds_and_of_pairs() -> None:
    """Over 40 studies the half-width is that of the planted deviations, and holds the truth."""
    rng, held, squares = np.random.default_rng(0), [], []
    lost = dict.fromkeys((*SETS, "fashion"), 5.0)
    for _ in range(40):
        right = {seed: answers(rng, lost, per_seed=2.0) for seed in range(3)}
        losses = losses_of(right, SAME)
        held += [each.low <= 5.0 <= each.high for each in losses]
        squares += [((x.high - x.low) / 2) ** 2 for x in losses if x.name != "fashion"]
    assert np.mean(held) >= 0.93
    # Of a seed: the planted deviation, and the chance of 4,000 answers of both rules.
    chance = 100**2 * (0.94 * 0.06 + 0.99 * 0.01)
    student, normal = stats.t.ppf(0.975, 4), stats.norm.ppf(0.975)
    expected = student**2 * (4 + chance / 4000) / 3 + normal**2 * chance / 3 / 4000
    assert np.mean(squares) == pytest.approx(expected, rel=0.1)


def test_a_set_has_its_own_variance_and_a_diverged_run_leaves_its_seed_out() -> None:
    rng, lost = np.random.default_rng(0), dict.fromkeys((*SETS, "fashion"), 5.0)
    right = {seed: answers(rng, lost, per_seed=0.0) for seed in range(3)}
    width = {each.name: each.high - each.low for each in losses_of(right, SAME)}
    right[1]["flashes-32-1, SLTT"][:2000] = False
    del right[2]["flashes-16-1, OTTT"]
    del right[2]["flashes-8-1, OTTT"], right[1]["flashes-8-1, OTTT"]
    found = {(each.name, each.rule): each for each in losses_of(right, SAME)}
    wider = [
        name
        for name in width
        if found[name, "SLTT"].high - found[name, "SLTT"].low > 2 * width[name]
    ]
    assert wider == ["flashes-32-1"]
    assert ("flashes-16-1", "OTTT") in found and ("flashes-8-1", "OTTT") not in found


def test_answers_of_a_pair_count_as_one() -> None:
    """Recordings whose answers repeat those of their reversal say nothing more."""
    rng = np.random.default_rng(0)
    lost = dict.fromkeys((*SETS, "fashion"), 5.0)
    once = {seed: answers(rng, lost, per_seed=0.0) for seed in range(3)}
    single = {s: {cell: x.repeat(2) for cell, x in right.items()} for s, right in once.items()}
    both = {s: {cell: np.tile(x, 2) for cell, x in right.items()} for s, right in once.items()}
    widths = [
        np.mean([each.high - each.low for each in losses_of(of, SAME)]) for of in (single, both)
    ]
    assert 1.05 * widths[1] < widths[0] < 2**0.5 * widths[1]


def loss(rule: str, share: float, kind: str, *, after: float = 0.5) -> Loss:
    points = {"safe": 0.0, "unsafe": 9.0, "undecided": 1.0}[kind]
    ends = {"points": points, "low": points - 0.5, "high": points + 0.5}
    signs = {"share before": share, "share after": after}
    made = Loss(name="flashes-8-1", rule=rule, signs=signs, deviation=0.1, **ends)
    assert made.kind == kind
    return made


def test_the_threshold_is_most_often_right_on_decided_cells_of_rules_without_time() -> None:
    losses = [
        *(loss("SLTT", 0.2, "safe"), loss("OTTT", 0.3, "safe"), loss("SLTT", 0.7, "unsafe")),
        loss("SLTT", 0.25, "undecided"),
        *(loss("truncated BPTT", 0.1, "unsafe") for _ in range(9)),
    ]
    assert advice_of(losses) == Advice("share before", pytest.approx(0.5))
    assert not Advice("share before", 0.25).is_right(losses[1])
    swapped = [
        loss("SLTT", 0.5, "safe", after=0.1),
        loss("SLTT", 0.5, "unsafe", after=0.6),
    ]
    assert advice_of(swapped) == Advice("share after", pytest.approx(0.35))
    assert advice_of([loss("SLTT", 0.2, "unsafe"), loss("SLTT", 0.4, "unsafe")]) is None


def test_advice_holds_from_8_of_10_decided_cells_on_with_3_of_each_kind() -> None:
    def judged(count: int, share: float, kind: str) -> list[Loss]:
        return [replace(loss("SLTT", share, kind), name="flashes-32-1") for _ in range(count)]

    advice, safe = Advice("share before", 0.5), judged(3, 0.2, "safe")
    assert holds(advice, [*safe, *judged(5, 0.8, "unsafe"), *judged(2, 0.3, "unsafe")])
    assert holds(advice, [*safe, *judged(4, 0.8, "unsafe"), *judged(3, 0.3, "unsafe")]) is False
    missed = judged(3, 0.8, "safe")  # an advice that calls nothing safe is right in 12 of 15
    assert holds(advice, [*missed, *judged(12, 0.8, "unsafe")]) is False
    assert holds(advice, [*safe[:2], *judged(8, 0.8, "unsafe")]) is None
    assert holds(advice, [*safe, *judged(6, 0.8, "unsafe")]) is None
    assert holds(advice, [*safe, *judged(7, 0.8, "undecided")]) is None


def test_the_report_tells_losses_and_how_often_the_advice_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = replace(STUDY, folder=tmp_path)
    monkeypatch.setattr(credit_flashes, "STUDY", study)
    monkeypatch.setattr(credit_flashes, "PROBES", tmp_path / "probes.json")
    rng = np.random.default_rng(0)
    lost = {name: 0.0 if name.endswith(("-1", "fashion")) else 9.0 for name in (*SETS, "fashion")}
    found = probes(lambda name: 0.2 if lost[name] == 0 else 0.8)
    assert credit_flashes.report({}, new_console()) == {}
    assert "credit: 0 of 3 seeds have answers." in capsys.readouterr().out
    hashes = {cell_name(cell): _hash(trained(cell)) for cell in CELLS}
    for seed in range(3):
        right = answers(rng, lost, per_seed=0.0)
        cells = {cell: np.packbits(each).tobytes().hex() for cell, each in right.items()}
        block = {"recipes": hashes, "contents": {}, "cells": cells}
        write_json(tmp_path / f"seed-{seed}.json", block)
    assert credit_flashes.report({}, new_console()) == {}
    assert "benchmarks.credit_flashes must measure seed 0's runs" in capsys.readouterr().out
    write_json(credit_flashes.PROBES, found)
    found = credit_flashes.report({}, new_console())
    out = " ".join(capsys.readouterr().out.split())
    assert found["advice"] == {"sign": "share before", "threshold": pytest.approx(0.5)}
    assert "a rule is safe where share before training is at most 0.50" in out
    assert re.search(r"right in (\d) of \1 safe on T = 8 and 16, 9 of 9 unsafe on T", out)
    assert re.search(r"(\d) of \1 safe on the judged part, 9 of 9 unsafe on the judged", out)
    assert re.search(r"share before \+0\.[4-9]\d \+0\.[4-9]\d", out)
    assert "It holds." in out and "By a cosine of 0.9" in out
    losses = [Loss(**each) for each in found["losses"]]
    top1 = top1_of(study.read(new_console()))
    for name in ("one.svg", "other.svg"):
        draw(top1, losses, tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text()
    assert drawn == (tmp_path / "other.svg").read_text()
    assert all(f">{text}<" in drawn for text in (*RULES, "T = 8", "T = 32", "lost to BPTT"))


def test_the_picture_is_that_of_the_answers(tmp_path: Path) -> None:
    committed = DOCS / "credit.svg"
    right = STUDY.read(new_console())
    assert bool(right) == committed.exists()
    if right:
        losses = losses_of(right, read_json(credit_flashes.PROBES))
        draw(top1_of(right), losses, tmp_path / "credit.svg")
        assert (tmp_path / "credit.svg").read_text() == committed.read_text()


def test_the_page_has_what_the_kept_answers_tell() -> None:
    _, page = (DOCS / "results.md").read_text().split("## Credit over time")
    lines = [line for line in page.split("\n## ")[0].splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    right = STUDY.read(new_console())
    top1, losses = top1_of(right), losses_of(right, read_json(credit_flashes.PROBES))
    lost = {(each.name, each.rule): each for each in losses}
    for name in (*SETS, "fashion"):
        _, *sizes = name.split("-")
        words = "T = {}, gap {}".format(*sizes) if sizes else "Fashion-MNIST, T = 4"
        reached, below = [row[1:] for row in rows if row[0] == words]
        values = [top1.get((name, rule)) for rule in RULES]
        assert reached == ["none" if each is None else f"{each:.2f}" for each in values], name
        found = [lost.get((name, rule)) for rule in RULES if rule != neurons_of(rule)]
        assert below == [
            "none"
            if each is None
            else f"{each.points:.2f} ({each.low:.2f} to {each.high:.2f}; {each.deviation:.2f}),"
            f" {each.kind}"
            for each in found
        ], name
