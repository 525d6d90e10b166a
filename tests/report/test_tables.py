import csv
import io
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.measure.meters import Meters
from pipeline.report import figures, tables
from pipeline.report.drawing import Figure
from pipeline.report.page import render
from pipeline.report.results import SILENT_S, Run, describe_state
from pipeline.report.study import Study
from pipeline.report.tables import SCALING_SAID, provenance, scaling
from pipeline.track.system import INTERVAL_S
from tests.helpers.hand_made import CLAIM, MACHINE, on, recipe, run, study


def test_costs_are_means_with_spread_and_ratio():
    bptt, sltt = tables.costs(study().groups[0]).rows
    assert bptt[:3] == ("BPTT", "91.00% ± 1.41% (×1.00)", "8 MB ± 0 MB (×1.00)")
    assert sltt[1:] == (
        "89.50% ± 0.71% (×0.98)",
        "2 MB ± 0 MB (×0.25)",
        "2.001 MB ± 0 MB (×0.25)",
        "80 ± 0 (×1.00)",
        "16.0 s ± 0.0 s (×0.80)",
        "120 ms ± 0 ms (×0.75)",
        "3 µJ ± 0 µJ (×0.75)",
        2,
    )
    faster = run("BPTT-chunk-1", backward_s=6.0, wall_s=10.0, images_per_s=160.0)
    *_, sltt = tables.costs(study(faster).groups[0]).rows
    assert (sltt[4], sltt[5]) == ("80 ± 0 (×0.50)", "16.0 s ± 0.0 s (×1.60)")
    bare = tables.costs(Study(title="t", runs=(run(inference=None, wall_s=None),)).groups[0])
    assert (
        "inference energy" not in bare.columns
        and bare.rows[0][bare.columns.index("wall clock")] is None
    )


def test_a_column_of_joules_names_the_prices_behind_them():
    def energies(*runs: Run) -> list[str]:
        groups = Study(title="t", runs=runs).groups
        return [
            name
            for table in (tables.costs(groups[0]), tables.lone_runs(groups))
            for name in table.columns
            if "energy" in name and "measured" not in name
        ]

    assert energies(run()) == 2 * ["inference energy (45 nm, fp32)"]
    assert energies(run(inference=None)) == energies(run(state="failed")) == ["inference energy"]


def test_what_diverged_has_its_row_and_divides_nothing():
    lost = [run("SLTT-1", state="diverged"), run("SLTT", seed=2, state="diverged")]
    (group,) = study(*lost).groups
    rows = {row[0]: row[1:] for row in tables.costs(group).rows}
    assert rows["SLTT-1"] == ("diverged", *6 * (None,), "0, 1 diverged") and rows["BPTT"][-1] == 2
    assert rows["SLTT"][0] == "89.50% ± 0.71% (×0.98)" and rows["SLTT"][-1] == "2, 1 diverged"
    assert [rule for rule, _ in tables.headlines(group)] == ["SLTT", "SLTT-1"]
    assert tables.lone_runs(Study(title="t", runs=tuple(lost[:1])).groups).rows[0][3] == "diverged"


def test_what_has_not_finished_says_so_and_is_of_no_seed_of_the_means():
    others = [run("SLTT", seed=2, state="running"), run("SLTT", seed=3, state="stopped")]
    waiting = [
        run("OTTT", state="running"),
        run("OTTT", seed=1, state="failed"),
        run("OTTT", seed=2, state="running"),
    ]
    untold = replace(run("DSR"), summary=None)  # its summary has not come yet
    (group,) = study(*others, *waiting, untold).groups
    rows = {row[0]: row[1:] for row in tables.costs(group).rows}
    assert (
        rows["SLTT"][0] == "89.50% ± 0.71% (×0.98)"
        and rows["SLTT"][-1] == "2, 1 running, 1 stopped"
    )
    assert rows["OTTT"] == ("running, failed", *6 * (None,), "0, 2 running, 1 failed")
    assert (rows["DSR"][0], rows["DSR"][-1], rows["BPTT"][-1]) == (
        "without a summary",
        "0, 1 without a summary",
        2,
    )
    table = tables.behind_the_rows(group)
    seeds = {row[0]: row[table.columns.index("seeds")] for row in table.rows}
    assert seeds == {"BPTT": "0, 1", "DSR": "none", "OTTT": "none", "SLTT": "0, 1"}
    assert [row[3] for row in tables.lone_runs([group]).rows][2:6] == [
        "without a summary",
        "running",
        "failed",
        "running",
    ]


def test_a_sentence_for_each_rule():
    ((rule, said),) = tables.headlines(study().groups[0])
    assert rule == "SLTT" and said.startswith(
        "0.25 of BPTT's saved bytes, 0.25 with states, 0.80 of BPTT's wall clock, 0.75 of"
    )
    assert "BPTT - SLTT: +1.50 points over 2 paired seeds, 95 % interval" in said
    ((_, said),) = tables.headlines(
        Study(title="t", runs=(run(top1=0.9), run("SLTT", top1=0.89))).groups[0]
    )
    assert said.endswith("BPTT - SLTT: +1.00 points of one seed, so without an interval.")
    again = (
        run(top1=0.9),
        run(top1=0.94, name="again"),
        run("SLTT", top1=0.89),
    )  # seed 0 twice: 0.92
    ((_, said),) = tables.headlines(Study(title="t", runs=again).groups[0])
    assert "BPTT - SLTT: +3.00 points of one seed" in said
    assert tables.headlines(Study(title="t", runs=(run("SLTT"),)).groups[0]) == []


def test_a_rule_that_mostly_diverged_fails_in_its_sentence():
    bptt = [run(seed=seed, top1=0.9) for seed in range(3)]
    lost = [run("SLTT-1", seed=seed, state="diverged") for seed in range(3)]
    (group,) = Study(title="t", runs=(*bptt, run("SLTT-1", top1=0.895), *lost[1:])).groups
    ((_, said),) = tables.headlines(group)
    points = "BPTT - SLTT-1: +0.50 points of one seed, so without an interval"
    assert said.endswith(
        f"{points}, and diverged in 2 of BPTT's 3 seeds; at most 0.7 points below fails."
    )
    (group,) = Study(title="t", runs=(*bptt, *lost)).groups
    assert tables.headlines(group) == [
        ("SLTT-1", "diverged in 3 of BPTT's 3 seeds; at most 0.7 points below fails.")
    ]
    (group,) = Study(title="t", runs=(*bptt[:1], run("SLTT-1", seed=1), lost[0])).groups
    ((_, said),) = tables.headlines(group)
    assert said == "diverged in 1 of BPTT's 1 seed; at most 0.7 points below fails."
    elsewhere = run("SLTT-1", seed=7, state="diverged")  # in a seed that BPTT did not run
    assert tables.headlines(Study(title="t", runs=(*bptt, elsewhere)).groups[0]) == []


def test_how_many_time_steps_a_forward_takes_stands_in_every_row():
    recompute = recipe("BPTT", rule={"target": "x.BPTT", "kwargs": {"recompute": True}})
    for steps, fields, said in (
        (6, {**recompute, "time_steps": 6}, "folded, recomputed"),
        (1, recipe("BPTT"), "step by step"),
        (3, {**recompute, "time_steps": 6}, "in slices of 3, recomputed"),
        (6, {}, "not known"),  # no recipe says what T is
    ):
        one = replace(run(conditions={"steps_per_forward": steps}), recipe=fields)
        table = tables.behind_the_rows(Study(title="t", runs=(one,)).groups[0])
        assert table.rows[0][table.columns.index("over time")] == said
    assert "<td>not known</td>" in render(
        Study(title="t", runs=(one, run("SLTT"), run(study="f" * 16, name="x")))
    )


def test_every_row_says_how_often_the_set_was_read_that_its_top_1_is_of():
    for parameters, said in (
        (recipe(evaluation={"every": 0}), "once, at the end"),
        (recipe(evaluation={"every": 1}), "after each epoch"),
        (recipe(evaluation={"every": 5}), "every 5 epochs"),
        ({}, "not known"),
    ):
        table = tables.behind_the_rows(
            Study(title="t", runs=(replace(run(), recipe=parameters),)).groups[0]
        )
        assert table.rows[0][table.columns.index("evaluated")] == said


def test_how_a_batch_fell_on_workers_stands_in_every_row_and_in_the_title():
    def told(*trained_on: dict) -> tuple[object, str]:
        (group,) = Study(title="t", runs=(run("SLTT", trained_on=list(trained_on)),)).groups
        table = tables.behind_the_rows(group)
        return table.rows[0][table.columns.index("micro-batch")], tables.named(group)

    machine = "a cpu, 2 cores, 1 thread"
    assert told(on()) == ("8", f"Study 01234567 on {machine}, 1 worker")
    assert told(on(micro_batch=2)) == (
        "2 × 4",
        f"Study 01234567 on {machine}, 1 worker, in micro-batches of 2",
    )
    assert told(on(workers=2), on(micro_batch=4)) == (
        "4, then 4 × 2",
        f"Study 01234567 on {machine}, 2 workers, then {machine}, 1 worker, in micro-batches of 4",
    )
    alone = f"{machine}, 1 worker, each on cores of its own"
    assert told({**on(), "own_cores": True})[1] == f"Study 01234567 on {alone}"
    assert (
        told({**on(), "own_cores": True, "loader_threads": 2}, on())[1]
        == f"Study 01234567 on {alone}, with 2 loader threads, then {machine}, 1 worker, with 1"
        " loader thread"
    )


def tuned(rule: str, rate: float, **changes: Any) -> Run:
    optimizer = {"target": "timm.optim.create", "kwargs": {"lr": rate}}
    made = recipe(rule, protocol="tuned", tuned=["optimizer.lr"], optimizer=optimizer)
    return run(rule, study="f" * 16, recipe=made, name=f"tuned-{rule}", **changes)


def test_protocols_are_told_apart_and_each_rules_own_value_stands_in_its_row():
    both = Study(title="t", runs=(run("BPTT"), run("SLTT"), tuned("BPTT", 0.3), tuned("SLTT", 0.6)))
    first, second = both.groups
    assert tables.named(first) == "Study 01234567 on a cpu, 2 cores, 1 thread, 1 worker"
    assert (
        tables.named(first, among=both.groups)
        == "Study 01234567, shared settings, on a cpu, 2 cores, 1 thread, 1 worker"
    )
    assert (
        tables.named(second)
        == "Study ffffffff, tuned optimizer.lr, on a cpu, 2 cores, 1 thread, 1 worker"
    )
    assert "tuned" not in tables.behind_the_rows(first).columns
    table = tables.behind_the_rows(second)
    place = table.columns.index("tuned")
    assert [(row[0], row[place]) for row in table.rows] == [
        ("BPTT", "optimizer.lr=0.3"),
        ("SLTT", "optimizer.lr=0.6"),
    ]
    rows = {row[0]: row[1:3] for row in tables.recipe_differences(both).rows}
    assert rows["protocol"] == ('"(absent)"', '"tuned"') and rows["optimizer.lr"] == (
        "0.1",
        '"each rule\'s own"',
    )


def test_what_training_holds_by_kind():
    kinds = {
        "parameters": 4e6,
        "buffers": 0,
        "gradients": 4e6,
        "optimizer": 8e6,
        "teacher": 2e9,
        "rule": 5e3,
    }
    found = tables.held(
        Study(
            title="t", runs=(run(held=kinds, state_bytes=3e3), run("SLTT", state_bytes=None))
        ).groups[0]
    )
    assert found is not None and found.columns == (
        "rule",
        "parameters",
        "buffers",
        "gradients",
        "optimizer",
        "teacher",
        "the rule's own",
        "states beside saved bytes",
    )
    assert found.rows == (
        ("BPTT", "4 MB", "0 B", "4 MB", "8 MB", "2 GB", "5 kB", "3 kB"),
        ("SLTT", *7 * (None,)),
    )
    assert tables.held(study().groups[0]) is None


def test_what_else_was_measured_of_a_rule():
    def work(multiplications: float) -> dict[str, float]:
        return {"multiplications": multiplications, "additions": 3e6, "dense": 9e9}

    about = {
        "state_bytes": 1e6,
        "peak_device_bytes": 0,
        "peak_rss_bytes": 2e9,
        "evaluation_peak_device_bytes": 0,
    }
    by_table = {"45 nm, fp32": 3e-5, "45 nm, int8": 2e-6}
    used = {
        "device_j": 2500.0,
        "inference": {"measured_j": 0.02, "prices": "45 nm, fp32", "energy_j_by_table": by_table},
    }
    runs = (
        run(**about, net_s=10.0, startup_s=9.0, operations={"forward": work(1e9)}),
        run(**about, net_s=12.0, startup_s=3.0, operations={"forward": work(3e9)}, seed=1),
        run(
            "SLTT",
            state_bytes=0,
            startup_s=2.5,
            peak_device_bytes=0,
            operations={"feedback": work(0)},
            **used,
        ),
    )
    found = tables.beside(Study(title="t", runs=runs).groups[0])
    assert found is not None and found.columns == (
        "rule",
        "states beside saved bytes",
        "peak RSS",
        "start-up",
        "wall clock net of restarts",
        "joules of training, measured",
        "joules of an inference, estimated (45 nm, int8)",
        "forward: multiplications",
        "feedback: multiplications",
        "forward: additions",
        "feedback: additions",
    )
    assert found.rows == (
        (
            "BPTT",
            "1 MB ± 0 MB",
            "2 GB ± 0 GB",
            "6 s ± 4.2 s",
            "11 s ± 1.4 s",
            None,
            None,
            "2 G ± 1.4 G",
            None,
            "3 M ± 0 M",
            None,
        ),
        ("SLTT", "0 B", None, "2.5 s", None, "2.5 kJ", "2 µJ", None, "0", None, "3 M"),
    )
    assert (
        tables.beside(Study(title="t", runs=(run(state_bytes=None, startup_s=None),)).groups[0])
        is None
    )


def test_claims_that_do_not_hold_are_shown_so():
    found = [
        (False, False),
        (True, False),
        (None, False),
        (False, True),
        (True, True),
        (None, True),
    ]
    rows = tables.claims(
        [replace(CLAIM, holds=holds, within_noise=noise) for holds, noise in found]
    ).rows
    assert [row[5] for row in rows[:3]] == ["does not hold", "holds", "not judged"]
    assert [row[5] for row in rows[3:]] == [
        "fails, within the noise",
        "holds, within the noise",
        "undecided",
    ]


def test_how_groups_differ():
    trained = [on(micro_batch=16, gpu="H100")]
    other = run(
        "SLTT", study="f" * 16, recipe=recipe("SLTT", batch_size=16), trained_on=trained, name="x"
    )
    found = {row[0]: row[1:] for row in tables.recipe_differences(study(other)).rows}
    assert found["batch_size"][:2] == ("8", "16") and found["hardware.gpu"][:2] == (
        '"none"',
        '"H100"',
    )
    assert found["batch_size"][3] == "Study ffffffff on H100, 1 worker"


def test_where_each_run_ran():
    assert tables.provenance(study(run("SLTT", seed=3, restart=True))).rows[-1] == (
        "sltt-3",
        "SLTT",
        3,
        "01234567",
        "finished",
        "100/100",
        1,
        "a cpu, 2 cores, 1 thread",
        1,
        "shared",
        "abc, def",
    )
    before = {**on(workers=2, cpu="another"), "own_cores": True}
    moved = run("SLTT", seed=3, trained_on=[before, on()])
    assert tables.provenance(Study(title="t", runs=(moved,))).rows[0][7:10] == (
        "another, 2 cores, 1 thread; then a cpu, 2 cores, 1 thread",
        "2, then 1",
        "its own, then shared",
    )


def test_what_is_sampled_says_so():
    """In a page's captions, as the meters do it."""
    meters = Meters(nn.Linear(1, 1), batch_size=1, device=torch.device("cpu"))
    counted: dict[str, list[int]] = {}
    for batch in range(2100):
        if (what := meters._counted_on(batch, batch)) is not None:
            counted.setdefault(what, []).append(batch)
            meters._due.remove(what)  # as where the batch ends
    assert counted["bytes"][:3] == [1, 201, 401] and counted["operations"] == [2, 1002, 2002]
    found = figures.trade_off(study().groups[0], "peak_saved_bytes")
    assert isinstance(found, Figure)
    said = (
        "counted on the second batch of each start of a run and on every 200th after it, or on the"
        " next one where that is skipped"
    )
    assert said in found.caption
    said = (
        "counted on the third batch of a run, which has hardly learnt yet, and every 1000th"
        " after it"
    )
    assert (
        f"{said}. States are counted on the second batch of each start and every 200th."
        in tables.BESIDE_SAID
    )


@pytest.mark.parametrize(
    ("minutes", "said"),
    [
        (1, "running"),
        (14, "running"),
        (25.5, "running, no word for 25 min"),
        (300, "running, no word for 5 h"),
    ],
)
def test_a_run_that_nobody_hears_of_says_so(minutes: float, said: str):
    heard = time.time() - 60 * minutes
    assert describe_state("running", heard) == said
    assert (
        describe_state("killed", heard) == "killed" and describe_state("running", None) == "running"
    )
    going = replace(run(state="running"), heard=heard)
    assert provenance(Study(title="t", runs=(going,))).rows[0][4] == said


def test_whoever_trains_is_heard_far_more_often():
    assert SILENT_S >= 60 * INTERVAL_S


def by(workers: int, images_per_s: float, rule: str = "SLTT", **about: object) -> Run:
    return run(rule, world_size=workers, images_per_s=images_per_s, **about)


def rows(*runs: Run) -> list[dict[str, str]]:
    found = scaling(Study(title="by hand", runs=runs))
    return [] if found is None else list(csv.DictReader(io.StringIO(found.to_csv())))


def test_speed_up_and_efficiency_over_the_fewest_workers():
    found = scaling(
        Study(
            title="t",
            runs=(
                by(8, 300.0),
                by(2, 90.0),
                by(2, 110.0, seed=1),
                by(4, 150.0),
            ),
        )
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
        by(1, 100.0),
        by(2, 180.0),
        by(1, 50.0, "BPTT"),
        by(2, 75.0, "BPTT"),
        by(4, 99.0, "OTTT-A"),
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
        {"trained_on": [on(workers=1), on(workers=2)]},
        {"trained_on": [on(workers=2, micro_batch=2)]},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_differs_in_more_is_not_set_beside(other: dict):
    assert rows(by(1, 100.0), by(2, 180.0))
    assert rows(by(1, 100.0), run("SLTT", world_size=2, **{"images_per_s": 180.0, **other})) == []


def test_runs_are_in_the_micro_batches_that_the_recipe_asks_for():
    """Of at most 3 samples a worker's share of 8 is taken in twos, and of 4 in twos, too; where
    memory ran out in ones.
    """
    asked = recipe("SLTT", micro_batch=3)
    one = run("SLTT", recipe=asked, images_per_s=100.0, trained_on=[on(workers=1, micro_batch=2)])
    two, halved = (
        run(
            "SLTT",
            recipe=asked,
            images_per_s=150.0,
            world_size=2,
            trained_on=[on(workers=2, micro_batch=size)],
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
    one, two = (by(count, 100.0 * count, hardware=GPUS) for count in (1, 2))
    assert [row["efficiency"] for row in rows(one, two)] == ["1.0", "1.0"]
    assert rows(one, two)[1]["machine"] == "H100"
