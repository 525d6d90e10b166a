"""Claims against figures that were chosen to hold them just, and just not."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.report.claims import Claim, Measured, flat_in_t, measured, print_claims, saved_bytes, time_at_most, time_of_k


def rule(*, saved: float = 0.0, forward: float = 1.0, backward: float = 2.0) -> Measured:
    return Measured(saved_bytes=saved, forward_s=forward, backward_s=backward)


def test_means_over_runs_and_batches() -> None:
    summaries = [
        {"peak_saved_bytes": 10, "forward_s": 20.0, "backward_s": 40.0, "steps": 10},
        {"peak_saved_bytes": 30, "forward_s": 40.0, "backward_s": 60.0, "steps": 10},
    ]
    found = measured(summaries)
    assert found == Measured(saved_bytes=20, forward_s=3.0, backward_s=5.0)
    assert (found.compute_s, found.ratio) == (8.0, pytest.approx(5 / 3))


@pytest.mark.parametrize(("saved", "holds"), [(24.9, True), (25.1, False)])
def test_saved_bytes_are_held_to_one_in_t_and_a_twentieth(saved: float, holds: bool) -> None:
    assert saved_bytes("SLTT", rule(saved=saved), rule(saved=100), T=5, published="").holds is holds


@pytest.mark.parametrize(("largest", "holds"), [(102.9, True), (103.1, False)])
def test_flat_is_within_three_per_cent_of_the_least(largest: float, holds: bool) -> None:
    claim = flat_in_t("SLTT", {2: 101.0, 4: largest, 16: 100.0}, published="")
    assert claim.holds is holds and claim.claim == "saved bytes from T = 2 to 16"


@pytest.mark.parametrize(("seconds", "holds"), [(1.46, True), (1.47, False)])
def test_the_time_of_one_step_is_held_to_what_r_allows_of_the_faster_bptt(seconds: float, holds: bool) -> None:
    """T = 6, r = 2: 1.1 x 8/18 = .4889, of 3 s 1.4667; the slower BPTT would allow more."""
    one = rule(forward=seconds, backward=0.0)
    claim = time_of_k("SLTT-1", one, [rule(forward=2.0, backward=4.0), rule()], T=6, k=1, published="")
    assert claim.holds is holds and claim.bound == "<= 0.489 (r = 2.00)"


@pytest.mark.parametrize(("seconds", "holds"), [(2.99, True), (3.01, False)])
def test_sltt_may_take_as_long_as_the_faster_bptt(seconds: float, holds: bool) -> None:
    claim = time_at_most("SLTT", rule(forward=seconds, backward=0.0), [rule(forward=9.0), rule()], bound=1.0, published="")
    assert claim.holds is holds


def test_what_does_not_hold_is_shown_so_and_what_was_not_run_says_nothing() -> None:
    console = Console(file=io.StringIO(), width=200)
    broken = flat_in_t("SLTT", {2: 100.0, 16: 200.0}, published="constant")
    absent = Claim(about="SLTT, ImageNet", claim="top-1", published="66.19 %", bound="", ours="not run here", holds=None)
    print_claims([broken, absent], console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("does not hold" in line and "+100.0%" in line for line in lines)
    assert any("not run here" in line and "hold" not in line for line in lines)
