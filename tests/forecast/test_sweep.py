"""Bytes and time against T, and the largest batch, which is tried."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipeline.forecast.bench import Bench
from pipeline.forecast.sweep import Sweep, sweep
from pipeline.objective import CrossEntropy
from pipeline.recipe import spec
from pipeline.report.sweep import print_sweep, told_sweep
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from tests.forecast.test_probe import RECIPE, recipe_with
from tests.small import command, small_recipe
from tests.test_teaching import taught

RULES = (spec(BPTT), spec(SLTT))
LIMIT = 10**6


@pytest.fixture(scope="module")
def found() -> Sweep:
    return sweep(recipe_with(0.5), steps=(2, 4, 8), rules=RULES, memory_bytes=LIMIT)


def test_bptts_bytes_grow_with_t_and_sltts_do_not(found: Sweep) -> None:
    assert found.rules == ["BPTT", "SLTT", "SLTT-2"]
    assert [point.time_steps for point in found.of("BPTT")] == [2, 4, 8]
    assert found.growth("SLTT") == pytest.approx(1, abs=0.03)
    assert found.growth("BPTT") > 2.5
    assert all(point.images_per_compute_s == 8 / point.cost.compute_s for point in found.points)


def test_seconds_are_over_the_faster_of_folded_and_stepped_bptt_at_each_t(found: Sweep) -> None:
    """And bytes over those of BPTT folded over time."""
    seconds = {("BPTT", 2): 1.0, ("BPTT-chunk-1", 2): 2.0, ("SLTT", 2): 3.0, ("BPTT", 4): 4.0, ("BPTT-chunk-1", 4): 2.0}
    seconds |= {("SLTT", 4): 3.0}
    point = found.points[0]
    points = [
        replace(
            point,
            time_steps=T,
            cost=replace(point.cost, rule=rule, forward_s=each / 2, backward_s=each / 2, peak_saved_bytes=1000 * T),
            largest_batch=None,
        )
        for (rule, T), each in seconds.items()
    ]
    made = replace(found, points=tuple(points), memory_bytes=None)
    assert told_sweep(made)["time_baselines"] == {"2": "BPTT", "4": "BPTT-chunk-1"}
    print_sweep(made, console=(console := Console(file=io.StringIO(), width=200)))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "×: bytes over BPTT's, fwd+bwd over BPTT's at T = 2, BPTT-chunk-1's at T = 4" in out
    assert [line.split()[-2] for line in out.splitlines() if " MB " in line] == ["1.00", "2.00", "2.00", "1.00", "3.00", "1.50"]
    assert "fwd+bwd ms" in out and "images/s of fwd+bwd" in out and "without loading, optimizer and collectives" in out


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.label)
def test_the_largest_batch_fits_and_one_more_sample_does_not(found: Sweep, rule) -> None:
    (point,) = [point for point in found.of(rule.build().label) if point.time_steps == 4]
    assert point.largest_batch is not None and point.largest_batch > 100

    def taken(samples: int) -> int:
        data = recipe_with(0.5).data.with_(samples=2 * samples)
        bench = Bench(recipe_with(0.5, data=data), batch_size=samples)
        cost = bench.cost(rule)
        return cost.peak_saved_bytes + cost.state_bytes + bench.batch_bytes + bench.held().total

    assert taken(point.largest_batch) <= LIMIT < taken(point.largest_batch + 2)


def test_a_largest_batch_that_is_tried_has_its_own_bytes_and_speed() -> None:
    """Each rule at its own: SLTT's is larger than BPTT's, and what it takes is within the limit."""
    data = recipe_with(0.5).data.with_(samples=4000)
    recipe = recipe_with(0.5, data=data)
    found = sweep(recipe, steps=(8,), rules=RULES, memory_bytes=LIMIT, at_largest=True)
    (bptt,), (sltt,) = found.of("BPTT"), found.of("SLTT")
    assert bptt.largest_batch is not None and sltt.largest_batch is not None and sltt.largest_batch > 2 * bptt.largest_batch
    for point in (bptt, sltt):
        assert point.at_largest is not None and point.largest_batch is not None
        beside = Bench(recipe, batch_size=point.largest_batch)
        taken = point.at_largest.peak_saved_bytes + point.at_largest.state_bytes + beside.batch_bytes + beside.held().total
        assert 0.95 * LIMIT < taken <= LIMIT
        assert point.images_per_compute_s_at_largest == pytest.approx(point.largest_batch / point.at_largest.compute_s)
    with pytest.raises(ValueError, match="a largest batch is tried where there is one to find"):
        sweep(recipe, steps=(8,), rules=RULES, at_largest=True)


def test_a_teachers_bytes_lie_beside_a_largest_batch() -> None:
    recipe = taught()
    found = sweep(recipe, steps=(4,), rules=RULES, memory_bytes=10**7)
    assert found.teacher is not None and found.teacher.teacher == "test_efficientnet"
    alone = replace(recipe, teacher=None, objective=spec(CrossEntropy))
    without = sweep(alone, steps=(4,), rules=RULES, memory_bytes=10**7 - found.teacher.bytes)
    assert [point.largest_batch for point in found.points] == [point.largest_batch for point in without.points]
    print_sweep(found, console=Console(file=(out := io.StringIO()), width=200))
    assert f"is in no row: beside every rule it holds {found.teacher.bytes / 1e6:.4g} MB" in out.getvalue()


def test_where_not_one_sample_fits_the_largest_batch_is_0() -> None:
    assert {point.largest_batch for point in sweep(recipe_with(0.5), steps=(2,), rules=RULES, memory_bytes=10).points} == {0}


def test_a_largest_batch_is_timed_on_as_many_threads_as_the_rest() -> None:
    found = sweep(recipe_with(0.5), steps=(2,), rules=RULES, memory_bytes=LIMIT, threads=2)
    try:
        assert (found.hardware["threads"], torch.get_num_threads()) == (2, 2)
    finally:
        torch.set_num_threads(1)


def test_a_rule_that_fits_some_time_steps_is_in_the_table_and_one_that_fits_none_says_why() -> None:
    found = sweep(small_recipe(rule=spec(SLTT, k=3), time_steps=4), steps=(2, 4), rules=(*RULES, spec(SLTT, k=9)))
    assert [point.time_steps for point in found.of("SLTT-3")] == [4]
    assert (
        list(found.refused) == ["SLTT-9", "SLTT-3"]
        and set(found.refused["SLTT-3"]) == {2}
        and found.memory_bytes is None
        and found.points[0].largest_batch is None
    )


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    monkeypatch.setenv("COLUMNS", "160")
    run = command(monkeypatch, capsys)
    code, out, err = run("sweep", str(file), "--steps", "2,4", "--batch", "auto", "--memory", "0.001")
    assert (code, err) == (0, "")
    assert "largest batch" in out and "times the bytes at T = 4 as at T = 2" in out
    assert "not tried" in out and "of its" not in out
    words = ("--steps", "4", "--batch", "auto", "--memory", "0.00006", "--at-largest")
    code, out, err = run("sweep", str(file), *words)
    assert (code, err) == (0, "") and "of its fwd+bwd" in out and "not tried" not in out
    code, out, _ = run("sweep", str(file), "--steps", "2", "--batch", "4", "--format", "json")
    assert json.loads(out)["samples"] == 4 and json.loads(out)["commit"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--steps", "1,x"), "sweep: --steps must be numbers of time steps, such as 1,2,4,8; got '1,x'"),
        (("--steps", "0"), "sweep: --steps must be numbers of time steps, such as 1,2,4,8; got '0'"),
        (("--batch", "4", "--at-largest"), "sweep: --at-largest tries what --batch auto finds; got --batch 4"),
        (("--batch", "none"), "sweep: --batch must be a number of samples or auto; got none"),
        (("--memory", "3"), "sweep: --memory is a limit in GB, from 1e-6 to 1e6, for --batch auto; got 3 with --batch None"),
        (
            ("--memory", "inf", "--batch", "auto"),
            "sweep: --memory is a limit in GB, from 1e-6 to 1e6, for --batch auto; got inf with --batch auto",
        ),
    ],
)
def test_bad_use_ends_in_a_line(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    code, _, err = command(monkeypatch, capsys)("sweep", str(file), *words)
    assert (code, err) == (2, said + "\n")
