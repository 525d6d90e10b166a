"""Bytes and time against T, and the largest batch, which is tried."""

import gc
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pipeline.core.torch_settings import release_freed_memory
from pipeline.forecast.bench import Bench, Cost
from pipeline.forecast.sweep import COARSE, Sweep, sweep
from pipeline.measure.memory import memory_now_bytes, peak_rss_bytes, reset_peak_rss
from pipeline.recipe.recipe import Spec, spec
from pipeline.report.forecasts import print_sweep
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.train.objective import CrossEntropy
from tests.forecast.test_probe import RECIPE, TWO_NETWORKS, recipe_with
from tests.helpers.small import command, small_recipe
from tests.train.test_teaching import taught

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
    seconds = {
        ("BPTT", 2): 1.0,
        ("BPTT-chunk-1", 2): 2.0,
        ("SLTT", 2): 3.0,
        ("BPTT", 4): 4.0,
        ("BPTT-chunk-1", 4): 2.0,
    }
    seconds |= {("SLTT", 4): 3.0}
    point = found.points[0]
    points = [
        replace(
            point,
            time_steps=T,
            cost=replace(
                point.cost,
                rule=rule,
                forward_s=each / 2,
                backward_s=each / 2,
                peak_saved_bytes=1000 * T,
            ),
            largest_batch=None,
        )
        for (rule, T), each in seconds.items()
    ]
    made = replace(found, points=tuple(points), memory_bytes=None)
    assert made.to_json()["time_baselines"] == {"2": "BPTT", "4": "BPTT-chunk-1"}
    print_sweep(made, console=(console := Console(file=io.StringIO(), width=200)))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "×: bytes over BPTT's, fwd+bwd over BPTT's at T = 2, BPTT-chunk-1's at T = 4" in out
    assert [line.split()[-2] for line in out.splitlines() if " MB " in line] == [
        "1.00",
        "2.00",
        "2.00",
        "1.00",
        "3.00",
        "1.50",
    ]
    with_own = replace(made.points[0], cost=replace(made.points[0].cost, rule_bytes=1_500_000))
    assert "rule's own" not in out and "1.5 MB" not in out
    told = printed(replace(made, points=(with_own, *made.points[1:])))
    assert "rule's own" in told and "1.5 MB" in told
    assert (
        "fwd+bwd ms" in out
        and "images/s of fwd+bwd" in out
        and "without loading, optimizer and collectives" in out
    )


def peaks(monkeypatch: pytest.MonkeyPatch, peak_of: Callable[[int], int | None]) -> list[int]:
    """Lets each batch of so many samples take `peak_of` them, and the samples of each that is tried
    be seen.
    """
    tried: list[int] = []
    cost = Bench.cost

    def made_up(self: Bench, rule: Spec) -> Cost:
        tried.append(self.samples)
        return replace(cost(self, rule), peak_memory_bytes=peak_of(self.samples))

    monkeypatch.setattr(Bench, "cost", made_up)
    return tried


def test_a_largest_batch_is_of_what_training_takes_at_its_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not of what is counted: 7 MB and 2 MB a sample, beside weights, momentum and batch, of 1 GB,
    a tenth of it left free.
    """
    peaks(monkeypatch, lambda samples: 7 * 10**6 + 2 * 10**6 * samples)
    parameters = 4 * (64 * 16 + 16 + 16 * 10 + 10)
    batch = 4 * 64 + 8
    expected = (0.9 * 10**9 - 7 * 10**6 + COARSE - 2 * parameters) // (2 * 10**6 + batch)
    found = sweep(recipe_with(0.5), steps=(4,), rules=RULES, memory_bytes=10**9)
    assert [point.largest_batch for point in found.points] == [expected] * 3
    more = 10**9 + int(parameters / 0.9) + 1
    averaged = sweep(recipe_with(0.5, ema_decay=0.9), steps=(4,), rules=RULES, memory_bytes=more)
    assert averaged.points[0].largest_batch == expected


@pytest.mark.parametrize("peak", [lambda samples: None, lambda samples: 4 * samples])
def test_where_the_peak_of_small_batches_tells_nothing_what_is_counted_does(
    peak: Callable[[int], int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks(monkeypatch, peak)
    counted = sweep(recipe_with(0.5), steps=(4,), rules=RULES, memory_bytes=LIMIT)
    bptt, sltt = counted.points[0], counted.points[1]
    assert bptt.largest_batch is not None and sltt.largest_batch is not None
    for point in (bptt, sltt):
        of_a_sample = (point.cost.peak_saved_bytes + point.cost.state_bytes) / 8 + 4 * 64 + 8
        held = 3 * 4 * (64 * 16 + 16 + 16 * 10 + 10)
        assert point.largest_batch == pytest.approx((0.9 * LIMIT - held) / of_a_sample, rel=0.02)
    assert sltt.largest_batch > 1.5 * bptt.largest_batch


def test_a_largest_batch_that_is_trained_takes_what_there_is_and_no_more() -> None:
    """By the kernel's own reading, of a batch that this test trains by itself."""
    limit = 8 * 10**7  # beside which what else a process takes meanwhile is little
    data = recipe_with(0.5).data.with_(samples=96_000)
    recipe = replace(recipe_with(0.5, data=data, batch_size=8000), rule=spec(SLTT), time_steps=8)
    found = sweep(recipe, steps=(8,), rules=RULES, memory_bytes=limit, at_largest=True)
    (bptt,), (sltt,) = found.of("BPTT"), found.of("SLTT")
    assert (
        bptt.largest_batch is not None
        and sltt.largest_batch is not None
        and sltt.largest_batch > 2 * bptt.largest_batch
    )
    for point, rule in ((bptt, spec(BPTT)), (sltt, spec(SLTT))):
        assert point.at_largest is not None and point.largest_batch is not None
        assert point.images_per_compute_s_at_largest == pytest.approx(
            point.largest_batch / point.at_largest.compute_s
        )
        bench, made, loss_for = (
            Bench(recipe, batch_size=point.largest_batch),
            rule.build(),
            recipe.objective.build(),
        )
        made.attach(bench.network)
        taken = 0
        for _ in range(3):
            gc.collect()  # garbage of other tests, freed meanwhile, would hide what is taken
            release_freed_memory()
            assert reset_peak_rss()
            before = memory_now_bytes(bench.x_B.device)
            for objective in made.loss_terms(
                bench.network, bench.x_TB, loss_for(bench.target_B, None)
            ):
                objective.backward.backward()
                del objective
            taken = max(taken, peak_rss_bytes() - before)
        assert 0.5 * limit < taken + bench.batch_bytes <= 1.1 * limit
    with pytest.raises(ValueError, match="at_largest needs memory_bytes"):
        sweep(recipe, steps=(8,), rules=RULES, at_largest=True)


def printed(found: Sweep) -> str:
    print_sweep(found, console=Console(file=(out := io.StringIO()), width=200))
    return out.getvalue()


@pytest.mark.parametrize(
    ("most", "of", "tried", "largest"),
    [
        (10**9, 600, [450, 500], 500),
        (490, 600, [450, 500, 475, 487, 493], 487),
        (480, 500, [450, 500, 475, 487, 481], 475),
        (10**9, 460, [450, 460], 460),
        (10**9, 450, [450], 450),
        (300, 500, [450, 225, 337, 281, 309], 281),
        (1, 500, [450, 225, 112, 56, 28, 14, 7, 3, 1, 2], 1),
        (0, 500, None, 0),
    ],
)
def test_around_the_estimate_the_largest_that_fitted_is_told(
    most: int, of: int, tried: list[int] | None, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory ends at more than `most` samples, but for the two batches that the estimate is of; the
    data have `of`.
    """
    limit = 10**9
    seen = peaks(
        monkeypatch,
        lambda samples: 2 * 10**6 * samples if samples in (4, 8) or samples <= most else 2 * limit,
    )
    recipe = replace(
        recipe_with(0.5, data=recipe_with(0.5).data.with_(samples=of)), rule=spec(BPTT)
    )
    found = sweep(recipe, steps=(4,), rules=(), memory_bytes=limit, at_largest=True)
    (point,) = found.points
    assert tried is None or seen == [8, 8, 8, 4, *tried]
    assert (point.largest_batch, point.at_largest is None, found.refused) == (
        largest,
        largest == 0,
        {},
    )
    row = next(line for line in printed(found).splitlines() if line.startswith("BPTT "))
    assert row.split()[10:11] == [str(largest)] and "about" not in row
    assert (
        '; without "about": trained, and fitted, or 0 where not even one sample did; with it: an'
        " estimate" in printed(found)
    )


def test_one_sample_is_tried_where_the_estimate_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes all but a twentieth of the limit, of which the estimate leaves a tenth free."""
    recipe = replace(recipe_with(0.5), rule=spec(BPTT))
    seen = peaks(monkeypatch, lambda samples: 10**9 * samples)
    (point,) = sweep(
        recipe, steps=(4,), rules=(), memory_bytes=10**9 * 21 // 20, at_largest=True
    ).points
    assert (seen, point.largest_batch, point.at_largest is None) == ([8, 8, 8, 4, 1], 1, False)


def test_a_batch_that_this_machine_has_no_memory_for_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU, as torch refuses it."""
    loss_terms = BPTT._loss_terms

    def full(self: BPTT, model: Any, x_TB: Tensor, *more: Any) -> Any:
        if x_TB.shape[1] > 100:
            torch.empty(2**60, dtype=torch.uint8)
        return loss_terms(self, model, x_TB, *more)

    monkeypatch.setattr(BPTT, "_loss_terms", full)
    recipe = replace(
        recipe_with(0.5, data=recipe_with(0.5).data.with_(samples=4000)), rule=spec(BPTT)
    )
    found = sweep(recipe, steps=(4,), rules=(), memory_bytes=LIMIT, at_largest=True)
    (point,) = found.points
    assert (
        point.largest_batch is not None
        and 60 < point.largest_batch <= 100
        and point.at_largest is not None
    )
    assert found.refused == {}


def test_a_largest_batch_that_the_data_are_too_few_for_is_an_estimate() -> None:
    found = sweep(recipe_with(0.5), steps=(4,), rules=RULES, memory_bytes=LIMIT, at_largest=True)
    assert {point.at_largest for point in found.points} == {None} and list(
        found.refused
    ) == found.rules
    out = printed(found)
    assert (
        "SLTT: its largest batch at T = 4 was not trained: " in out
        and "not in the table" not in out
    )
    assert f"about {found.points[0].largest_batch:,}" in out
    assert (
        "with it: an estimate from what two batches took, 10% of the memory left free, not trained"
        in out
    )


def test_a_teachers_bytes_lie_beside_a_largest_batch() -> None:
    recipe = taught()
    found = sweep(recipe, steps=(4,), rules=RULES, memory_bytes=10**7)
    assert found.teacher is not None and found.teacher.teacher == "test_efficientnet"
    alone = replace(recipe, teacher=None, objective=spec(CrossEntropy))
    without = sweep(alone, steps=(4,), rules=RULES, memory_bytes=10**7 - found.teacher.bytes)
    assert [point.largest_batch for point in found.points] == [
        point.largest_batch for point in without.points
    ]
    assert (
        f"is in no row: beside every rule it holds {found.teacher.bytes / 1e6:.4g} MB"
        in printed(found)
    )


def test_where_not_one_sample_fits_the_largest_batch_is_0() -> None:
    assert {
        point.largest_batch
        for point in sweep(recipe_with(0.5), steps=(2,), rules=RULES, memory_bytes=10).points
    } == {0}


def test_a_largest_batch_is_timed_on_as_many_threads_as_the_rest() -> None:
    found = sweep(recipe_with(0.5), steps=(2,), rules=RULES, memory_bytes=LIMIT, threads=2)
    try:
        assert (found.hardware["threads"], torch.get_num_threads()) == (2, 2)
    finally:
        torch.set_num_threads(1)


def test_a_rule_that_fits_some_time_steps_is_in_the_table_and_one_that_fits_none_says_why() -> None:
    found = sweep(
        small_recipe(rule=spec(SLTT, k=3), time_steps=4),
        steps=(2, 4),
        rules=(*RULES, spec(SLTT, k=9)),
    )
    assert [point.time_steps for point in found.of("SLTT-3")] == [4]
    assert (
        list(found.refused) == ["SLTT-9", "SLTT-3"]
        and set(found.refused["SLTT-3"]) == {2}
        and found.memory_bytes is None
        and found.points[0].largest_batch is None
    )


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    monkeypatch.setenv("COLUMNS", "160")
    run = command(monkeypatch, capsys)
    code, out, err = run(
        "sweep", str(file), "--steps", "2,4", "--batch", "auto", "--memory", "0.001"
    )
    assert (code, err) == (0, "")
    assert "largest batch" in out and "times the bytes at T = 4 as at T = 2" in out
    assert "about: an estimate" in out and "of its" not in out
    words = ("--steps", "4", "--batch", "auto", "--memory", "0.00006", "--at-largest")
    code, out, err = run("sweep", str(file), *words)
    assert (
        (code, err) == (0, "")
        and "of its fwd+bwd" in out
        and 'without "about": trained, and fitted' in out
    )
    code, out, _ = run("sweep", str(file), "--steps", "2", "--batch", "4", "--format", "json")
    assert json.loads(out)["samples"] == 4 and json.loads(out)["commit"]


def test_of_several_recipes_each_network_is_swept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(TWO_NETWORKS)
    monkeypatch.setattr("pipeline.forecast.bench.RULES", ())
    code, out, err = command(monkeypatch, capsys)(
        "sweep", str(file), "--steps", "2", "--format", "json"
    )
    assert (code, err) == (0, "")
    found = [
        (each["recipe"], [point["cost"]["rule"] for point in each["points"]])
        for each in json.loads(out)
    ]
    assert found == [("small, bptt", ["SLTT-2", "BPTT"]), ("wide", ["SLTT-2"])]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--steps", "1,x"),
            "sweep: --steps must be numbers of time steps, such as 1,2,4,8; got '1,x'",
        ),
        (
            ("--steps", "0"),
            "sweep: --steps must be numbers of time steps, such as 1,2,4,8; got '0'",
        ),
        (
            ("--batch", "4", "--at-largest"),
            "sweep: --at-largest tries what --batch auto finds; got --batch 4",
        ),
        (("--batch", "none"), "sweep: --batch must be a number of samples or auto; got none"),
        (
            ("--memory", "3"),
            (
                "sweep: --memory is a limit in GB, from 1e-6 to 1e6, for --batch auto; got 3 with"
                " --batch None"
            ),
        ),
        (
            ("--memory", "inf", "--batch", "auto"),
            (
                "sweep: --memory is a limit in GB, from 1e-6 to 1e6, for --batch auto; got inf with"
                " --batch auto"
            ),
        ),
    ],
)
def test_bad_use_ends_in_a_line(
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    code, _, err = command(monkeypatch, capsys)("sweep", str(file), *words)
    assert (code, err) == (2, said + "\n")
