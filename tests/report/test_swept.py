"""What pages show of a sweep: each rule's own largest batch, and the speed there beside the faster
BPTT at its own.
"""

import json
import math
from typing import Any

import pytest

from pipeline.forecast.sweep import sweep
from pipeline.recipe.recipe import spec
from pipeline.report import page
from pipeline.report.claims import Returned, returned
from pipeline.report.results import ReportError
from pipeline.report.sweeps import largest_batches, sweep_of, swept
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from tests.forecast.test_probe import recipe_with
from tests.helpers.hand_made import study
from tests.report.test_figures import SWEEP


def at_largest(sizes: dict[tuple[str, int], int]) -> dict[str, Any]:
    """SWEEP with a largest batch of each rule and T, which takes 0.75 s."""
    points = [
        {**point, "largest_batch": sizes[point["cost"]["rule"], point["time_steps"]]}
        for point in SWEEP["points"]
    ]
    return {
        **SWEEP,
        "memory_bytes": 10**9,
        "points": [{**point, "at_largest": point["cost"]} for point in points],
    }


LARGEST = at_largest({("BPTT", 1): 120, ("BPTT", 4): 30, ("SLTT", 1): 120, ("SLTT", 4): 100})


def test_the_speed_at_a_rules_own_largest_batch_is_beside_bptts_at_its_own():
    table = largest_batches(LARGEST)
    assert table is not None and table.columns[2] == "largest batch in 1 GB"
    assert table.rows[2:] == (
        ("SLTT", 1, 120, 160.0, 1.0),
        ("SLTT", 4, 100, pytest.approx(400 / 3), pytest.approx(10 / 3)),
    )
    cost = {**LARGEST["points"][1]["cost"], "rule": "BPTT-chunk-1"}
    stepped = {"time_steps": 4, "cost": cost, "largest_batch": 60, "at_largest": cost}
    table = largest_batches({**LARGEST, "points": [*LARGEST["points"], stepped]})
    assert table is not None and table.rows[3][4] == pytest.approx(
        10 / 6
    )  # of BPTT step by step, which is faster here


def test_what_was_not_tried_is_not_measured_and_what_nobody_looked_for_has_no_table():
    untried = [
        {name: value for name, value in point.items() if name != "at_largest"}
        for point in LARGEST["points"]
    ]
    table = largest_batches({**LARGEST, "points": untried})
    assert table is not None and [row[2:] for row in table.rows[2:]] == [
        (120, None, None),
        (100, None, None),
    ]
    assert largest_batches(SWEEP) is None
    of_one = {**LARGEST, "points": LARGEST["points"][::2]}  # at T = 1 alone
    found = swept(
        (SWEEP, {**SWEEP, "points": []}, LARGEST, of_one, {**SWEEP, "points": SWEEP["points"][:1]})
    )
    told = [(each.key, len(each.figures), each.largest is None) for each in found]
    assert told == [
        ("sweep1", 2, True),
        ("sweep2", 2, False),
        ("sweep3", 0, False),
        ("sweep4", 2, True),
    ]


def test_a_page_shows_it():
    html = page.render(study(sweeps=(LARGEST,))).split('<script type="application/json"')[0]
    assert (
        "Each rule's own largest batch" in html
        and ">133.3<" in html
        and 'download="by-hand-sweep1-largest.csv"' in html
    )
    assert (
        "largest batch"
        not in page.render(study(sweeps=(SWEEP,))).split('<script type="application/json"')[0]
    )


def test_what_sweep_prints_is_what_a_page_reads():
    recipe = recipe_with(0.5, data=recipe_with(0.5).data.with_(samples=4000))
    found = sweep(
        recipe, steps=(4,), rules=(spec(BPTT), spec(SLTT)), memory_bytes=500_000, at_largest=True
    )
    table = largest_batches(sweep_of(json.loads(json.dumps(found.to_json())), "sweep.json"))
    assert table is not None and len(table.rows) == len(found.points)
    for row, point in zip(table.rows, found.points, strict=True):
        assert row[:3] == (point.cost.rule, 4, point.largest_batch)
        assert row[3] == pytest.approx(point.images_per_compute_s_at_largest)


def test_what_a_report_returned_is_read_again():
    kept = Returned(sweeps=(LARGEST, SWEEP))
    assert returned(json.loads(json.dumps(kept.to_json())), "here") == kept
    assert returned(None, "here") == returned({"claims": 3, "sweeps": "x"}, "here") == Returned()
    null = {**SWEEP["points"][0]["cost"], "forward_s": None}
    for points in (
        [{**SWEEP["points"][0], "at_largest": {}}],
        [{**SWEEP["points"][0], "at_largest": null}],
        [{"time_steps": 1}],
        [{**SWEEP["points"][0], "at_largest": {**null, "forward_s": 0.0, "backward_s": 0}}],
        [{**SWEEP["points"][0], "cost": {**null, "forward_s": math.nan}}],
        [{**SWEEP["points"][0], "time_steps": math.inf}],
        3,
    ):
        with pytest.raises(
            ReportError, match="report: here must hold what sweep --format json prints"
        ):
            sweep_of({**SWEEP, "points": points}, "here")
    for hardware in ({}, {"gpu": "none"}, {"cpu": "a cpu", "threads": 1}, 3):
        with pytest.raises(
            ReportError, match="report: here must hold what sweep --format json prints"
        ):
            sweep_of({**SWEEP, "hardware": hardware}, "here")
