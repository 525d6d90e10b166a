from __future__ import annotations

import pytest

from pipeline.report.study import COMPUTE, Spread, Study
from tests.report.hand_made import MACHINE, recipe, run, study


def test_mean_and_spread_over_seeds():
    (group,) = study().groups
    assert group.rules == ["BPTT", "SLTT"] and group.has_baseline
    found = group.spread("SLTT", "top1")
    assert found is not None and (found.mean, found.runs) == (pytest.approx(0.895), 2)
    assert found.deviation == pytest.approx(0.01 / 2**0.5)
    assert group.spread("SLTT", COMPUTE) == Spread(mean=0.12, deviation=0.0, runs=2)
    assert group.spread("SLTT", "peak_device_bytes") is None


def test_ratios_are_of_paired_seeds():
    (group,) = study(run("SLTT", seed=7, peak_saved_bytes=80)).groups
    assert group.ratios("SLTT", "peak_saved_bytes") == Spread(mean=0.25, deviation=0.0, runs=2)
    assert group.ratios("SLTT", COMPUTE) == Spread(mean=0.75, deviation=0.0, runs=2)
    (difference,) = group.differences
    assert (difference.seeds, difference.mean) == (2, pytest.approx(1.5))


def test_two_runs_of_a_seed_count_as_their_mean():
    (before,) = study().groups
    seed, size = before.of("BPTT")[0].seed, before.of("BPTT")[0].value("peak_saved_bytes")
    assert size is not None
    (group,) = study(run("BPTT", seed=seed, peak_saved_bytes=3 * size, name="again")).groups
    assert group.ratios("BPTT", "peak_saved_bytes") == Spread(mean=1.0, deviation=0.0, runs=2)
    ratio = group.ratios("SLTT", "peak_saved_bytes")
    assert ratio is not None and ratio.mean == pytest.approx((0.25 / 2 + 0.25) / 2)  # 0.25 of each seed's, as above


def test_other_machines_and_other_studies_are_apart():
    elsewhere = run("SLTT", hardware={**MACHINE, "cpu": "another"}, name="elsewhere")
    other_study = run("SLTT", study="f" * 16, name="other")
    beside = run("SLTT", own_cores=True, name="beside")
    groups = study(elsewhere, other_study, run("SLTT", world_size=2, name="two"), beside).groups
    assert [len(group.runs) for group in groups] == [4, 1, 1, 1, 1]
    assert [group.has_baseline for group in groups] == [True, False, False, False, False]
    assert all(group.ratios("SLTT", "wall_s") is None for group in groups[1:])


def test_the_faster_bptt_is_what_time_is_divided_by():
    slow, fast = run("BPTT-chunk-1", backward_s=96.0), run("BPTT-chunk-1", backward_s=6.0, wall_s=10.0)
    assert study(slow).groups[0].fastest_baseline == "BPTT"
    (group,) = study(fast, run("BPTT-recompute", backward_s=1.0)).groups
    assert group.fastest_baseline == "BPTT-chunk-1"
    assert group.ratios("SLTT", COMPUTE) == Spread(mean=1.2, deviation=None, runs=1)
    assert group.ratios("SLTT", "wall_s") == Spread(mean=1.6, deviation=None, runs=1)
    assert [group.base_of(name) for name in ("images_per_s", "top1")] == ["BPTT-chunk-1", "BPTT"]


def test_two_rules_of_one_label_are_told_apart():
    rescaled = recipe("SLTT", rule={"target": "pipeline.rules.sltt.SLTT", "kwargs": {"k": 1, "rescale": True}})
    (group,) = study(run("SLTT", seed=4, recipe=rescaled)).groups
    assert group.rules == ["BPTT", "SLTT (as it comes)", "SLTT (k=1, rescale=True)"]
    assert [difference.rule for difference in group.differences] == ["SLTT (as it comes)"]


def test_without_a_baseline():
    (group,) = Study(title="alone", runs=(run("SLTT"), run("BPTT", state="failed"))).groups
    assert not group.has_baseline and group.ratios("SLTT", "wall_s") is None and group.differences == []
