"""The tables of a report, of runs that were made by hand."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.measure.meters import Meters
from pipeline.report import figures, tables
from pipeline.report.drawing import Cell, Figure, Table
from pipeline.report.metrics import metric
from pipeline.report.results import SILENT_S, Run, describe_state
from pipeline.report.study import Study
from pipeline.report.tables import SCALING_CAPTION, provenance, scaling
from pipeline.report.titles import difference, facts_of, fields_of, title_of
from pipeline.track.mlflow import INTERVAL_S
from tests.helpers.hand_made import CLAIM, MACHINE, group_of, on, recipe, run, study


def column(table: Table | None, name: str) -> dict[Cell, Cell]:
    """The cells of a column, by the first cell of their row."""
    assert table is not None
    at = table.columns.index(name)
    return {row[0]: row[at] for row in table.rows}


def test_costs_are_means_with_spread_and_ratio():
    bptt, sltt = tables.costs(study().groups[0]).rows
    assert bptt[:4] == ("BPTT", "91.00% ± 1.41% (×1.00)", "baseline", "8 MB ± 0 MB (×1.00)")
    assert sltt[1:] == (
        "89.50% ± 0.71% (×0.98)",
        "-1.50 (-7.85 to 4.85): is undecided",
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
    assert (sltt[5], sltt[6]) == ("80 ± 0 (×0.50)", "16.0 s ± 0.0 s (×1.60)")
    bare = tables.costs(group_of(run(inference=None, wall_s=None)))
    assert "inference energy" not in bare.columns and column(bare, "wall clock") == {"BPTT": None}


@pytest.mark.parametrize(
    ("about", "title"),
    [
        ({}, "inference energy (45 nm, fp32)"),
        ({"inference": None}, "inference energy"),
        ({"state": "failed"}, "inference energy"),
    ],
)
def test_a_column_of_joules_names_the_prices_behind_them(about: dict[str, Any], title: str):
    energy = metric("inference.energy_j")
    assert tables.title(energy, group_of(run(**about)).finished) == title


def test_what_has_not_finished_says_so_and_is_of_no_seed_of_the_means():
    others = [
        run("SLTT", seed=2, state="running"),
        run("SLTT", seed=3, state="stopped"),
        run("SLTT", seed=4, state="diverged"),
        run("SLTT-1", state="diverged"),
        run("OTTT", state="running"),
        run("OTTT", seed=1, state="failed"),
        run("OTTT", seed=2, state="running"),
        replace(run("DSR"), summary=None),  # its summary has not come yet
    ]
    (group,) = study(*others).groups
    rows = {row[0]: (row[1], *row[-2:]) for row in tables.costs(group).rows}
    assert rows == {
        "BPTT": ("91.00% ± 1.41% (×1.00)", "4 µJ ± 0 µJ (×1.00)", 2),
        "SLTT": (
            "89.50% ± 0.71% (×0.98)",
            "3 µJ ± 0 µJ (×0.75)",
            "2, 1 running, 1 stopped, 1 diverged",
        ),
        "SLTT-1": ("diverged", None, "0, 1 diverged"),
        "OTTT": ("running, failed", None, "0, 2 running, 1 failed"),
        "DSR": ("without a summary", None, "0, 1 without a summary"),
    }
    assert column(tables.conditions_table(group), "seeds") == {
        "BPTT": "0, 1",
        **dict.fromkeys(("DSR", "OTTT", "SLTT-1"), "none"),
        "SLTT": "0, 1",
    }


BPTT = tuple(run(seed=seed, top1=0.9) for seed in range(3))
LOST = [run("SLTT-1", seed=seed, state="diverged") for seed in range(3)]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ((run(), run("SLTT", top1=0.89)), "-1.00 (one seed)"),
        # seed 0 twice: 0.92
        ((run(), run(top1=0.94, name="again"), run("SLTT", top1=0.89)), "-3.00 (one seed)"),
        (
            (*BPTT, run("SLTT", top1=0.895), *(run("SLTT", seed=s, top1=0.895) for s in (1, 2))),
            "-0.50 (-0.50 to -0.50): holds",
        ),
        (
            (*BPTT, run("SLTT-1", top1=0.895), *LOST[1:]),
            "-0.50 (one seed), diverged in 2 of BPTT's 3 seeds",
        ),
        ((*BPTT, *LOST), "diverged in 3 of BPTT's 3 seeds"),
        ((*BPTT, run("SLTT-1", seed=7, state="diverged")), None),  # BPTT did not run seed 7
    ],
)
def test_the_difference_of_accuracy_stands_in_a_column(runs: tuple[Run, ...], said: str | None):
    assert column(tables.costs(group_of(*runs)), "points to BPTT")[runs[-1].rule] == said


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        (
            (*BPTT, *(run("SLTT", seed=seed, top1=0.897 + 0.001 * seed) for seed in range(3))),
            "SLTT used 25 % of BPTT's memory and 75 % of its time at -0.2 points (-0.4 to 0.0)",
        ),
        (
            (run(), run("SLTT", top1=0.89), run("OTTT-A", top1=0.9, peak_saved_bytes=4e6)),
            "SLTT used 25 % of BPTT's memory and 75 % of its time at -1.0 points (one seed)",
        ),
        (  # a rule that loses too much is not the best
            (
                *BPTT,
                *(run("SLTT", seed=seed, top1=0.8 + 0.001 * seed) for seed in range(3)),
                *(run("OTTT-A", seed=seed, top1=0.9, peak_saved_bytes=4e6) for seed in range(3)),
            ),
            "OTTT-A used 50 % of BPTT's memory and 75 % of its time at 0.0 points (0.0 to 0.0)",
        ),
        (
            (*BPTT, *(run("SLTT", seed=seed, top1=0.8) for seed in range(2)), LOST[2]),
            "SLTT used 25 % of BPTT's memory and 75 % of its time at -10.0 points"
            " (-10.0 to -10.0), a clear loss of accuracy",
        ),
        (
            (*BPTT, run("SLTT-1", top1=0.9), *LOST[1:]),
            "SLTT-1 used 25 % of BPTT's memory and 75 % of its time at 0.0 points (one seed),"
            " diverged in 2 of BPTT's 3 seeds",
        ),
        (
            (
                run(),
                run("BPTT-chunk-1", backward_s=6.0, peak_saved_bytes=8e6),
                run("SLTT", backward_s=7.2, top1=0.95),
            ),
            "SLTT used 25 % of BPTT's memory and 112 % of BPTT-chunk-1's time at 5.0 points"
            " (one seed)",
        ),
        ((run("SLTT"),), None),
        (BPTT, None),
        ((*BPTT, *LOST), None),
    ],
)
def test_the_headline_names_the_best_rule(runs: tuple[Run, ...], sentence: str | None):
    found = tables.headline(group_of(*runs))
    assert (found and found.sentence) == sentence


RECOMPUTE = {"target": "x.BPTT", "kwargs": {"recompute": True}}


def stepping(steps: int, **fields: Any) -> Run:
    return replace(run(conditions={"steps_per_forward": steps}), recipe=fields)


@pytest.mark.parametrize(
    ("one", "name", "said"),
    [
        (stepping(6, time_steps=6, rule=RECOMPUTE), "over time", "folded, recomputed"),
        (stepping(3, time_steps=6, rule=RECOMPUTE), "over time", "in slices of 3, recomputed"),
        (stepping(1, time_steps=2), "over time", "step by step"),
        (stepping(6), "over time", "not known"),  # no recipe says what T is
        # how often the set was read that its top-1 is of
        (run(recipe=recipe(evaluation={"every": 0})), "evaluated", "once, at the end"),
        (run(recipe=recipe(evaluation={"every": 1})), "evaluated", "after each epoch"),
        (run(recipe=recipe(evaluation={"every": 5})), "evaluated", "every 5 epochs"),
        (run(recipe={}), "evaluated", "not known"),
        (run(trained_on=[on()]), "micro-batch", "8"),
        (run(trained_on=[on(micro_batch=2)]), "micro-batch", "2 × 4"),
        (run(trained_on=[on(workers=2), on(micro_batch=4)]), "micro-batch", "4, then 4 × 2"),
    ],
)
def test_what_decides_a_comparison_stands_in_every_row(one: Run, name: str, said: str):
    assert column(tables.conditions_table(group_of(one)), name) == {"BPTT": said}


@pytest.mark.parametrize(
    ("trained_on", "title"),
    [
        ([on()], "{}, 1 worker"),
        ([on(micro_batch=2)], "{}, 1 worker, in micro-batches of 2"),
        (
            [on(workers=2), on(micro_batch=4)],
            "{}, 2 workers, then {}, 1 worker, in micro-batches of 4",
        ),
        ([{**on(), "own_cores": True}], "{}, 1 worker, each on its own cores"),
        (
            [{**on(), "own_cores": True, "loader_threads": 2}, on()],
            "{}, 1 worker, each on its own cores, with 2 loader threads, then {}, 1 worker, with"
            " 1 loader thread",
        ),
    ],
)
def test_how_a_batch_fell_on_workers_stands_in_the_title(trained_on: list[Any], title: str):
    said = title.replace("{}", "a cpu, 2 cores, 1 thread")
    facts = facts_of(fields_of(run("SLTT", trained_on=trained_on)))
    assert facts == f"batch 8 · lr 0.1 · fp32 · {said}"


def tuned(rule: str, rate: float, **changes: Any) -> Run:
    optimizer = {"target": "timm.optim.create", "kwargs": {"lr": rate}}
    made = recipe(rule, protocol="tuned", tuned=["optimizer.lr"], optimizer=optimizer)
    return run(rule, study="f" * 16, recipe=made, name=f"tuned-{rule}", **changes)


def test_protocols_are_told_apart_and_each_rules_own_value_stands_in_its_row():
    both = Study(title="t", runs=(run("BPTT"), run("SLTT"), tuned("BPTT", 0.3), tuned("SLTT", 0.6)))
    first, second = both.groups
    assert tables.named(first, among=[first]) == ("net on data, T = 2", "")
    assert tables.named(first, among=both.groups)[1] == "shared settings"
    assert tables.named(second, among=both.groups)[1] == "tuned optimizer.lr"
    assert "tuned" not in tables.conditions_table(first).columns
    values = {"BPTT": "optimizer.lr=0.3", "SLTT": "optimizer.lr=0.6"}
    assert column(tables.conditions_table(second), "tuned") == values
    rows = {row[0]: row[1:3] for row in tables.recipe_differences(both).rows}
    assert rows["protocol"] == ('"(absent)"', '"tuned"')
    assert rows["optimizer.lr"] == ("0.1", '"each rule\'s own"')


def test_what_training_holds_by_kind():
    kinds = {
        "parameters": 4e6,
        "buffers": 0,
        "gradients": 4e6,
        "optimizer": 8e6,
        "teacher": 2e9,
        "rule": 5e3,
    }
    group = group_of(run(held=kinds, state_bytes=3e3), run("SLTT", state_bytes=None))
    found, names = tables.held_memory(group), [*kinds][:-1]
    assert found is not None
    assert found.columns == ("rule", *names, "rule's tensors", "state bytes")
    assert found.rows == (
        ("BPTT", "4 MB", "0 B", "4 MB", "8 MB", "2 GB", "5 kB", "3 kB"),
        ("SLTT", *7 * (None,)),
    )
    assert tables.held_memory(study().groups[0]) is None


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
    found = tables.other_metrics(group_of(*runs))
    assert found is not None and found.columns == (
        "rule",
        "state bytes",
        "peak RSS",
        "start-up",
        "wall clock without restarts",
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
    assert tables.other_metrics(group_of(run(state_bytes=None, startup_s=None))) is None


@pytest.mark.parametrize(
    ("holds", "within_noise", "verdict"),
    [
        (False, False, "does not hold"),
        (True, False, "holds"),
        (None, False, "not judged"),
        (False, True, "fails, within the noise"),
        (True, True, "holds, within the noise"),
        (None, True, "undecided"),
    ],
)
def test_claims_that_do_not_hold_are_shown_so(holds: bool | None, within_noise: bool, verdict: str):
    table = tables.claims([replace(CLAIM, holds=holds, within_noise=within_noise)])
    assert table.columns == ("rule", "claim", "published", "bound", "ours", "holds?")
    assert table.rows == (("SLTT", "saved bytes", "0.30", "<= 0.2", "0.25", verdict),)


def test_how_groups_differ():
    trained = [on(micro_batch=16, gpu="H100")]
    fields = recipe("SLTT", batch_size=16)
    other = run("SLTT", study="f" * 16, recipe=fields, trained_on=trained, name="x")
    found = {row[0]: row[1:] for row in tables.recipe_differences(study(other)).rows}
    assert found["batch_size"][:2] == ("8", "16")
    assert found["hardware.gpu"][:2] == ('"none"', '"H100"')
    differs = "batch size 16 instead of 8, on H100, 1 worker"
    assert found["batch_size"][3] == f"sltt: net on data, T = 2, {differs}"


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (("demo-bptt-0", "demo-sltt-0"), "demo: vgg on fashion, T = 6"),
        (("claims-1-11-bptt", "claims-1-2-bptt"), "claims: vgg on fashion, T = 6"),
        (("demo-bptt", "demo-bptt"), "demo-bptt: vgg on fashion, T = 6"),
        (("a", "b"), "family: vgg on fashion, T = 6"),
    ],
)
def test_a_title_says_what_all_recipes_share(names: tuple[str, ...], title: str):
    fields = {"model": "a.models.vgg", "data.folder": "/x/fashion", "time_steps": "6"}
    assert title_of(fields, names, "family") == title
    assert title_of({}, names[:1], "family") == names[0]


def test_a_difference_leaves_out_what_varies_within_a_study():
    one = {"optimizer.lr": "0.1", "seed": "0", "name": "a", "model": "x.vgg", "rule": "x.BPTT"}
    other = {"optimizer.lr": "0.0300000001", "seed": "1", "name": "b", "model": "x.net"}
    assert difference(one, other) == "lr 0.1 instead of 0.03, model vgg instead of net"
    assert difference(one, one) == ""


def test_where_each_run_ran():
    machine = "a cpu, 2 cores, 1 thread"
    begun = ("sltt-3", "SLTT", 3, "01234567", "finished", "100/100")
    before = {**on(workers=2, cpu="another"), "own_cores": True}
    restarted = run("SLTT", seed=3, restart=True)
    moved = run("SLTT", seed=3, trained_on=[before, on()])
    for one, rest in (
        (restarted, (1, machine, 1, "shared", "abc, def")),
        (
            moved,
            (
                0,
                f"another, 2 cores, 1 thread; then {machine}",
                "2, then 1",
                "its own, then shared",
                "abc",
            ),
        ),
    ):
        assert provenance(Study(title="t", runs=(one,))).rows == ((*begun, *rest),)


def test_what_is_sampled_says_so():
    """In a page's captions, as the meters do it."""
    meters = Meters(nn.Linear(1, 1), batch_size=1, device=torch.device("cpu"))
    counted: dict[str, list[int]] = {"bytes": [], "operations": []}
    for batch in range(2100):
        if (what := meters._quantity_to_count(batch, batch)) is not None:
            counted[what].append(batch)
            del meters._due[what]  # as where the batch ends
    assert counted["bytes"][:3] == [1, 201, 401] and counted["operations"] == [2, 1002, 2002]
    found = figures.trade_off(study().groups[0], "peak_saved_bytes")
    assert isinstance(found, Figure)
    assert (
        "counted on the second batch of each start of a run and on every 200th batch after it, or"
        " on the next batch if one of these is skipped" in found.caption
    )
    assert (
        "counted on the third batch of a run and every 1000th after it. State bytes are counted on"
        " the second batch of each start and every 200th after it." in tables.COSTS_CAPTION
    )


@pytest.mark.parametrize(
    ("minutes", "said"),
    [
        (1, "running"),
        (14, "running"),
        (25.5, "running, no report for 25 min"),
        (300, "running, no report for 5 h"),
    ],
)
def test_a_run_that_nobody_hears_of_says_so(minutes: float, said: str):
    heard = time.time() - 60 * minutes
    going = replace(run(state="running"), last_heard=heard)
    assert column(provenance(Study(title="t", runs=(going,))), "state") == {"bptt-0": said}
    states = describe_state("killed", heard), describe_state("running", None)
    assert states == ("killed", "running")


def test_whoever_trains_is_heard_far_more_often():
    assert SILENT_S >= 60 * INTERVAL_S


def by(workers: int, images_per_s: float, rule: str = "SLTT", **about: Any) -> Run:
    return run(rule, **{"world_size": workers, "images_per_s": images_per_s, **about})


def efficiencies(*runs: Run) -> list[tuple[Cell, ...]]:
    """Rule, workers and efficiency, of each row."""
    found = scaling(Study(title="by hand", runs=runs))
    return [] if found is None else [(row[0], row[1], row[5]) for row in found.rows]


def test_speed_up_and_efficiency_over_the_fewest_workers():
    runs = (by(8, 300.0), by(2, 90.0), by(2, 110.0, seed=1), by(4, 150.0))
    found = scaling(Study(title="t", runs=runs))
    assert found is not None
    names = (
        "images/s, measured",
        "deviation of images/s",
        "speed-up",
        "efficiency",
        "relative to",
        "runs",
    )
    assert found.columns == ("rule", "workers", *names, "study", "machine", "cores")
    deviation, where = pytest.approx(200**0.5), ("01234567", "a cpu, 2 cores, 1 thread", "shared")
    assert found.rows == (
        ("SLTT", 2, 100.0, deviation, 1.0, 1.0, "2 workers", 2, *where),
        ("SLTT", 4, 150.0, None, 1.5, 0.75, "2 workers", 1, *where),
        ("SLTT", 8, 300.0, None, 3.0, 0.75, "2 workers", 1, *where),
    )


GPUS = {**MACHINE, "gpu": "H100"}
# Of at most 3 samples a worker's share of 8 is taken in twos, and of 4 in twos, too.
THREES = recipe("SLTT", micro_batch=3)
IN_TWOS = by(1, 100.0, recipe=THREES, trained_on=[on(workers=1, micro_batch=2)])


@pytest.mark.parametrize(
    ("runs", "rows"),
    [
        ((by(1, 100.0), by(2, 180.0)), [("SLTT", 1, 1.0), ("SLTT", 2, 0.9)]),
        (
            (by(1, 50.0, "BPTT"), by(1, 100.0), by(2, 75.0, "BPTT"), by(2, 180.0)),
            [("BPTT", 1, 1.0), ("BPTT", 2, 0.75), ("SLTT", 1, 1.0), ("SLTT", 2, 0.9)],
        ),
        ((by(1, 50.0), by(4, 99.0, "OTTT-A")), []),
        (
            (IN_TWOS, by(2, 150.0, recipe=THREES, trained_on=[on(workers=2, micro_batch=2)])),
            [("SLTT", 1, 1.0), ("SLTT", 2, 0.75)],
        ),
        # in ones, where memory ran out
        ((IN_TWOS, by(2, 150.0, recipe=THREES, trained_on=[on(workers=2, micro_batch=1)])), []),
        (
            (by(1, 100.0, hardware=GPUS), by(2, 200.0, hardware=GPUS)),
            [("SLTT", 1, 1.0), ("SLTT", 2, 1.0)],
        ),
    ],
)
def test_rules_and_micro_batches_are_apart(runs: tuple[Run, ...], rows: list[tuple[Cell, ...]]):
    assert efficiencies(*runs) == rows
    assert "with other micro-batches than its recipe sets" in SCALING_CAPTION


RESCALED = {"target": "pipeline.rules.x.SLTT", "kwargs": {"rescale": True}}


@pytest.mark.parametrize(
    "other",
    [
        {"hardware": {**MACHINE, "cpu": "another"}},
        {"hardware": {**MACHINE, "threads": 2}},
        {"hardware": GPUS},
        {"own_cores": True},
        {"loader_threads": 4},
        {"study": "f" * 16},
        {"recipe": recipe("SLTT", rule=RESCALED)},
        {"state": "failed"},
        {"images_per_s": None},
        {"trained_on": [on(workers=1), on(workers=2)]},
        {"trained_on": [on(workers=2, micro_batch=2)]},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_differs_in_more_is_not_set_beside(other: dict[str, Any]):
    changed = run("SLTT", **{"world_size": 2, "images_per_s": 180.0, **other})
    assert efficiencies(by(1, 100.0), changed) == []
