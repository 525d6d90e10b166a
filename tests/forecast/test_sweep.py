"""Bytes and time against T, and the largest batch, which is tried."""

import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.core.torch_settings import release_freed_memory
from pipeline.forecast import bench
from pipeline.forecast.bench import Bench, Cost
from pipeline.forecast.sweep import COARSE, Sweep, sweep
from pipeline.measure.memory import memory_now_bytes, peak_rss_bytes, reset_peak_rss
from pipeline.recipe.recipe import Recipe, Spec, spec
from pipeline.report.forecasts import print_sweep
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.train.objective import CrossEntropy
from tests.forecast.test_probe import printed, recipe_with
from tests.helpers.small import small_recipe
from tests.train.test_teaching import taught

RULES = (spec(BPTT), spec(SLTT))
LIMIT = 10**6
PARAMETERS = 4 * (64 * 16 + 16 + 16 * 10 + 10)  # bytes


def as_text(found: Sweep) -> str:
    return "\n".join(printed(print_sweep, found))


@pytest.fixture(scope="module")
def found() -> Sweep:
    return sweep(recipe_with(0.5), steps=(2, 4, 8), rules=RULES, memory_bytes=LIMIT)


def test_bptts_bytes_grow_with_t_and_sltts_do_not(found: Sweep) -> None:
    assert found.rules == ["BPTT", "SLTT", "SLTT-2"]
    assert [point.time_steps for point in found.of("BPTT")] == [2, 4, 8]
    assert found.growth("SLTT") == pytest.approx(1, abs=0.03)
    assert found.growth("BPTT") > 2  # the neurons' currents are one frame at each T
    assert all(point.images_per_compute_s == 8 / point.cost.compute_s for point in found.points)


def test_seconds_are_over_the_faster_of_folded_and_stepped_bptt_at_each_t(found: Sweep) -> None:
    """And bytes over those of BPTT folded over time."""
    seconds = {"BPTT": (1.0, 4.0), "BPTT-chunk-1": (2.0, 2.0), "SLTT": (3.0, 3.0)}
    point = found.points[0]
    points = [
        replace(
            point,
            time_steps=T,
            cost=replace(
                point.cost, rule=rule, forward_s=0.0, backward_s=each, peak_saved_bytes=1000 * T
            ),
            largest_batch=None,
        )
        for rule, both in seconds.items()
        for T, each in zip((2, 4), both, strict=True)
    ]
    made = replace(found, points=tuple(points), memory_bytes=None)
    assert made.to_json()["time_baselines"] == {"2": "BPTT", "4": "BPTT-chunk-1"}
    lines = printed(print_sweep, made)
    faster = "the faster BPTT, which is BPTT at T = 2, BPTT-chunk-1 at T = 4"
    assert f"time / BPTT: fwd+bwd relative to {faster}" in lines
    ratios = [line.split()[-2] for line in lines if " MB " in line]
    assert ratios == ["1.00", "2.00", "2.00", "1.00", "3.00", "1.50"]
    out, own = "\n".join(lines), replace(points[0].cost, rule_bytes=1_500_000)
    with_own = as_text(replace(made, points=(replace(points[0], cost=own), *points[1:])))
    assert "rule's tensors" not in out and "rule's tensors" in with_own and "1.5 MB" in with_own
    assert "fwd+bwd ms" in out and "images/s" in out
    assert "without data loading, optimizer and collectives" in out


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
    batch = 4 * 64 + 8
    expected = (0.9 * 10**9 - 7 * 10**6 + COARSE - 2 * PARAMETERS) // (2 * 10**6 + batch)
    found = sweep(recipe_with(0.5), steps=(4,), rules=RULES, memory_bytes=10**9)
    assert [point.largest_batch for point in found.points] == [expected] * 3
    more = 10**9 + int(PARAMETERS / 0.9) + 1
    averaged = sweep(recipe_with(0.5, ema_decay=0.9), steps=(4,), rules=RULES, memory_bytes=more)
    assert averaged.points[0].largest_batch == expected


@pytest.mark.parametrize("peak", [lambda samples: None, lambda samples: 4 * samples])
def test_where_the_peak_of_small_batches_tells_nothing_what_is_counted_does(
    peak: Callable[[int], int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks(monkeypatch, peak)
    bptt, sltt, _ = sweep(recipe_with(0.5), steps=(4,), rules=RULES, memory_bytes=LIMIT).points
    left = 0.9 * LIMIT - 3 * PARAMETERS
    for point in (bptt, sltt):
        of_a_sample = (point.cost.peak_saved_bytes + point.cost.state_bytes) / 8 + 4 * 64 + 8
        assert point.largest_batch == pytest.approx(left / of_a_sample, rel=0.02)
    assert sltt.largest_batch > 1.3 * bptt.largest_batch  # type: ignore[operator]


def _trained_at_the_largest(rule: Spec) -> None:
    bench.ROUNDS = bench.TIMED = 1  # as `one_round`, in a process of its own
    limit = 4 * 10**7  # beside which what else a process takes meanwhile is little
    data = recipe_with(0.5).data.with_(samples=48_000)
    recipe = replace(recipe_with(0.5, data=data, batch_size=4000), rule=rule, time_steps=8)
    found = sweep(recipe, steps=(8,), rules=(), memory_bytes=limit, at_largest=True)
    (point,) = found.points
    assert point.at_largest is not None and point.largest_batch is not None
    tried = Bench(recipe, batch_size=point.largest_batch)
    made, loss_for, taken = rule.build(), recipe.objective.build(), 0
    made.attach(tried.network)
    for _ in range(3):
        gc.collect()
        release_freed_memory()
        assert reset_peak_rss()
        before = memory_now_bytes(tried.x_B.device)
        for term in made.loss_terms(tried.network, tried.x_TB, loss_for(tried.target_B, None)):
            term.backward.backward()
            del term
        taken = max(taken, peak_rss_bytes() - before)
    assert 0.5 * limit < taken + tried.batch_bytes <= 1.1 * limit


@pytest.mark.full
@pytest.mark.parametrize("rule", [spec(BPTT), spec(SLTT)])
def test_a_largest_batch_that_is_trained_takes_what_there_is_and_no_more(rule: Spec) -> None:
    """By the kernel's own reading, of a batch that this test trains by itself.

    A process of its own reads it: in one that has run other tests, pages that those left or free
    meanwhile count for or against the batch.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_trained_at_the_largest, rule).result()


def test_what_cannot_be_swept_is_refused() -> None:
    with pytest.raises(ValueError, match="at_largest needs memory_bytes"):
        sweep(recipe_with(0.5), steps=(8,), rules=RULES, at_largest=True)


def bptt_of(samples: int) -> Recipe:
    data = recipe_with(0.5).data.with_(samples=samples)
    return replace(recipe_with(0.5, data=data), rule=spec(BPTT))


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
    found = sweep(bptt_of(of), steps=(4,), rules=(), memory_bytes=limit, at_largest=True)
    (point,) = found.points
    assert tried is None or seen == [8, 4, *tried]
    assert (point.largest_batch, point.at_largest is None) == (largest, largest == 0)
    assert found.refused == {}
    [row] = [line for line in printed(print_sweep, found) if line.startswith("BPTT ")]
    assert row.split()[10:11] == [str(largest)] and "about" not in row
    assert 'without "about": trained, and fits; 0: one sample does not fit' in as_text(found)


def test_one_sample_is_tried_where_the_estimate_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes all but a twentieth of the limit, of which the estimate leaves a tenth free."""
    seen, limit = peaks(monkeypatch, lambda samples: 10**9 * samples), 10**9 * 21 // 20
    found = sweep(bptt_of(64), steps=(4,), rules=(), memory_bytes=limit, at_largest=True)
    assert (seen, found.points[0].largest_batch) == ([8, 4, 1], 1)
    assert found.points[0].at_largest is not None


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
    found = sweep(bptt_of(4000), steps=(4,), rules=(), memory_bytes=LIMIT, at_largest=True)
    (point,) = found.points
    assert point.largest_batch in range(61, 101) and point.at_largest is not None
    assert found.refused == {}


def test_a_largest_batch_that_the_data_are_too_few_for_is_an_estimate() -> None:
    found = sweep(recipe_with(0.5), steps=(4,), rules=RULES, memory_bytes=LIMIT, at_largest=True)
    assert {point.at_largest for point in found.points} == {None}
    assert list(found.refused) == found.rules
    out = as_text(found)
    assert "SLTT: its largest batch at T = 4 was not trained: " in out
    assert "not in the table" not in out and f"about {found.points[0].largest_batch:,}" in out
    said = "estimated from the memory of two batches, with 10% of the memory left free"
    assert f'"about": {said}, and not trained' in out


def test_a_teachers_bytes_lie_beside_a_largest_batch() -> None:
    recipe = taught()
    found = sweep(recipe, steps=(4,), rules=RULES, memory_bytes=10**7)
    assert found.teacher is not None and found.teacher.teacher == "test_efficientnet"
    alone = replace(recipe, teacher=None, objective=spec(CrossEntropy))
    without = sweep(alone, steps=(4,), rules=RULES, memory_bytes=10**7 - found.teacher.bytes)
    largest, expected = ([each.largest_batch for each in of.points] for of in (found, without))
    assert largest == expected
    said = f": it holds {found.teacher.bytes / 1e6:.4g} MB"
    assert said in as_text(found)


def test_where_not_one_sample_fits_the_largest_batch_is_0_and_threads_are_as_asked() -> None:
    try:
        found = sweep(recipe_with(0.5), steps=(2,), rules=(), memory_bytes=10, threads=2)
        assert (found.hardware["threads"], torch.get_num_threads()) == (2, 2)
    finally:
        torch.set_num_threads(1)
    assert [point.largest_batch for point in found.points] == [0]


def test_a_rule_that_fits_some_time_steps_is_in_the_table_and_one_that_fits_none_says_why() -> None:
    recipe = small_recipe(rule=spec(SLTT, k=3), time_steps=4)
    found = sweep(recipe, steps=(2, 4), rules=(*RULES, spec(SLTT, k=9)))
    assert [point.time_steps for point in found.of("SLTT-3")] == [4]
    assert list(found.refused) == ["SLTT-9", "SLTT-3"] and set(found.refused["SLTT-3"]) == {2}
    assert found.memory_bytes is found.points[0].largest_batch is None
