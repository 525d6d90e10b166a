from typing import Any

import pytest

from pipeline.report.metrics import COMPUTE
from pipeline.report.results import Run
from pipeline.report.study import FOLDED_ALONE, RECOMPUTES_NOTHING, Spread, Study, spread_of
from pipeline.track.run_state import trained_on
from tests.helpers.hand_made import MACHINE, events, group_of, on, recipe, run, study
from tests.report.test_tables import tuned


def of_one(value: float, runs: int = 1) -> Spread:
    return Spread(mean=value, deviation=None if runs == 1 else 0.0, runs=runs)


def test_mean_and_spread_over_seeds():
    (group,) = study().groups
    assert group.rules == ["BPTT", "SLTT"] and group.has_baseline
    found = group.spread("SLTT", "top1")
    assert found is not None and (found.mean, found.runs) == (pytest.approx(0.895), 2)
    assert found.deviation == pytest.approx(0.01 / 2**0.5)
    assert group.spread("SLTT", COMPUTE) == of_one(0.12, 2)
    assert group.spread("SLTT", "peak_device_bytes") is None


def test_ratios_are_of_paired_seeds_and_two_runs_of_a_seed_count_as_their_mean():
    more = run("SLTT", seed=7, peak_saved_bytes=80), run("BPTT", peak_saved_bytes=24e6, name="2nd")
    (group,) = study(*more).groups
    assert group.ratios("SLTT", COMPUTE) == of_one(0.75, 2)
    assert group.ratios("BPTT", "peak_saved_bytes") == of_one(1.0, 2)
    ratio = group.ratios("SLTT", "peak_saved_bytes")
    assert ratio is not None and ratio.mean == pytest.approx((0.25 / 2 + 0.25) / 2)
    (difference,) = group.differences
    assert (difference.seeds, difference.mean) == (2, pytest.approx(1.5))


FIRST = events("SLTT")[0]
AT_50 = {**FIRST, "step": 50, "attempt": 1}


def after(before: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run was trained on that changed at batch 50."""
    return trained_on([{**FIRST, **before}, AT_50], steps=100)


@pytest.mark.parametrize(
    "changes",
    [
        {"hardware": {**MACHINE, "cpu": "another"}},
        {"study": "f" * 16},
        {"world_size": 2},
        {"own_cores": True},
        # memory ran out in its first batch: it keeps half the bytes that it would
        {"trained_on": trained_on([FIRST, {**FIRST, **on(micro_batch=4)}], steps=100)},
        {"trained_on": after(on(workers=2))},
        {"trained_on": after(on(cpu="another"))},
        {"trained_on": after({"loader_threads": 2})},
        {"trained_on": after({"own_cores": [0]})},
    ],
)
def test_runs_on_other_machines_and_of_other_studies_are_apart(changes: dict[str, Any]):
    first, second = study(run("SLTT", name="apart", **changes)).groups
    assert (len(first.runs), [run.name for run in second.runs]) == (4, ["apart"])
    assert first.has_baseline and not second.has_baseline
    assert second.ratios("SLTT", "wall_s") is None and second.differences == []


def test_two_runs_that_were_halved_alike_are_one_group():
    halved = {"trained_on": trained_on([FIRST, {**FIRST, **on(micro_batch=4)}], steps=100)}
    runs = (run("BPTT", **halved), run("SLTT"), run("SLTT", seed=1, **halved))
    groups = Study(title="t", runs=runs).groups
    names = [[run.name for run in group.runs] for group in groups]
    assert names == [["bptt-0", "sltt-1"], ["sltt-0"]]


def test_a_run_whose_summary_tells_less_of_each_start_is_beside_those_that_tell_all():
    """As those of a study that is trained while spiketrain is updated."""
    whole = trained_on([{**FIRST, "own_cores": [0]}], steps=100)
    told = run("SLTT", trained_on=whole, own_cores=True)
    assert group_of(run("BPTT", trained_on=[on()], own_cores=True), told).rules == ["BPTT", "SLTT"]


def test_wall_clocks_leave_out_what_comparing_gradients_took():
    looked = run("SLTT", wall_s=46.0, net_s=45.0, fidelity_s=30.0)
    group = group_of(run("BPTT"), looked, run("OTTT-A", wall_s=16.0, fidelity_s=0.0))
    assert group.ratios("SLTT", "wall_s") == group.ratios("OTTT-A", "wall_s") == of_one(0.8)
    assert group.spread("SLTT", "net_s") == of_one(15.0)


def test_wall_clocks_leave_out_start_up():
    """Two equal runs, of which the one that went first waited for compilation. A run that did not
    tell its start-up apart has no wall clock to compare.
    """
    first = run("BPTT", wall_s=30.0, startup_s=20.0)
    second = run("SLTT", wall_s=12.0, net_s=9.0, startup_s=2.0)
    group = group_of(first, second, run("OTTT", startup_s=None))
    assert group.ratios("SLTT", "wall_s") == of_one(1.0)
    assert group.spread("SLTT", "net_s") == of_one(9.0)
    assert group.ratios("OTTT", "wall_s") is group.spread("OTTT", "wall_s") is None
    said = (
        "wall clocks exclude start-up, which ends with the first batch of each start: 20 s of BPTT"
    )
    assert f"{said}, 2 s of SLTT" in group.notes


def test_the_interval_of_a_mean():
    found = spread_of([1.0, 2.0, 3.0])
    assert found is not None
    # Student's t of two degrees of freedom, 97.5 %, from a printed table; the deviation is 1
    reach = 4.302653 / 3**0.5
    assert found.interval == pytest.approx((2 - reach, 2 + reach))
    assert of_one(1.0).interval is spread_of([]) is None


def test_the_faster_bptt_is_what_time_is_divided_by():
    assert study(run("BPTT-chunk-1", backward_s=96.0)).groups[0].fastest_baseline == "BPTT"
    fast = run("BPTT-chunk-1", backward_s=6.0, wall_s=10.0)
    (group,) = study(fast, run("BPTT-recompute", backward_s=1.0)).groups
    assert group.fastest_baseline == "BPTT-chunk-1"
    assert group.ratios("SLTT", COMPUTE) == of_one(1.2)
    assert group.ratios("SLTT", "wall_s") == of_one(1.6)
    assert [group.base_of(name) for name in ("images_per_s", "top1")] == ["BPTT-chunk-1", "BPTT"]


def test_which_bptt_is_faster_is_told_by_the_seeds_that_both_ran():
    """The machine was slow while seed 0 was trained."""
    runs = [
        run("BPTT", seed=seed, forward_s=seconds, backward_s=seconds)
        for seed, seconds in enumerate((30.0, 5.0, 5.0))
    ]
    group = group_of(*runs, run("BPTT-chunk-1", forward_s=20.0, backward_s=20.0))
    assert group.fastest_baseline == "BPTT-chunk-1"


def of_rule(name: str = "SLTT", /, **kwargs: Any) -> dict[str, Any]:
    return recipe("SLTT", rule={"target": f"pipeline.rules.x.{name}", "kwargs": kwargs})


NO_SEED = "HLOP (k=2) has no seed in common with BPTT, so it has no ratios"
INNER = {"target": "pipeline.rules.sltt.SLTT", "kwargs": {"k": 1}}


@pytest.mark.parametrize(
    ("runs", "rules", "note"),
    [
        (
            [run("SLTT"), run("SLTT", seed=4, recipe=of_rule(k=1, rescale=True))],
            ["SLTT (defaults)", "SLTT (k=1, rescale=True)"],
            "has no seed in common",
        ),
        # five learning rates of one rule are no five seeds of it
        (
            [tuned("SLTT", rate, seed=seed) for seed, rate in enumerate((0.1, 0.1, 0.3))],
            ["SLTT (optimizer.lr=0.1)", "SLTT (optimizer.lr=0.3)"],
            "has no seed in common",
        ),
        ([tuned("SLTT", 0.1), tuned("SLTT", 0.1, seed=1)], ["SLTT"], "no BPTT-recompute"),
        (
            [
                run("HLOP", recipe=of_rule("HLOP", k=1)),
                run("HLOP", seed=1, recipe=of_rule("HLOP", k=2)),
            ],
            ["HLOP (k=1)", "HLOP (k=2)"],
            NO_SEED,
        ),
        # a label that says less than the recipe is written out
        (
            [run("HLOP(SLTT-1)", recipe=of_rule("HLOP", inner=INNER))],
            ["HLOP(SLTT-1)"],
            "HLOP(SLTT-1) is HLOP(inner=SLTT(k=1))",
        ),
    ],
)
def test_two_rules_of_one_label_are_told_apart(runs: list[Run], rules: list[str], note: str):
    base = tuned("BPTT", 0.1) if runs[0].recipe.get("tuned") else run()
    group = group_of(base, *runs)
    assert group.rules == ["BPTT", *rules] and any(note in each for each in group.notes)


SEVERAL = (tuned("BPTT", 0.1), tuned("BPTT", 0.3, seed=1), tuned("SLTT", 0.3))
SLICES = tuple(run(seed=seed, recipe=of_rule("BPTT", truncate=seed + 1)) for seed in (0, 1))


@pytest.mark.parametrize(
    ("runs", "undivided"),
    [
        (SEVERAL, "several BPTTs with different optimizer.lr; name one"),
        (SLICES, "several BPTTs with different keywords; name one"),
        (SEVERAL[1:], ""),
        (
            [tuned("BPTT", rate, state="failed") for rate in (0.1, 0.3)],
            "no finished run of BPTT is shown",
        ),
        ([run("SLTT"), run("BPTT", state="failed")], "no finished run of BPTT is shown"),
    ],
)
def test_why_nothing_is_divided(runs: list[Run], undivided: str):
    group = group_of(*runs)
    assert group.undivided == undivided
    assert group.has_baseline is (undivided == "")
    assert group.has_baseline or group.ratios("SLTT", "wall_s") is None


MORE = (
    run("SLTT", name="again", restart=True),  # of commit def from then on
    run("BPTT-chunk-1", backward_s=1.0),
    run("OTTT-A", seed=7, fidelity_s=1.0),
    run("DSR", seed=9, state="running"),
)


@pytest.mark.parametrize(
    ("more", "notes"),
    [
        (
            MORE,
            (
                "the runs have different commits: abc, def",
                "SLTT has 2 runs of seed 0: ratios and differences use their mean as one run",
                "wall clocks exclude the time of comparisons with BPTT's gradient, in runs of"
                " OTTT-A",
                "runs of OTTT-A compared gradients, runs of BPTT, BPTT-chunk-1, SLTT did not: a"
                " comparison can slow the later batches by about 2 %, so smaller differences of"
                " time mean nothing",
                RECOMPUTES_NOTHING,
                "images/s, wall clock and compute time are divided by those of BPTT-chunk-1, the"
                " faster BPTT",
                "OTTT-A has no seed in common with BPTT, so its top-1 and bytes have no ratios",
                "OTTT-A has no seed in common with BPTT-chunk-1, so its times have no ratios",
            ),
        ),
        ((), (FOLDED_ALONE, RECOMPUTES_NOTHING)),
        (
            (run("OTTT-A", restarts=2),),
            (
                "wall clocks include restarts and the batches that they repeat: 2 of OTTT-A",
                FOLDED_ALONE,
                RECOMPUTES_NOTHING,
            ),
        ),
        (  # in no mean yet
            (run("SLTT", name="again", restart=True, state="running"),),
            (FOLDED_ALONE, RECOMPUTES_NOTHING),
        ),
        (
            (
                run("BPTT-recompute"),
                run(
                    "OTTT-A",
                    not_counted=["other"],
                    inference={"energy_j": 1.0, "prices": "x", "not_counted": ["fused"]},
                ),
            ),
            (
                "operations and the energy of an inference exclude operators without a known"
                " count: fused, other",
                FOLDED_ALONE,
            ),
        ),
    ],
)
def test_what_the_reader_of_means_must_know(more: tuple[Run, ...], notes: tuple[str, ...]):
    assert study(*more).groups[0].notes == notes


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"rollbacks": 1, "skipped_batches": 4}, "diverged and was rolled back 1 time"),
        ({"rollbacks": 2, "skipped_batches": 9}, "diverged and was rolled back 2 times"),
        ({"loss": float("nan")}, "ended with an evaluation loss of nan"),
        ({"state": "diverged"}, "diverged"),
        ({"rollbacks": 1, "skipped_batches": 0}, ""),  # for replicas that differed
        ({"skipped_batches": 2}, ""),
    ],
)
def test_a_run_that_diverged_compares_no_rules(changes: dict[str, Any], how: str):
    notes = study(run("OTTT-A", name="mine", **changes)).groups[0].notes
    told = (
        f"mine (OTTT-A) {how}: a comparison of rules must not use its values; lower"
        " optimizer.lr (0.1) or set clip_norm=1.0 for every rule, and train again"
    )
    assert [note for note in notes if "mine" in note] == [told] * bool(how)


DIVERGED = run("SLTT", seed=2, state="diverged")


@pytest.mark.parametrize(
    ("runs", "lost"),
    [
        ((run(seed=2), DIVERGED), 1),
        # another run of that seed finished
        ((run(seed=2), DIVERGED, run("SLTT", seed=2, name="again")), 0),
        ((DIVERGED,), 0),  # of no seed of the baseline's
    ],
)
def test_a_seed_that_diverged_is_in_no_mean(runs: tuple[Run, ...], lost: int):
    (group,) = study(*runs).groups
    (difference,) = group.differences
    assert group.lost("SLTT") == difference.diverged == lost
    assert difference.verdict(9.0) == ("fails" if lost else "holds")
