"""What the report of a search says: both protocols, what diverged, and which trial each search
took.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.report.suite import print_protocols

TRIALS, TUNED = "e" * 16, "f" * 16


def told(runs: list[Path]) -> tuple[dict[str, Any], str]:
    out = io.StringIO()
    return (
        print_protocols({run.name: run for run in runs}, Console(file=out, width=140)),
        out.getvalue(),
    )


def searched(rate: float, protocol: str = "trial", **more: Any) -> dict[str, Any]:
    optimizer = {"target": "timm.optim.create", "kwargs": {"opt": "sgd", "lr": rate}}
    return {"protocol": protocol, "tuned": ["optimizer.lr"], "optimizer": optimizer, **more}


def test_each_search_has_a_value_of_its_own_that_was_taken(make_run: Callable):
    """Two recipes of one rule that differ in what no study is told apart by."""
    trials = [
        make_run(f"{name}-{rate}", study=TRIALS, top1=top1, recipe=searched(rate, **about))
        for name, about in (
            ("plain", {}),
            ("looked-at", {"evaluation": {"fidelity_every": 1}}),
            ("other", {"family": "other"}),
        )
        for rate, top1 in {0.1: {"plain": 0.7}.get(name, 0.9), 0.3: 0.8}.items()
    ]
    found, said = told(trials)
    taken = [trial["run"] for trial in found["trials"] if trial["taken"]]
    assert taken == ["plain-0.3", "looked-at-0.1", "other-0.1"] and said.count("taken") == 3


def test_what_diverged_is_named_and_keeps_no_other_table_from_being_printed(make_run: Callable):
    runs = [
        make_run("bptt", end="diverged"),
        make_run("sltt", rule="SLTT-1", end="diverged"),
        make_run("bptt-0.1", study=TRIALS, recipe=searched(0.1)),
        make_run("bptt-0.3", study=TRIALS, recipe=searched(0.3), end="diverged"),
        make_run("bptt-tuned", study=TUNED, recipe=searched(0.1, "tuned")),
        make_run(
            "sltt-tuned", study=TUNED, rule="SLTT-1", recipe=searched(0.3, "tuned"), end="diverged"
        ),
    ]
    found, said = told(runs)
    assert "shared: only the rule differs\nbptt (BPTT) diverged\nsltt (SLTT-1) diverged\n" in said
    [shared] = found["shared"]
    assert [(run["run"], run["state"]) for run in shared["unfinished"]] == [
        ("bptt", "diverged"),
        ("sltt", "diverged"),
    ]
    [tuned] = found["tuned"]
    assert [run["run"] for run in tuned["runs"]] == ["bptt-tuned"] and tuned["unfinished"][0][
        "run"
    ] == "sltt-tuned"
    assert re.search(r"SLTT-1 +diverged +- +-", said)
    assert [trial["top1"] for trial in found["trials"]] == [0.9, None]
