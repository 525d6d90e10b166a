"""The tiles of a rule: what each says of finished, running and lost runs."""

import pytest

from pipeline.report.overview import first_rule, tiles, training
from pipeline.report.results import Run
from tests.helpers.hand_made import events, group_of, made, recipe, run

BPTT = tuple(run(seed=seed, top1=0.9 + seed / 100) for seed in range(3))
SLTT = tuple(run("SLTT", seed=seed, top1=0.895 + seed / 100) for seed in range(3))


def going(rule: str, *, state: str = "running", count: int = 4) -> Run:
    """A run of 100 batches at the first `count` events of its journal."""
    journal = events(rule)[:count]
    for each in journal:
        if each["event"] == "step":
            each["memory_bytes"] = 512_000_000
    return made(f"{rule}-going", journal, state=state, recipe=recipe(rule))


@pytest.mark.parametrize(
    ("runs", "rule", "said"),
    [
        (
            (*BPTT, *SLTT),
            "SLTT",
            [
                "Accuracy|-0.50|points|90.50%, BPTT 91.00%|95 %: -0.50 to -0.50, 3 seeds|True",
                "Memory|25 %|of BPTT's|2 MB, BPTT 8 MB|95 %: 25 to 25 %, 3 seeds|True",
                "Time per batch|75 %|of BPTT's|120 ms, BPTT 160 ms|95 %: 75 to 75 %, 3 seeds|True",
                "Energy|75 %|of BPTT's|3 µJ, BPTT 4 µJ|95 %: 75 to 75 %, 3 seeds|True",
            ],
        ),
        (
            (BPTT[0], SLTT[0]),
            "SLTT",
            [
                "Accuracy|-0.50|points|89.50%, BPTT 90.00%|one seed, no interval|False",
                "Memory|25 %|of BPTT's|2 MB, BPTT 8 MB|one seed, no interval|False",
            ],
        ),
        (BPTT, "BPTT", ["Accuracy|91.00%||the baseline|mean of 3 runs|True"]),
        (SLTT[:1], "SLTT", ["Accuracy|89.50%||no baseline|one run|False"]),
        (
            (BPTT[0], SLTT[1]),
            "SLTT",
            ["Accuracy|90.50%||no seed in common with BPTT|one run|False"],
        ),
        ((run("SLTT", top1=0.9, inference=None),), "SLTT", [*3 * [""], "Energy|–||not measured||"]),
        (
            (*BPTT, *SLTT[:2], run("SLTT", seed=2, state="diverged")),
            "SLTT",
            ["Accuracy|-0.50|points|90.00%, BPTT 91.00%|95 %: -0.50 to -0.50, 2 seeds, div"],
        ),
        (
            (*BPTT, going("SLTT")),
            "SLTT",
            [
                "Accuracy|80.00%||evaluated after 50 batches|running, seed 0|False",
                "Memory|512 MB||in use now|saved bytes follow at the end|False",
                "Time|8 s|left|50 of 100 batches|160 ms a batch|False|0.5",
                "Energy|–|||estimated at the end|False",
            ],
        ),
        (
            (going("SLTT", count=2),),
            "SLTT",
            ["Accuracy|20.00%||of training batches after 25 batches|running, seed 0|False"],
        ),
        (
            (going("SLTT", count=1),),
            "SLTT",
            [
                "Accuracy|–||0 of 100 batches|running, seed 0|False",
                "Memory|–|||saved bytes follow at the end|False",
                "Time|–||0 of 100 batches|no batch is timed yet|False",
            ],
        ),
        (
            (going("SLTT", state="diverged"),),
            "SLTT",
            [
                "Accuracy|diverged||seed 0, after 50 of 100 batches||False",
                "Memory|–||no run has finished||False",
            ],
        ),
    ],
)
def test_tiles(runs: tuple[Run, ...], rule: str, said: list[str]):
    texts = ["|".join(map(str, each)) for each in tiles(group_of(*runs), rule)]
    assert len(texts) == 4
    for text, start in zip(texts, said, strict=False):
        assert text.startswith(start)


@pytest.mark.parametrize(
    ("runs", "rule"),
    [
        ((*BPTT, *SLTT, going("OTTT-A")), "SLTT"),  # the best
        ((*BPTT, going("SLTT"), going("OTTT-A", state="failed")), "SLTT"),
        ((*SLTT, going("OTTT-A", state="failed")), "SLTT"),
        (BPTT, "BPTT"),
    ],
)
def test_the_best_rule_or_one_that_trains_is_shown_first(runs: tuple[Run, ...], rule: str):
    assert first_rule(group_of(*runs)) == rule


def test_runs_that_train_beside_finished_ones_are_named():
    [(name, time)] = training(group_of(*BPTT, *SLTT, going("OTTT-A")))
    assert (name, time.value, time.progress) == ("OTTT-A, seed 0", "8 s", 0.5)
