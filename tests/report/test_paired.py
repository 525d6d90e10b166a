import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.report.compare import compare, print_comparison
from pipeline.report.study import Difference, Study
from tests.helpers.hand_made import run


def difference(
    baseline: dict[int, float], rule: dict[int, float], *, lost: tuple[int, ...] = ()
) -> Difference | None:
    """Of top-1 by seed, with seeds in which the rule diverged."""
    runs = [run("BPTT", seed=seed, top1=top1) for seed, top1 in baseline.items()]
    runs += [run("SLTT", seed=seed, top1=top1) for seed, top1 in rule.items()]
    runs += [run("SLTT", seed=seed, state="diverged") for seed in lost]
    found = Study(title="t", runs=tuple(runs)).groups[0].differences
    return found[0] if found else None


def test_the_interval_of_three_pairs_by_hand():
    found = difference({0: 0.91, 1: 0.92, 2: 0.90, 3: 0.5}, {0: 0.905, 1: 0.911, 2: 0.899})
    assert found is not None and found.seeds == 3
    d = [0.5, 0.9, 0.1]
    sd = math.sqrt(sum((x - 0.5) ** 2 for x in d) / 2)
    reach = (
        4.302653 * sd / math.sqrt(3)
    )  # Student's t of two degrees of freedom, 97.5 %, from a printed table
    assert (found.mean, found.low, found.high) == (
        pytest.approx(0.5),
        pytest.approx(0.5 - reach),
        pytest.approx(0.5 + reach),
    )


def test_one_pair_says_nothing():
    assert difference({0: 0.9, 1: 0.9}, {1: 0.8, 2: 0.8}) is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.5, 0.7, "holds"), (0.71, 2.0, "fails"), (0.1, 0.9, "is undecided"), (-3, -2, "holds")],
)
def test_verdicts(low: float, high: float, verdict: str):
    found = Difference(
        baseline="BPTT", rule="SLTT", seeds=3, mean=(low + high) / 2, low=low, high=high
    )
    assert found.verdict(0.7) == verdict and found.text(0.7).endswith(
        f"at most 0.7 points below {verdict}"
    )


def test_a_rule_that_diverged_in_a_seed_of_the_baselines_fails():
    baseline, rule = {0: 0.9, 1: 0.9, 2: 0.9}, {0: 0.9, 1: 0.9}
    found = difference(baseline, rule, lost=(2,))
    assert found is not None and (found.seeds, found.diverged, found.verdict(0.7)) == (
        2,
        1,
        "fails",
    )
    finished = difference(baseline, rule)
    assert finished is not None and finished.verdict(0.7) == "holds"


def test_the_table_says_which(make_run: Callable, runs_dir: Path):
    for seed, (bptt, sltt, ottt) in enumerate(
        [(0.91, 0.909, 0.89), (0.92, 0.919, 0.90), (0.90, 0.8995, 0.88)]
    ):
        make_run(f"b{seed}", seed=seed, top1=bptt)
        make_run(f"s{seed}", seed=seed, rule="SLTT", top1=sltt)
        make_run(f"o{seed}", seed=seed, rule="OTTT-A", top1=ottt)
    verdicts = {each.rule: each.verdict(0.7) for each in compare(runs_dir).group.differences}
    assert verdicts == {"SLTT": "holds", "OTTT-A": "fails"}
    other = compare(runs_dir, against="OTTT-A")
    assert {each.rule for each in other.group.differences} == {
        "BPTT",
        "SLTT",
    } and other.group.finished[0].name == "o0"
    value = other.to_json()
    assert value["differences"][0]["verdict"] == "holds" and value["differences"][0][
        "mean"
    ] == pytest.approx(-2)


def test_studies_stand_one_below_another_each_with_its_baseline(make_run: Callable, runs_dir: Path):
    folders = [
        make_run("b1", top1=0.9),
        make_run("b2", study="f" * 16, top1=0.5),
        make_run("s1", rule="SLTT", top1=0.45),
        make_run("d2", rule="DSR", study="f" * 16, top1=0.25),
    ]
    out = io.StringIO()
    print_comparison(
        runs_dir, folders=[Path(folder) for folder in folders], console=Console(file=out, width=120)
    )
    text = out.getvalue()
    first, second = text[: text.index("study ffff")], text[text.index("study ffff") :]
    assert "SLTT" in first and "×0.50" in first and "DSR" not in first
    assert "DSR" in second and "×0.50" in second and "SLTT" not in second
