from __future__ import annotations

import csv
import io
import json

import pytest

from pipeline.report import page
from pipeline.report.results import Run
from pipeline.report.study import Study
from pipeline.report.tables import SCALING_SAID, scaling
from tests.helpers.fake_store import FakeStore
from tests.helpers.hand_made import KEY, MACHINE, recipe, run
from tests.helpers.hand_made import on as trained
from tests.report.test_dashboard import Asking
from tests.report.test_page import body


def on(workers: int, images_per_s: float, rule: str = "SLTT", **about: object) -> Run:
    return run(rule, world_size=workers, images_per_s=images_per_s, **about)


def rows(*runs: Run) -> list[dict[str, str]]:
    found = scaling(Study(title="by hand", runs=runs))
    return [] if found is None else list(csv.DictReader(io.StringIO(found.to_csv())))


def test_speed_up_and_efficiency_over_the_fewest_workers():
    found = scaling(
        Study(title="t", runs=(on(8, 300.0), on(2, 90.0), on(2, 110.0, seed=1), on(4, 150.0)))
    )
    assert found is not None and found.columns[:6] == (
        "rule",
        "workers",
        "images/s, measured",
        "its deviation",
        "speed-up",
        "efficiency",
    )
    assert [row[:3] for row in found.rows] == [
        ("SLTT", 2, 100.0),
        ("SLTT", 4, 150.0),
        ("SLTT", 8, 300.0),
    ]
    assert [row[4:8] for row in found.rows] == [
        (1.0, 1.0, "2 workers", 2),
        (1.5, 0.75, "2 workers", 1),
        (3.0, 0.75, "2 workers", 1),
    ]


def test_rules_are_apart():
    found = rows(
        on(1, 100.0), on(2, 180.0), on(1, 50.0, "BPTT"), on(2, 75.0, "BPTT"), on(4, 99.0, "OTTT-A")
    )
    assert [(row["rule"], row["workers"], row["efficiency"]) for row in found] == [
        ("BPTT", "1", "1.0"),
        ("BPTT", "2", "0.75"),
        ("SLTT", "1", "1.0"),
        ("SLTT", "2", "0.9"),
    ]


GPUS = {**MACHINE, "gpu": "H100"}


@pytest.mark.parametrize(
    "other",
    [
        {"hardware": {**MACHINE, "cpu": "another"}},
        {"hardware": {**MACHINE, "threads": 2}},
        {"hardware": GPUS},
        {"own_cores": True},
        {"loader_threads": 4},
        {"study": "f" * 16},
        {
            "recipe": recipe(
                "SLTT", rule={"target": "pipeline.rules.x.SLTT", "kwargs": {"rescale": True}}
            )
        },
        {"state": "failed"},
        {"images_per_s": None},
        {"trained_on": [trained(workers=1), trained(workers=2)]},
        {"trained_on": [trained(workers=2, micro_batch=2)]},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_differs_in_more_is_not_set_beside(other: dict):
    assert rows(on(1, 100.0), on(2, 180.0))
    changed = {"images_per_s": 180.0, **other}
    assert rows(on(1, 100.0), run("SLTT", world_size=2, **changed)) == []


def test_runs_are_in_the_micro_batches_that_the_recipe_asks_for():
    """Of at most 3 samples a worker's share of 8 is taken in twos, and of 4 in twos, too; where
    memory ran out in ones.
    """
    asked = recipe("SLTT", micro_batch=3)
    one = run(
        "SLTT", recipe=asked, images_per_s=100.0, trained_on=[trained(workers=1, micro_batch=2)]
    )
    two, halved = (
        run(
            "SLTT",
            recipe=asked,
            images_per_s=150.0,
            world_size=2,
            trained_on=[trained(workers=2, micro_batch=size)],
        )
        for size in (2, 1)
    )
    assert [row["efficiency"] for row in rows(one, two)] == ["1.0", "0.75"]
    assert rows(one, halved) == []
    assert (
        "in other micro-batches than its recipe asks for, such as one that ran out of memory, is"
        " left out" in SCALING_SAID
    )


def test_each_worker_has_a_card_of_its_own():
    one, two = (on(count, 100.0 * count, hardware=GPUS) for count in (1, 2))
    assert [row["efficiency"] for row in rows(one, two)] == ["1.0", "1.0"]
    assert rows(one, two)[1]["machine"] == "H100"


def test_the_page_has_it_and_says_that_it_is_measured():
    html = body(page.render(Study(title="by hand", runs=(on(1, 100.0), on(2, 150.0)))))
    assert (
        '<h2 id="scaling">' in html
        and "Measured, not a model" in html
        and 'download="by-hand-scaling.csv"' in html
    )
    bare = body(
        page.render(Study(title="by hand", runs=(on(1, 100.0), on(2, 150.0, own_cores=True))))
    )
    assert (
        'id="scaling"' not in bare
        and "<b>Scaling over workers</b>: no rule has finished on two numbers" in bare
    )


def test_the_dashboard_has_it():
    store = FakeStore()
    store.add_finished("one", "SLTT")
    two = store.add_finished("two", "SLTT")
    store.texts[two.id, "summary.json"] = json.dumps(on(2, 120.0).summary)
    asking = Asking(store)
    shown = asking.show(f"?study={KEY}")
    assert "Scaling over workers" in shown
    for workers in ("1 worker", "2 workers"):  # each group's table is a region of a name of its own
        assert (
            f'over paired seeds, Study {KEY[:8]} on a cpu, 2 cores, 1 thread, {workers}"' in shown
        )
    told = asking.client.get(f"/csv?study={KEY}&name=scaling").get_data(as_text=True)
    assert [row["efficiency"] for row in csv.DictReader(io.StringIO(told))] == ["1.0", "0.75"]
    store.texts[two.id, "summary.json"] = json.dumps(on(1, 120.0).summary)
    asking = Asking(store)
    assert "Scaling over workers" not in asking.show(f"?study={KEY}")
    assert asking.client.get(f"/csv?study={KEY}&name=scaling").status_code == 404
