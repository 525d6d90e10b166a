import csv
import io
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from rich.console import Console

from pipeline.core.printing import NO_WIDTH
from pipeline.report import results
from pipeline.report.compare import Comparison, comparisons, csv_of, print_comparison
from pipeline.report.results import ReportError
from pipeline.report.study import FOLDED_ALONE, RECOMPUTES_NOTHING, Difference, Study
from pipeline.report.suite import read_study
from tests.helpers.events import RawJournal, event
from tests.helpers.hand_made import run
from tests.helpers.small import command
from tests.report.conftest import RECIPE, STUDY, compare, make_all


def text_of(comparison: Comparison, *, width: int = 120) -> str:
    out = io.StringIO()
    comparison.render(Console(file=out, width=width))
    return out.getvalue()


def rows_of(comparison: Comparison) -> list[dict[str, str]]:
    """The lines of its CSV."""
    return list(csv.DictReader(io.StringIO(csv_of([comparison.to_json()]))))


UNKNOWN = {
    "kept_bytes": None,
    "compute_s": None,
    "inference.energy_j": None,
    "inference.measured_j": None,
}


def trained(*, workers: int = 2, micro_batch: int = 32, cpu: str = "a cpu") -> dict[str, Any]:
    return {
        "world_size": workers,
        "micro_batch": micro_batch,
        "hardware": {"cpu": cpu, "cores": 2, "gpu": "none"},
    }


def test_costs_beside_the_baseline(make_run: Callable, runs_dir: Path):
    make_all(
        make_run,
        {
            "sltt": {
                "rule": "SLTT",
                "top1": 0.81,
                "peak_saved_bytes": 2_000_000,
                "images_per_s": 150.0,
                "wall_s": 100.0,
            },
            "bptt": {},
        },
    )
    comparison = compare(runs_dir)
    assert comparison.group.study == STUDY
    assert [run.name for run in comparison.group.finished] == ["bptt", "sltt"]
    value = json.loads(json.dumps(comparison.to_json()))
    assert (value["study"], value["baseline"]) == (STUDY, "bptt")
    ratios = {**UNKNOWN, "top1": 1.0, "peak_saved_bytes": 1.0, "images_per_s": 1.0, "wall_s": 1.0}
    assert value["runs"][0]["ratios"] == ratios
    ratios |= {
        "top1": pytest.approx(0.9),
        "peak_saved_bytes": 0.25,
        "images_per_s": 1.5,
        "wall_s": 0.5,
    }
    assert value["runs"][1]["ratios"] == ratios
    assert value["runs"][1]["hardware"] == {"cpu": "a cpu", "cores": 2, "gpu": "none"}
    lines = text_of(comparison).splitlines()
    assert re.search(r"BPTT +90.00% +×1.00 +8 MB +×1.00 +100 +×1.00 +3.3 min +×1.00", lines[2])
    assert re.search(r"SLTT +81.00% +×0.90 +2 MB +×0.25 +150 +×1.50 +1.7 min +×0.50", lines[3])
    assert (
        lines[5].split() == ["behind", "each", "row"]
        and len(lines) == 11
        and comparison.notes == (FOLDED_ALONE, RECOMPUTES_NOTHING)
    )


def test_several_seeds_are_a_mean_and_a_spread(make_run: Callable, runs_dir: Path):
    for seed, top1 in enumerate((0.8, 0.9, 1.0)):
        make_run(f"bptt-{seed}", seed=seed, top1=top1)
    for seed, top1 in enumerate((0.7, 0.74)):
        make_run(f"sltt-{seed}", rule="SLTT", seed=seed, top1=top1, wall_s=None)
    comparison = compare(runs_dir, [STUDY[:6]])
    lines = [line.rstrip() for line in text_of(comparison).splitlines()]
    assert re.search(r"BPTT \(3 runs\) +90.00% +×1.00 ", lines[2])
    assert re.search(r"^ +± 10.00% +± 0 MB +± 0 +± 0.0 min$", lines[3])
    assert re.search(r"SLTT \(2 runs\) +72.00% +×0.85 .* -$", lines[4])
    assert re.search(r"^ +± 2.83%", lines[5])
    assert comparison.to_json()["baseline_runs"] == ["bptt-0", "bptt-1", "bptt-2"]
    ratios = [run["ratios"] for run in comparison.to_json()["runs"]]
    assert [each["top1"] for each in ratios] == pytest.approx([1, 1, 1, 0.7 / 0.8, 0.74 / 0.9])
    assert ratios[4]["wall_s"] is None


def test_ratios_are_of_paired_seeds(make_run: Callable, runs_dir: Path):
    make_all(
        make_run,
        {
            "bptt-0": {"peak_saved_bytes": 8_000_000},
            "bptt-5": {"seed": 5, "peak_saved_bytes": 80_000_000},
            "sltt-0": {"rule": "SLTT", "peak_saved_bytes": 2_000_000},
            "sltt-9": {"rule": "SLTT", "seed": 9, "peak_saved_bytes": 2_000_000},
            "ottt-7": {"rule": "OTTT", "seed": 7},
        },
    )
    comparison = compare(runs_dir)
    found = {run["run"]: run["ratios"]["peak_saved_bytes"] for run in comparison.to_json()["runs"]}
    assert found == {"bptt-0": 1.0, "bptt-5": 1.0, "ottt-7": None, "sltt-0": 0.25, "sltt-9": None}
    bptt, _, ottt, sltt = text_of(comparison).splitlines()[2:6]
    assert "44 MB  ×1.00" in bptt and "2 MB  ×0.25" in sltt and "×" not in ottt
    assert comparison.notes == (
        FOLDED_ALONE,
        RECOMPUTES_NOTHING,
        "OTTT has no seed in common with BPTT, so nothing of it is divided",
    )


def test_time_is_divided_by_the_faster_bptt(make_run: Callable, runs_dir: Path):
    make_all(
        make_run,
        {
            "bptt": {"steady_forward_s": 0.04, "steady_backward_s": 0.08},
            "stepped": {
                "rule": "BPTT-chunk-1",
                "steady_forward_s": 0.04,
                "steady_backward_s": 0.02,
                "wall_s": 100.0,
                "images_per_s": 200.0,
            },
            "sltt": {"rule": "SLTT", "wall_s": 50.0, "peak_saved_bytes": 2_000_000},
        },
    )
    comparison = compare(runs_dir, ["sltt"])
    assert [run.name for run in comparison.group.finished] == ["bptt", "stepped", "sltt"]
    divided = "images/s, wall clock and compute time are divided by BPTT-chunk-1's, the faster BPTT"
    assert comparison.notes == (RECOMPUTES_NOTHING, divided)
    value = comparison.to_json()
    assert (value["baseline"], value["time_baseline"]) == ("bptt", "BPTT-chunk-1")
    ratios = {**UNKNOWN, "top1": 1.0, "peak_saved_bytes": 1.0, "images_per_s": 0.5, "wall_s": 2.0}
    assert value["runs"][0]["ratios"] == {**ratios, "compute_s": pytest.approx(2.0)}
    assert value["runs"][2]["ratios"] == {**ratios, "peak_saved_bytes": 0.25, "wall_s": 0.5}
    assert re.search(
        r"SLTT +90.00% +×1.00 +2 MB +×0.25 +100 +×0.50 +50.0 s +×0.50", text_of(comparison)
    )
    rows = rows_of(comparison)
    assert [row["ratios.wall_s"] for row in rows] == ["2.0", "1.0", "0.5"]
    assert {row["time_baseline"] for row in rows} == {"BPTT-chunk-1"}
    for names in (
        ["sltt", "bptt"],
        ["bptt", "sltt", "stepped"],
    ):  # naming the slower one does not hide the faster
        assert compare(runs_dir, names).to_json() == value
        assert {run.name for run in read_study(runs_dir, names).study.runs} == {
            "bptt",
            "stepped",
            "sltt",
        }


def test_the_choices_that_decide_a_comparison_stand_in_every_row(
    make_run: Callable, runs_dir: Path
):
    def told(steps: int) -> dict[str, Any]:
        conditions = {
            "reset_gradient": "detached",
            "norm_over": "step",
            "precision": "bf16",
            "steps_per_forward": steps,
        }
        return {
            "recipe": {"time_steps": 6},
            "conditions": conditions,
            "trained_on": [trained(micro_batch=16)],
        }

    make_all(
        make_run,
        {
            "bptt": {"steady_forward_s": 0.04, "steady_backward_s": 0.08, **told(6)},
            "stepped": {
                "rule": "BPTT-chunk-1",
                "steady_forward_s": 0.04,
                "steady_backward_s": 0.02,
                **told(1),
            },
            "sltt": {"rule": "SLTT", **told(1)},
        },
    )
    recomputed = {
        "recipe": {"time_steps": 6, "rule": {"target": "x", "kwargs": {"recompute": True}}}
    }
    make_all(
        make_run,
        {
            "recompute": {"rule": "BPTT-recompute", **told(1), **recomputed},
            "old": {"rule": "OTTT-A", "trained_on": [trained(micro_batch=16)]},
        },
    )
    comparison = compare(runs_dir)
    rows = [re.split(r"  +", line.strip()) for line in text_of(comparison).splitlines()]
    same = ["BPTT", "BPTT-chunk-1", "detached", "step", "bf16"]
    assert ["SLTT", *same, "step by step", "16 × 2", "not known"] in rows
    assert ["BPTT-recompute", *same, "step by step, recomputed", "16 × 2", "not known"] in rows
    assert ["BPTT", *same, "folded", "16 × 2", "not known"] in rows
    assert ["OTTT-A", *same[:2], *4 * ["not known"], "16 × 2", "not known"] in rows
    expected = dict(
        zip(
            ("ratios_to", "time_to", "reset_gradient", "norm_statistics", "precision"),
            same,
            strict=True,
        )
    )
    expected |= {"micro_batch": "16 × 2", "evaluated": "not known"}
    runs = {run["run"]: run["behind"] for run in comparison.to_json()["runs"]}
    assert runs["bptt"] == {**expected, "over_time": "folded"} and runs["sltt"] == {
        **expected,
        "over_time": "step by step",
    }
    assert {row["behind.reset_gradient"] for row in rows_of(comparison)} == {
        "detached",
        "not known",
    }


ELSEWHERE = {"hardware": {"cpu": "another cpu", "cores": 2, "gpu": "none"}}


def two_machines(make_run: Callable) -> list[Path]:
    """Seed 1 was finished on another machine, and there with another number of workers by one rule;
    a run failed.
    """
    return [
        make_run("bptt-0", wall_s=100.0),
        make_run("sltt-0", rule="SLTT", wall_s=50.0),
        make_run("bptt-1", seed=1, wall_s=400.0, **ELSEWHERE),
        make_run("sltt-1", rule="SLTT", seed=1, wall_s=300.0, **ELSEWHERE),
        make_run("ottt-1", rule="OTTT", seed=1, wall_s=10.0, world_size=1, **ELSEWHERE),
        make_run("dsr-0", rule="DSR", end="failed"),
    ]


def test_runs_of_different_machines_are_shown_apart_and_never_divided_by_one_another(
    make_run: Callable, runs_dir: Path
):
    folders = two_machines(make_run)
    found = comparisons(runs_dir, folders)
    assert [[run.name for run in each.group.finished] for each in found] == [
        ["bptt-0", "sltt-0"],
        ["bptt-1", "sltt-1"],
        ["ottt-1"],
    ]
    assert [each.where for each in found] == [
        "a cpu, 2 cores; 2 workers",
        *(f"another cpu, 2 cores; {n}" for n in ("2 workers", "1 worker")),
    ]
    assert [run.folder.name for run in found[0].unfinished] == ["dsr-0"] and not found[1].unfinished
    assert [[run["ratios"]["wall_s"] for run in each.to_json()["runs"]] for each in found] == [
        [1.0, 0.5],
        [1.0, 0.75],
        [None],
    ]
    assert (
        found[2].to_json()["where"] == "another cpu, 2 cores; 1 worker"
        and found[2].to_json()["baseline"] is None
    )

    out = io.StringIO()
    print_comparison(runs_dir, folders=folders, console=Console(file=out, width=120))
    shown = out.getvalue()
    assert "study 01234567 on a cpu, 2 cores; 2 workers" in shown and "×0.75" in shown
    assert "no baseline, no ratios: bptt-0 does not stand comparison: " in shown
    apart = (
        "of different machines, workers or micro-batches: nothing is divided from one to another"
    )
    assert f"study 01234567 has 3 tables, {apart}" in shown
    for names in ([], [STUDY[:6]]):
        again = io.StringIO()
        print_comparison(runs_dir, names, console=Console(file=again, width=120))
        assert sorted(again.getvalue().splitlines()) == sorted(shown.splitlines())


def test_json_and_csv_have_what_the_tables_have(
    make_run: Callable, runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """A list of comparisons, and lines that say where: of one machine or three, and likewise of
    runs that are named.
    """
    folders = two_machines(make_run)
    expected = [each.to_json() for each in comparisons(runs_dir, sorted(folders))]
    assert [len(each["runs"]) for each in expected] == [2, 2, 1]
    for names in ([], [STUDY[:6]]):
        print_comparison(runs_dir, names, format="json")
        assert json.loads(capsys.readouterr().out) == expected
        print_comparison(runs_dir, names, format="csv")
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        told = [
            (run["run"], STUDY, each["where"], each["time_baseline"] or "")
            for each in expected
            for run in each["runs"]
        ]
        assert [
            (row["run"], row["study"], row["where"], row["time_baseline"]) for row in rows
        ] == told
        assert {row["run"]: row["ratios.wall_s"] for row in rows} == {
            "bptt-0": "1.0",
            "sltt-0": "0.5",
            "bptt-1": "1.0",
            "sltt-1": "0.75",
            "ottt-1": "",
        }
    print_comparison(runs_dir, ["bptt-1", "sltt-1"], format="json")
    [alone] = json.loads(capsys.readouterr().out)
    assert alone == {**expected[1], "where": None}
    print_comparison(runs_dir, ["bptt-1", "sltt-1"], format="csv")
    assert [row["where"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))] == [
        "",
        "",
    ]


def test_what_may_not_be_compared_is_raised_after_what_may(
    make_run: Callable, runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    folders = [make_run("bptt"), make_run("lost", study="f" * 16, end="failed")]
    for format in ("json", "csv"):
        with pytest.raises(ReportError, match="no finished run: lost is failed"):
            print_comparison(runs_dir, folders=folders, format=format)
        assert "bptt" in capsys.readouterr().out
        with pytest.raises(ReportError, match="no finished run: lost is failed"):
            print_comparison(runs_dir, folders=folders[1:], format=format)
        assert capsys.readouterr().out == ""


def test_a_halved_micro_batch_is_not_compared_with_a_whole_one(make_run: Callable, runs_dir: Path):
    folders = [
        make_run("bptt", peak_saved_bytes=4_000_000, trained_on=[trained(micro_batch=16)]),
        make_run("sltt", rule="SLTT", peak_saved_bytes=2_000_000, trained_on=[trained()]),
    ]
    with pytest.raises(
        ReportError, match="differ in more than the rule and the seed: micro_batch: 16 and 32"
    ):
        compare(runs_dir)
    first, second = comparisons(runs_dir, folders)
    assert [first.where, second.where] == [
        f"a cpu, 2 cores; 2 workers{how}" for how in (", in micro-batches of 16", "")
    ]
    assert second.to_json()["runs"][0]["ratios"]["peak_saved_bytes"] is None
    assert second.notes == (
        "no baseline, no ratios: bptt does not stand comparison: micro_batch: 16 and 32",
    )


def test_time_and_energy_stand_beside_what_was_always_compared(make_run: Callable, runs_dir: Path):
    make_all(
        make_run,
        {
            "bptt": {
                "steady_forward_s": 0.04,
                "steady_backward_s": 0.08,
                "inference": {"energy_j": 4e-6},
            },
            "sltt": {
                "rule": "SLTT",
                "steady_forward_s": 0.03,
                "steady_backward_s": 0.03,
                "inference": {"energy_j": 1e-6},
            },
        },
    )
    comparison = compare(runs_dir)
    told = comparison.to_json()["runs"][1]
    assert (told["compute_s"], told["ratios"]["compute_s"]) == (0.06, 0.5) and told["ratios"][
        "inference.energy_j"
    ] == 0.25
    assert re.search(r"SLTT .* 60 ms +×0.50 +1 µJ +×0.25", text_of(comparison))
    (row,) = [row for row in rows_of(comparison) if row["rule"] == "SLTT"]
    assert (row["compute_s"], row["ratios.compute_s"], row["inference.energy_j"]) == (
        "0.06",
        "0.5",
        "1e-06",
    )
    narrow = (
        text_of(comparison, width=80)
        .removesuffix(f"{FOLDED_ALONE}\n{RECOMPUTES_NOTHING}\n")
        .splitlines()
    )
    assert max(map(len, narrow)) <= 80
    values, ratios = narrow[4:6]  # below the ratios of BPTT
    assert (
        values.split()[:2] == ["SLTT", "90.00%"]
        and "60 ms" in values
        and ratios.split()[-2:] == ["×0.50", "×0.25"]
    )


def test_what_cards_measured_stands_beside_the_estimate(make_run: Callable, runs_dir: Path):
    make_all(
        make_run,
        {
            "bptt": {"inference": {"energy_j": 4e-6, "measured_j": 0.02}},
            "sltt": {"rule": "SLTT", "inference": {"energy_j": 1e-6, "measured_j": 0.015}},
        },
    )
    comparison = compare(runs_dir)
    told = comparison.to_json()["runs"][1]
    assert (
        told["inference"]["measured_j"] == 0.015 and told["ratios"]["inference.measured_j"] == 0.75
    )
    text = text_of(comparison)
    assert re.search(r"inference energy +joules of an inference, measured", text)
    assert re.search(r"SLTT .* 1 µJ +×0.25 +15 mJ +×0.75", text)
    (row,) = [row for row in rows_of(comparison) if row["rule"] == "SLTT"]
    assert (row["inference.measured_j"], row["ratios.inference.measured_j"]) == ("0.015", "0.75")
    make_run("on-a-cpu", study="f" * 16, inference={"energy_j": 4e-6})
    alone = compare(runs_dir, ["on-a-cpu"])
    assert "inference energy" in text_of(alone) and "measured" not in text_of(alone)
    assert alone.to_json()["runs"][0]["ratios"]["inference.measured_j"] is None


def test_bytes_stand_without_and_with_states(make_run: Callable, runs_dir: Path):
    make_all(
        make_run,
        {
            "bptt": {"state_bytes": 2_000_000},
            "sltt": {"rule": "SLTT", "peak_saved_bytes": 2_000_000, "state_bytes": 3_000_000},
        },
    )
    comparison = compare(runs_dir)
    assert re.search("saved bytes +saved bytes and states", text_of(comparison, width=160))
    assert re.search(r"SLTT .* 2 MB +×0.25 +5 MB +×0.50 ", text_of(comparison, width=160))
    told = comparison.to_json()["runs"]
    assert [(run["kept_bytes"], run["ratios"]["kept_bytes"]) for run in told] == [
        (10_000_000, 1.0),
        (5_000_000, 0.5),
    ]


def test_csv_has_a_line_for_each_run(make_run: Callable, runs_dir: Path):
    make_all(make_run, {"bptt": {}, "sltt": {"rule": "SLTT", "peak_saved_bytes": 2_000_000}})
    rows = rows_of(compare(runs_dir))
    assert [row["run"] for row in rows] == ["bptt", "sltt"]
    assert list(rows[0])[:4] == ["run", "rule", "seed", "study"]
    assert (rows[1]["ratios.peak_saved_bytes"], rows[1]["hardware.cpu"], rows[1]["top5"]) == (
        "0.25",
        "a cpu",
        "0.99",
    )


def test_the_newest_study_that_has_a_finished_run(make_run: Callable, runs_dir: Path):
    make_all(
        make_run,
        {
            "old": {},
            "new-bptt": {"study": "f" * 16},
            "new-sltt": {"study": "f" * 16, "rule": "SLTT", "end": None},
            "unfinished": {"study": "e" * 16, "end": "failed"},
        },
    )
    comparison = compare(runs_dir)
    assert comparison.group.study == "f" * 16
    assert [run.name for run in comparison.group.finished] == ["new-bptt"]
    said = (
        "not in the table: new-sltt (SLTT) is interrupted; spiketrain resume new-sltt --runs"
        f" {runs_dir}\n"
    )
    assert said in text_of(comparison, width=NO_WIDTH)
    assert comparison.to_json()["unfinished"] == [
        {"run": "new-sltt", "rule": "SLTT", "state": "interrupted"}
    ]


def test_what_diverged_has_its_row_and_divides_nothing(make_run: Callable, runs_dir: Path):
    make_all(
        make_run,
        {
            "bptt": {},
            "sltt-0": {"rule": "SLTT", "top1": 0.8},
            "sltt-1": {"rule": "SLTT", "seed": 1, "end": "diverged"},
            "sltt-k1": {"rule": "SLTT-1", "end": "diverged"},
        },
    )
    comparison = compare(runs_dir)
    text = text_of(comparison)
    assert re.search(r"SLTT \(1 of 2 runs, 1 diverged\) +80.00% +×0.89 ", text)
    assert re.search(r"SLTT-1 +diverged +- +- +-\n", text)
    assert (
        "sltt-k1 (SLTT-1) diverged: its figures and ratios compare no rules; lower " in text
        and "resume" not in text
    )
    assert "for every rule, and train again" in " ".join(text.split())
    told = comparison.to_json()
    assert [run["run"] for run in told["runs"]] == ["bptt", "sltt-0"] and told["differences"] == []
    assert {run["run"]: run["state"] for run in told["unfinished"]} == {
        "sltt-1": "diverged",
        "sltt-k1": "diverged",
    }


def test_seeds_that_did_not_diverge_do_not_speak_for_one_that_did(
    make_run: Callable, runs_dir: Path
):
    for seed in range(3):
        make_all(
            make_run,
            {
                f"bptt-{seed}": {"seed": seed},
                f"sltt-{seed}": {
                    "seed": seed,
                    "rule": "SLTT",
                    "end": "diverged" if seed == 2 else "finish",
                },
            },
        )
    make_run("sltt-9", seed=9, rule="SLTT", end="diverged")  # of a seed that BPTT has not
    elsewhere = {"cpu": "another", "cores": 2, "gpu": "none"}
    make_run("ottt-far", rule="OTTT", seed=1, end="diverged", hardware=elsewhere)
    for seed in (0, 2):
        make_run(f"ottt-{seed}", rule="OTTT", seed=seed)
    comparison = compare(runs_dir)
    [told_of_ottt] = [
        each for each in comparison.to_json()["differences"] if each["rule"] == "OTTT"
    ]
    assert (told_of_ottt["diverged"], told_of_ottt["verdict"]) == (
        0,
        "holds",
    )  # what a machine of its own diverged on
    said = text_of(comparison, width=300)
    assert (
        "OTTT (2 runs)" in said
        and "ottt-far (OTTT) diverged, trained otherwise than these: it is in no mean" in said
    )
    [found] = [each for each in comparison.to_json()["differences"] if each["rule"] == "SLTT"]
    assert (found["seeds"], found["diverged"], found["verdict"]) == (2, 1, "fails")
    said = (
        "BPTT - SLTT: +0.00 points over 2 paired seeds of those that did not diverge, as 1 did, 95"
        " % interval"
    )
    assert said in " ".join(text_of(comparison, width=300).split())


def test_comparing_does_not_wait_for_torch():
    code = (
        "import sys, pipeline.report.suite; print(sorted({'torch', 'mlflow', 'ray'} &"
        " set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_named_runs_get_the_baseline_of_their_study(make_run: Callable, runs_dir: Path):
    make_all(make_run, {"bptt": {}, "sltt": {"rule": "SLTT"}, "ottt": {"rule": "OTTT"}})
    assert [run.name for run in compare(runs_dir, ["sltt"]).group.finished] == ["bptt", "sltt"]
    assert [
        run.name for run in compare(runs_dir, [runs_dir / "ottt", "bptt", "ottt"]).group.finished
    ] == [
        "bptt",
        "ottt",
    ]


@pytest.mark.parametrize("word", ["compare", "report"])
def test_many_names_are_looked_up_in_one_list(
    word: str,
    make_run: Callable,
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Of 500 runs, 50 that were named took seconds: each name had every folder listed and every
    journal opened.
    """
    names = [
        make_run(f"{rule}-{seed}", rule=rule, seed=seed).name
        for rule in ("BPTT", "SLTT")
        for seed in range(10)
    ]
    looks: Counter[str] = Counter()

    def counted(function: Callable) -> Callable:
        def look(*args: Any, **how: Any) -> Any:
            looks[function.__name__] += 1
            return function(*args, **how)

        return look

    look = counted(results.folders_in)
    for module in ("selection", "results"):
        monkeypatch.setattr(f"pipeline.report.{module}.folders_in", look)
    monkeypatch.setattr("pipeline.report.results.read_run", counted(results.read_run))
    monkeypatch.setattr("pipeline.report.page.write", lambda study, out: out)
    spiketrain = command(monkeypatch, capsys)

    def looks_for(*names: str) -> Counter[str]:
        looks.clear()
        code, _, error = spiketrain(word, *names, "--runs", str(runs_dir))
        assert code == 0, error
        return looks.copy()

    few, many = looks_for("BPTT-0", "SLTT-0"), looks_for(*names)
    assert few == many and many["read_run"] == len(names)


def beside(bptt: Mapping[str, Any] = MappingProxyType({}), /, **sltt: Any) -> dict[str, Any]:
    """A run of BPTT and one of SLTT."""
    return {"bptt": bptt, "sltt": {"rule": "SLTT", **sltt}}


def changed(before: dict[str, Any]) -> dict[str, Any]:
    """Two runs, of which SLTT's began otherwise than it ended."""
    about = {"trained_on": [before, trained()], "loader_threads": 1}
    return beside({"trained_on": [trained()], "loader_threads": 1}, **about)


def elsewhere(recipe: dict[str, Any], **summary: Any) -> dict[str, Any]:
    """Two runs of two studies."""
    return beside(seed=5, study="f" * 16, recipe=recipe, **summary)


SGD, NET = RECIPE["optimizer"], RECIPE["model"]
OTHER_NET = {"widths": [64, 256], "surrogate": {"value": "x.ATan", "kwargs": {}}}
OTHER_DATA = {"target": "pipeline.data.Fashion", "kwargs": {"path": "/elsewhere"}}
PAIR, DIFFER = ("bptt", "sltt"), "bptt and sltt differ in more than the rule and the seed: "
ONE_STEP = {
    name: {"rule": "SLTT-1", "recipe": {"rule": {"target": "SLTT", "kwargs": {"k": 1, **more}}}}
    for name, more in (("plain", {}), ("rescaled", {"rescale": True}))
}


@pytest.mark.parametrize(
    ("runs", "names", "said"),
    [
        # what changed on the way
        (
            changed(trained(workers=4, micro_batch=16)),
            (),
            f"{DIFFER}world_size: 2 and [4, 2]; micro_batch: 32 and [16, 32];",
        ),
        (
            changed(trained(cpu="another")),
            (),
            f'{DIFFER}hardware.cpu: "a cpu" and ["another", "a cpu"];',
        ),
        (changed({**trained(), "loader_threads": 4}), (), "loader_threads: 1 and [4, 1];"),
        (changed({**trained(), "own_cores": True}), (), "own_cores: false and [true, false];"),
        # other studies
        (elsewhere({"batch_size": 128}), PAIR, f"{DIFFER}batch_size: 64 and 128;"),
        (
            elsewhere({"optimizer": {**SGD, "kwargs": {"opt": "sgd", "lr": 0.2}}}),
            PAIR,
            f"{DIFFER}optimizer.lr: 0.1 and 0.2;",
        ),
        (
            elsewhere({"optimizer": {"target": "x.y", "kwargs": {"rate": 3}}}),
            PAIR,
            f'{DIFFER}optimizer: "timm.optim.create" and "x.y";',
        ),
        (
            elsewhere({"model": {**NET, "kwargs": OTHER_NET}}),
            PAIR,
            f'{DIFFER}model.widths[1]: 128 and 256; model.surrogate: "x.Sigmoid" and "x.ATan";',
        ),
        (
            elsewhere({"optimizer": {**SGD, "kwargs": {"opt": "sgd"}}}),
            PAIR,
            f'{DIFFER}optimizer.lr: 0.1 and "(absent)";',
        ),
        (
            elsewhere({"data": OTHER_DATA}, data_fingerprint="e" * 8),
            PAIR,
            f'{DIFFER}data_fingerprint: "dddddddd" and "eeeeeeee";',
        ),
        (elsewhere({"init": "/a/run"}), PAIR, f'{DIFFER}init: null and "/a/run";'),
        (elsewhere({}), PAIR, f'{DIFFER}study: "0123456789abcdef" and "ffffffffffffffff";'),
        (elsewhere({f"field{i}": i for i in range(9)}), PAIR, "; and 3 more"),
        # other machines
        (beside(world_size=4), (), "world_size: 2 and 4"),
        (
            beside(hardware={"cpu": "another", "cores": 2, "gpu": "none"}),
            (),
            'hardware.cpu: "a cpu" and "another"',
        ),
        # one label for two rules
        ({"bptt": {}, **ONE_STEP}, ("bptt", *ONE_STEP), 'rule.rescale: "(absent)" and true'),
        # nothing to compare
        ({}, (), "it has 0 runs, of which 0 trials finished"),
        ({"a": {"end": "failed"}}, (), "it has 1 run, of which 0 trials finished"),
        ({"a": {"end": "failed"}}, ("a",), "no finished run: a is failed"),
        ({"a": {}}, ("zz",), "no run 'zz'"),
        ({"a": {}, "b": {"study": "0" * 16}}, ("0",), f"several study keys: {'0' * 16}, {STUDY}"),
    ],
)
def test_what_is_refused_is_one_line(
    make_run: Callable, runs_dir: Path, runs: dict[str, Any], names: tuple[str, ...], said: str
):
    make_all(make_run, runs)
    with pytest.raises(ReportError) as caught:
        compare(runs_dir, names)
    line = str(caught.value)
    assert said in line and "path" not in line and len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ("runs", "names", "pattern", "absent"),
    [
        ({"a": {"rule": "ADJOINT"}, "z": {}}, (), "BPTT .*\nADJOINT ", "cpu"),
        (
            beside({"commits": ["abc"]}, commits=["abc", "def"]),
            (),
            "different commits: abc, def",
            "cpu",
        ),
        (
            {"sltt": {"rule": "SLTT"}, "other": {"study": "f" * 16}},
            ("sltt",),
            "no baseline, no ratios: study 01234567 has no finished run of BPTT",
            "×",
        ),
        (
            beside({"world_size": 8}),
            ("sltt",),
            "no ratios: bptt does not stand comparison: world_size: 8 and 2",
            "×",
        ),
        (
            beside(
                {"images_per_s": None, "peak_saved_bytes": 0}, top1=math.nan, peak_saved_bytes=5
            ),
            (),
            r"SLTT +- +5 B +100 +3.3 min +×1.00",
            "nan",
        ),
        (
            beside(
                {"peak_saved_bytes": 12_345_000_000, "wall_s": 7384.0},
                peak_saved_bytes=12_345,
                wall_s=12.34,
            ),
            (),
            r"12.3[45] GB +×1.00 .* 2 h 03 min[^€]*12.3[45] kB +×1e-06 .* 12.3 s +×0.00167",
            "e+",
        ),
        (
            {"bptt-0": {"images_per_s": 31_111.0}, "bptt-1": {"seed": 1, "images_per_s": 31_357.0}},
            (),
            "31234[^€]*± 174",
            "e+",
        ),
    ],
)
def test_what_is_printed_of_runs(
    make_run: Callable,
    runs_dir: Path,
    runs: dict[str, Any],
    names: tuple[str, ...],
    pattern: str,
    absent: str,
):
    make_all(make_run, runs)
    text = text_of(compare(runs_dir, names))
    assert re.search(pattern, text) and absent not in text


def test_the_newest_study_is_none_of_trials(make_run: Callable, runs_dir: Path):
    """A launch with --tune that was stopped during its trials: they finished last."""
    make_run("bptt")
    for rate in (0.1, 0.3):
        make_run(
            f"bptt-lr-{rate}",
            study="f" * 16,
            recipe={"protocol": "trial", "tuned": ["optimizer.lr"]},
        )
    assert [run.name for run in compare(runs_dir).group.finished] == ["bptt"]
    (runs_dir / "bptt" / "summary.json").unlink()
    with pytest.raises(
        ReportError, match="no trial of a search; it has 3 runs, of which 2 trials finished"
    ):
        compare(runs_dir)


def test_a_prolonged_run_is_not_finished(make_run: Callable, runs_dir: Path):
    make_run("bptt")
    with RawJournal(make_run("sltt", rule="SLTT") / "journal.jsonl", attempt=1) as journal:
        journal.write(event("start", rule="SLTT", study=STUDY, step=100))
    comparison = compare(runs_dir)
    assert [run.name for run in comparison.group.finished] == ["bptt"]
    assert [run.folder.name for run in comparison.unfinished] == ["sltt"]


def test_two_tunings_of_the_baseline_are_no_one_baseline(make_run: Callable, runs_dir: Path):
    """--tune twice with other values: the tuned field is not in the study key."""

    def tuned(rate: float) -> dict[str, Any]:
        optimizer = {"target": "timm.optim.create", "kwargs": {"opt": "sgd", "lr": rate}}
        return {"protocol": "tuned", "tuned": ["optimizer.lr"], "optimizer": optimizer}

    make_all(
        make_run,
        {
            "bptt-a": {"recipe": tuned(0.1)},
            "bptt-b": {"seed": 1, "recipe": tuned(0.3)},
            "sltt": {"rule": "SLTT", "recipe": tuned(0.6)},
        },
    )
    said = (
        r"bptt-a and bptt-b differ in more than the rule and the seed: optimizer\.lr: 0\.1 and"
        r" 0\.3; name runs that agree"
    )
    for names in (["sltt"], []):
        with pytest.raises(ReportError, match=said):
            compare(runs_dir, names)
    with pytest.raises(ReportError, match=said):
        read_study(runs_dir, ["sltt"])
    assert [run.name for run in compare(runs_dir, ["sltt", "bptt-b"]).group.finished] == [
        "bptt-b",
        "sltt",
    ]
    make_all(
        make_run,
        {
            "bptt-c": {"seed": 2, "study": "f" * 16, "recipe": tuned(0.1)},
            "bptt-d": {"seed": 3, "study": "f" * 16, "recipe": tuned(0.1)},
            "ottt": {"rule": "OTTT", "study": "f" * 16, "recipe": tuned(0.3)},
        },
    )
    assert [run.name for run in compare(runs_dir, ["ottt"]).group.finished] == [
        "bptt-c",
        "bptt-d",
        "ottt",
    ]


def test_what_json_and_spreadsheets_have_no_place_for(
    make_run: Callable, runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    make_run("bptt", loss=0.5, images_per_s=None, peak_saved_bytes=0)
    lost = {
        "loss": math.nan,
        "top1": math.inf,
        "inference": {"energy_j": -math.inf},
        "trained": [1.0, math.nan],
    }
    make_run("sltt", rule="SLTT", **{**lost, "versions": {"x": "+x"}})
    print_comparison(runs_dir, format="json")

    def refuse(constant: str) -> float:
        raise AssertionError(f"not JSON: {constant}")

    [told] = json.loads(capsys.readouterr().out, parse_constant=refuse)
    bptt, sltt = told["runs"]
    assert (bptt["loss"], bptt["not_finite"]) == (0.5, {})
    assert (sltt["loss"], sltt["top1"], sltt["inference"], sltt["trained"]) == (
        None,
        None,
        {"energy_j": None},
        [1.0, None],
    )
    said = {"loss": "nan", "top1": "inf", "inference.energy_j": "-inf", "trained": "[1.0, nan]"}
    assert sltt["not_finite"] == said and sltt["ratios"]["wall_s"] == 1.0
    assert (sltt["ratios"]["peak_saved_bytes"], sltt["ratios"]["images_per_s"]) == (None, None)
    [_, row] = rows_of(compare(runs_dir))
    assert (row["loss"], row["not_finite.loss"], row["versions.x"]) == ("", "nan", "'+x")
    assert row["not_finite.inference.energy_j"] == "-inf"


def test_a_run_that_does_not_say_its_rule_is_of_an_unknown_one(make_run: Callable, runs_dir: Path):
    make_run("bptt")
    folder = make_run("old", rule="SLTT")
    told = json.loads((folder / "summary.json").read_text())
    del told["rule"]
    (folder / "summary.json").write_text(json.dumps({**told, "recipe": "=1+1"}))
    with RawJournal(folder / "journal.jsonl", attempt=1) as journal:
        journal.write(event("start", step=100))
        journal.write(event("finish", step=100))
    comparison = compare(runs_dir, ["bptt", "old"])
    _, old = comparison.to_json()["runs"]
    assert (old["rule"], old["behind"]["ratios_to"]) == (
        "unknown rule",
        "BPTT",
    ) and "unknown rule" in text_of(comparison)
    assert [(row["rule"], row["recipe"]) for row in rows_of(comparison)] == [
        ("BPTT", "bptt"),
        ("unknown rule", "'=1+1"),
    ]


def test_printing_in_each_format(
    make_run: Callable, runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    make_run("bptt")
    print_comparison(runs_dir)
    assert "saved bytes" in capsys.readouterr().out
    print_comparison(runs_dir, [str(runs_dir / "bptt")], format="json")
    assert [each["baseline"] for each in json.loads(capsys.readouterr().out)] == ["bptt"]
    print_comparison(runs_dir, format="csv")
    assert capsys.readouterr().out.startswith("run,rule,seed,study,where,")


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
    reach = (
        4.302653 * math.sqrt(sum((x - 0.5) ** 2 for x in [0.5, 0.9, 0.1]) / 2) / math.sqrt(3)
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
        make_all(
            make_run,
            {
                f"b{seed}": {"seed": seed, "top1": bptt},
                f"s{seed}": {"seed": seed, "rule": "SLTT", "top1": sltt},
                f"o{seed}": {"seed": seed, "rule": "OTTT-A", "top1": ottt},
            },
        )
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
