import pytest

from pipeline.report.claims import accuracy
from pipeline.report.results import COMPUTE
from pipeline.report.study import FOLDED_ALONE, RECOMPUTES_NOTHING, Spread, Study, spread_of
from pipeline.track.provenance import trained_on
from tests.helpers.hand_made import MACHINE, events, on, recipe, run, study
from tests.report.test_tables import tuned


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
    assert ratio is not None and ratio.mean == pytest.approx(
        (0.25 / 2 + 0.25) / 2
    )  # 0.25 of each seed's, as above


def test_other_machines_and_other_studies_are_apart():
    elsewhere = run("SLTT", hardware={**MACHINE, "cpu": "another"}, name="elsewhere")
    other_study = run("SLTT", study="f" * 16, name="other")
    beside = run("SLTT", own_cores=True, name="beside")
    groups = study(elsewhere, other_study, run("SLTT", world_size=2, name="two"), beside).groups
    assert [len(group.runs) for group in groups] == [4, 1, 1, 1, 1]
    assert [group.has_baseline for group in groups] == [True, False, False, False, False]
    assert all(group.ratios("SLTT", "wall_s") is None for group in groups[1:])


def test_a_halved_micro_batch_is_not_set_beside_a_whole_one():
    """BPTT ran out of memory in its first batch and keeps half the bytes that it would: SLTT's
    share is of no such run.
    """
    first, *_ = events("BPTT")
    halved = trained_on([first, {**first, **on(micro_batch=4)}], steps=100)
    runs = (
        run("BPTT", trained_on=halved, peak_saved_bytes=4_000_000),
        run("SLTT"),
        run("SLTT", seed=1, trained_on=halved),
    )
    first_group, second = Study(title="t", runs=runs).groups
    assert [(each.rule, each.seed) for each in first_group.runs] == [("BPTT", 0), ("SLTT", 1)]
    assert [(each.rule, each.seed) for each in second.runs] == [("SLTT", 0)]
    assert second.ratios("SLTT", "peak_saved_bytes") is None and not second.has_baseline


CHANGED = {
    "workers": on(workers=2),
    "machine": on(cpu="another"),
    "loaders": {"loader_threads": 2},
    "cores": {"own_cores": [0]},
}


def test_a_run_that_changed_on_the_way_is_of_neither():
    first, *_ = events("SLTT")
    runs = [run("BPTT")]
    for name, before in CHANGED.items():
        starts = [{**first, **before}, {**first, "step": 50, "attempt": 1}]
        runs.append(run("SLTT", trained_on=trained_on(starts, steps=100), name=name))
    groups = Study(title="t", runs=tuple(runs)).groups
    assert [[each.name for each in group.runs] for group in groups] == [
        ["bptt-0"],
        *([name] for name in CHANGED),
    ]
    _, workers, _, loaders, cores = (group.runs[0].trained_on for group in groups)
    assert [each["world_size"] for each in workers] == [2, 1]
    assert [each["loader_threads"] for each in loaders] == [2, 1] and [
        each["own_cores"] for each in cores
    ] == [True, False]


def test_a_run_whose_summary_tells_less_of_each_start_is_beside_those_that_tell_all():
    """As those of a study that is trained while spiketrain is updated."""
    first, *_ = events("SLTT")
    told = run(
        "SLTT", trained_on=trained_on([{**first, "own_cores": [0]}], steps=100), own_cores=True
    )
    untold = run("BPTT", trained_on=[on()], own_cores=True)
    (group,) = Study(title="t", runs=(untold, told)).groups
    assert group.rules == ["BPTT", "SLTT"]


def test_wall_clocks_leave_out_what_comparing_gradients_took():
    looked = run("SLTT", wall_s=46.0, net_s=45.0, fidelity_s=30.0)
    (group,) = Study(
        title="t", runs=(run("BPTT"), looked, run("OTTT-A", wall_s=16.0, fidelity_s=0.0))
    ).groups
    assert (
        group.ratios("SLTT", "wall_s")
        == group.ratios("OTTT-A", "wall_s")
        == Spread(mean=0.8, deviation=None, runs=1)
    )
    assert group.spread("SLTT", "net_s") == Spread(mean=15.0, deviation=None, runs=1)


def test_wall_clocks_leave_out_start_up():
    """Two equal runs, of which the one that went first waited for compilation."""
    first, second = (
        run("BPTT", wall_s=30.0, startup_s=20.0),
        run("SLTT", wall_s=12.0, net_s=9.0, startup_s=2.0),
    )
    (group,) = Study(title="t", runs=(first, second)).groups
    assert group.ratios("SLTT", "wall_s") == Spread(mean=1.0, deviation=None, runs=1)
    assert group.spread("SLTT", "net_s") == Spread(mean=9.0, deviation=None, runs=1)
    assert (
        "wall clocks leave out start-up, which ends with each start's first batch: 20 s of BPTT, 2"
        " s of SLTT" in group.notes
    )


def test_a_run_that_did_not_tell_its_start_up_apart_has_no_wall_clock_to_compare():
    (group,) = Study(title="t", runs=(run("BPTT"), run("SLTT", startup_s=None))).groups
    assert group.ratios("SLTT", "wall_s") is None and group.spread("SLTT", "wall_s") is None


def test_the_interval_of_a_mean():
    found = spread_of([1.0, 2.0, 3.0])
    assert found is not None and found.interval is not None
    reach = (
        4.302653 / 3**0.5
    )  # Student's t of two degrees of freedom, 97.5 %, from a printed table; the deviation is 1
    assert found.interval == (pytest.approx(2 - reach), pytest.approx(2 + reach))
    assert Spread(mean=1.0, deviation=None, runs=1).interval is None and spread_of([]) is None


def test_the_faster_bptt_is_what_time_is_divided_by():
    slow, fast = (
        run("BPTT-chunk-1", backward_s=96.0),
        run("BPTT-chunk-1", backward_s=6.0, wall_s=10.0),
    )
    assert study(slow).groups[0].fastest_baseline == "BPTT"
    (group,) = study(fast, run("BPTT-recompute", backward_s=1.0)).groups
    assert group.fastest_baseline == "BPTT-chunk-1"
    assert group.ratios("SLTT", COMPUTE) == Spread(mean=1.2, deviation=None, runs=1)
    assert group.ratios("SLTT", "wall_s") == Spread(mean=1.6, deviation=None, runs=1)
    assert [group.base_of(name) for name in ("images_per_s", "top1")] == ["BPTT-chunk-1", "BPTT"]


def test_which_bptt_is_faster_is_told_by_the_seeds_that_both_ran():
    """The machine was slow while seed 0 was trained."""
    seconds = {0: 30.0, 1: 5.0, 2: 5.0}
    folded = [
        run("BPTT", seed=seed, forward_s=taken, backward_s=taken) for seed, taken in seconds.items()
    ]
    (group,) = Study(
        title="t", runs=(*folded, run("BPTT-chunk-1", forward_s=20.0, backward_s=20.0))
    ).groups
    assert group.fastest_baseline == "BPTT-chunk-1"


def test_two_rules_of_one_label_are_told_apart():
    rescaled = recipe(
        "SLTT", rule={"target": "pipeline.rules.sltt.SLTT", "kwargs": {"k": 1, "rescale": True}}
    )
    (group,) = study(run("SLTT", seed=4, recipe=rescaled)).groups
    assert group.rules == ["BPTT", "SLTT (as it comes)", "SLTT (k=1, rescale=True)"]
    assert [difference.rule for difference in group.differences] == ["SLTT (as it comes)"]


def test_two_values_of_what_was_tuned_are_told_apart():
    """Five learning rates of one rule are no five seeds of it."""

    def tried(rate: float) -> dict:
        made = recipe("SLTT", tuned=["optimizer.lr"], protocol="tuned")
        return {**made, "optimizer": {"target": "timm.optim.create", "kwargs": {"lr": rate}}}

    runs = [run("SLTT", seed=seed, recipe=tried(rate)) for seed, rate in enumerate((0.1, 0.1, 0.3))]
    (group,) = Study(
        title="t", runs=(run("BPTT", recipe=recipe("BPTT", tuned=["optimizer.lr"])), *runs)
    ).groups
    assert group.rules == ["BPTT", "SLTT (optimizer.lr=0.1)", "SLTT (optimizer.lr=0.3)"]
    assert Study(title="t", runs=tuple(runs[:2])).groups[0].rules == ["SLTT"]


def test_two_tunings_of_the_baseline_are_several_and_none_is_called_unfinished():
    several = (tuned("BPTT", 0.1), tuned("BPTT", 0.3, seed=1), tuned("SLTT", 0.3))
    (group,) = Study(title="t", runs=several).groups
    assert not group.has_baseline and group.rules[:2] == [
        "BPTT (optimizer.lr=0.1)",
        "BPTT (optimizer.lr=0.3)",
    ]
    assert (
        group.undivided
        == group.several_baselines
        == "several BPTTs with different optimizer.lr; name one"
    )
    failed = tuple(tuned("BPTT", rate, state="failed") for rate in (0.1, 0.3))
    (group,) = Study(title="t", runs=failed).groups
    assert (group.several_baselines, group.undivided) == (
        "",
        "no run of BPTT among these has finished",
    )
    (group,) = Study(title="t", runs=several[1:]).groups
    assert group.has_baseline and (group.several_baselines, group.undivided) == ("", "")
    slices = [recipe("BPTT", rule={"target": "x.BPTT", "kwargs": {"truncate": k}}) for k in (1, 2)]
    (group,) = Study(
        title="t", runs=tuple(run(seed=seed, recipe=made) for seed, made in enumerate(slices))
    ).groups
    assert group.undivided == "several BPTTs with different keywords; name one"


def test_what_the_reader_of_means_must_know():
    more = (
        run("SLTT", name="again", restart=True),  # of commit def from then on
        run("BPTT-chunk-1", backward_s=1.0),
        run("OTTT-A", seed=7, fidelity_s=1.0),
        run("DSR", seed=9, state="running"),
    )
    assert study(*more).groups[0].notes == (
        "the runs are of different commits: abc, def",
        "SLTT has 2 runs of seed 0, which count as one, their mean, in ratios and differences",
        "wall clocks leave out what comparing gradients with BPTT's took, in runs of OTTT-A",
        (
            "runs of OTTT-A compared gradients, and those of BPTT, BPTT-chunk-1, SLTT did not: one"
            " that has may compute some 2 % slower from then on, so a difference as small is none"
        ),
        RECOMPUTES_NOTHING,
        "images/s, wall clock and compute time are divided by BPTT-chunk-1's, the faster BPTT",
        "OTTT-A has no seed in common with BPTT, so its top-1 and bytes are not divided",
        "OTTT-A has no seed in common with BPTT-chunk-1, so its times are not divided",
    )
    assert study().groups[0].notes == (FOLDED_ALONE, RECOMPUTES_NOTHING)
    assert study(run("OTTT-A", restarts=2)).groups[0].notes == (
        "wall clocks have restarts in them, with the batches that each lost: 2 of OTTT-A",
        FOLDED_ALONE,
        RECOMPUTES_NOTHING,
    )
    assert study(run("SLTT", name="again", restart=True, state="running")).groups[0].notes == (
        FOLDED_ALONE,
        RECOMPUTES_NOTHING,
    )  # in no mean yet


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"rollbacks": 1, "skipped_batches": 4}, "went back 1 time as its training diverged"),
        ({"rollbacks": 2, "skipped_batches": 9}, "went back 2 times as its training diverged"),
        ({"loss": float("nan")}, "ended with a loss of nan in its evaluation"),
        ({"state": "diverged"}, "diverged"),
        ({"rollbacks": 1, "skipped_batches": 0}, ""),  # for replicas that differed
        ({"skipped_batches": 2}, ""),
    ],
)
def test_a_run_that_diverged_compares_no_rules(changes, how):
    notes = study(run("OTTT-A", name="mine", **changes)).groups[0].notes
    told = (
        f"mine (OTTT-A) {how}: its figures and ratios compare no rules; lower optimizer.lr (0.1) or"
        " set clip_norm=1.0"
    )
    assert [note for note in notes if "mine" in note] == [
        f"{told} for every rule, and train again"
    ] * bool(how)


def test_recomputation_stands_beside_and_what_no_count_knows_is_named():
    inference = {"energy_j": 1.0, "prices": "x", "not_counted": ["fused"]}
    notes = (
        study(run("BPTT-recompute"), run("OTTT-A", not_counted=["other"], inference=inference))
        .groups[0]
        .notes
    )
    assert RECOMPUTES_NOTHING not in notes and FOLDED_ALONE in notes
    assert (
        "operations, and the energy of an inference, leave out what no count knows: fused, other"
        in notes
    )


def test_a_rule_that_says_less_than_its_recipe_is_written_out():
    def of(**kwargs: object) -> dict:
        return recipe("SLTT", rule={"target": "pipeline.rules.x.HLOP", "kwargs": kwargs})

    inner = {"target": "pipeline.rules.sltt.SLTT", "kwargs": {"k": 1}}
    (group,) = Study(title="t", runs=(run(), run("HLOP(SLTT-1)", recipe=of(inner=inner)))).groups
    assert group.notes == (
        "HLOP(SLTT-1) is HLOP(inner=SLTT(k=1))",
        FOLDED_ALONE,
        RECOMPUTES_NOTHING,
    )
    (group,) = Study(
        title="t", runs=(run(), run("HLOP", recipe=of(k=1)), run("HLOP", seed=1, recipe=of(k=2)))
    ).groups
    assert group.rules[1:] == ["HLOP (k=1)", "HLOP (k=2)"]
    assert group.notes == (
        FOLDED_ALONE,
        RECOMPUTES_NOTHING,
        "HLOP (k=2) has no seed in common with BPTT, so nothing of it is divided",
    )


def test_a_seed_that_diverged_is_in_no_mean_and_no_claim_holds_over_it():
    more = (run(seed=2, top1=0.9), run("SLTT", seed=2, state="diverged"))
    (group,) = study(*more).groups
    (difference,) = group.differences
    assert (difference.seeds, difference.diverged, difference.verdict(9.0)) == (2, 1, "fails")
    assert (
        study(*more, run("SLTT", seed=2, name="again")).groups[0].lost("SLTT") == 0
    )  # another run of that seed finished
    assert (
        study(run("SLTT", seed=7, state="diverged")).groups[0].lost("SLTT") == 0
    )  # of no seed of the baseline's
    (group,) = Study(title="t", runs=(*more, run(), run("SLTT", state="diverged"))).groups
    assert group.differences == [] and group.lost("SLTT") == 2
    claim = accuracy("SLTT", group, "SLTT", within=9.0, published="-")
    assert (claim.holds, claim.ours) == (False, "diverged in 2 of BPTT's 2 seeds")


def test_without_a_baseline():
    (group,) = Study(title="alone", runs=(run("SLTT"), run("BPTT", state="failed"))).groups
    assert (
        not group.has_baseline
        and group.ratios("SLTT", "wall_s") is None
        and group.differences == []
    )
