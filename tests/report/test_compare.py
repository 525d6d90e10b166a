"""What `spiketrain compare` prints of runs that were made by hand, and which it refuses."""

import csv
import io
import json
import math
import re
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
from pipeline.report.study import FOLDED_ALONE, RECOMPUTES_NOTHING, Difference
from pipeline.report.suite import read_study
from tests.helpers.small import command
from tests.report.conftest import RECIPE, STUDY, compare, make_all


def text_of(comparison: Comparison, *, width: int = 120) -> str:
    out = io.StringIO()
    comparison.render(Console(file=out, width=width))
    return out.getvalue()


def printed(runs_dir: Path, *names: str, **how: Any) -> str:
    out = io.StringIO()
    print_comparison(runs_dir, names, **how, console=Console(file=out, width=120))
    return out.getvalue()


def rows_of(comparison: Comparison) -> list[dict[str, str]]:
    """The lines of its CSV."""
    return list(csv.DictReader(io.StringIO(csv_of([comparison.to_json()]))))


def ratios_of(comparison: Comparison, name: str) -> dict[str, float | None]:
    """The ratios of a quantity by the name of the run."""
    return {run["run"]: run["ratios"][name] for run in comparison.to_json()["runs"]}


def names_of(comparison: Comparison) -> list[str]:
    return [run.name for run in comparison.group.finished]


UNKNOWN = dict.fromkeys(("kept_bytes", "compute_s", "inference.energy_j", "inference.measured_j"))
CPU = {"cpu": "a cpu", "cores": 2, "gpu": "none"}


def trained(*, workers: int = 2, micro_batch: int = 32, cpu: str = "a cpu") -> dict[str, Any]:
    hardware = {**CPU, "cpu": cpu}
    return {"world_size": workers, "micro_batch": micro_batch, "hardware": hardware}


def test_costs_beside_the_baseline(make_run: Callable, runs_dir: Path):
    costs = {"top1": 0.81, "peak_saved_bytes": 2_000_000, "images_per_s": 150.0, "wall_s": 100.0}
    make_all(make_run, {"sltt": {"rule": "SLTT", **costs}, "bptt": {}})
    comparison = compare(runs_dir)
    assert (comparison.group.study, names_of(comparison)) == (STUDY, ["bptt", "sltt"])
    value = json.loads(json.dumps(comparison.to_json()))
    assert (value["study"], value["baseline"]) == (STUDY, "bptt")
    bptt, sltt = value["runs"]
    ones = {"top1": 1.0, "peak_saved_bytes": 1.0, "images_per_s": 1.0, "wall_s": 1.0}
    assert bptt["ratios"] == {**UNKNOWN, **ones}
    ratios = {"top1": 0.9, "peak_saved_bytes": 0.25, "images_per_s": 1.5, "wall_s": 0.5}
    assert sltt["ratios"] == {**UNKNOWN, **{k: pytest.approx(v) for k, v in ratios.items()}}
    assert sltt["hardware"] == CPU
    lines = text_of(comparison).splitlines()
    assert re.search(r"BPTT +90.00% +×1.00 +8 MB +×1.00 +100 +×1.00 +3.3 min +×1.00", lines[2])
    assert re.search(r"SLTT +81.00% +×0.90 +2 MB +×0.25 +150 +×1.50 +1.7 min +×0.50", lines[3])
    assert lines[5].split() == ["conditions", "of", "each", "rule"] and len(lines) == 11
    assert comparison.notes == (FOLDED_ALONE, RECOMPUTES_NOTHING)
    rows = rows_of(comparison)
    assert list(rows[0])[:4] == ["run", "rule", "seed", "study"]
    told = [(row["run"], row["ratios.peak_saved_bytes"], row["hardware.cpu"]) for row in rows]
    assert told == [("bptt", "1.0", "a cpu"), ("sltt", "0.25", "a cpu")]


def test_several_seeds_are_a_mean_and_a_spread(make_run: Callable, runs_dir: Path):
    for seed, top1 in enumerate((0.8, 0.9, 1.0)):
        make_run(f"bptt-{seed}", seed=seed, top1=top1)
    for seed, top1 in enumerate((0.7, 0.74)):
        make_run(f"sltt-{seed}", rule="SLTT", seed=seed, top1=top1, wall_s=None)
    comparison = compare(runs_dir, [STUDY[:6]])
    patterns = (
        r"BPTT \(3 runs\) +90.00% +×1.00 ",
        r"^ +± 10.00% +± 0 MB +± 0 +± 0.0 min$",
        r"SLTT \(2 runs\) +72.00% +×0.85 .* -$",
        r"^ +± 2.83%",
    )
    for line, pattern in zip(text_of(comparison).splitlines()[2:6], patterns, strict=True):
        assert re.search(pattern, line.rstrip())
    assert comparison.to_json()["baseline_runs"] == ["bptt-0", "bptt-1", "bptt-2"]
    top1 = list(ratios_of(comparison, "top1").values())
    assert top1 == pytest.approx([1, 1, 1, 0.7 / 0.8, 0.74 / 0.9])
    assert ratios_of(comparison, "wall_s")["sltt-1"] is None


SLOW = {"steady_forward_s": 0.04, "steady_backward_s": 0.08}
FAST = {"steady_forward_s": 0.04, "steady_backward_s": 0.02}


def test_time_is_divided_by_the_faster_bptt(make_run: Callable, runs_dir: Path):
    stepped = {"rule": "BPTT-chunk-1", **FAST, "wall_s": 100.0, "images_per_s": 200.0}
    sltt = {"rule": "SLTT", "wall_s": 50.0, "peak_saved_bytes": 2_000_000}
    make_all(make_run, {"bptt": SLOW, "stepped": stepped, "sltt": sltt})
    comparison = compare(runs_dir, ["sltt"])
    assert names_of(comparison) == ["bptt", "stepped", "sltt"]
    divided = (
        "images/s, wall clock and compute time are divided by those of BPTT-chunk-1, the faster"
        " BPTT"
    )
    assert comparison.notes == (RECOMPUTES_NOTHING, divided)
    value = comparison.to_json()
    assert (value["baseline"], value["time_baseline"]) == ("bptt", "BPTT-chunk-1")
    ratios = {**UNKNOWN, "top1": 1.0, "peak_saved_bytes": 1.0, "images_per_s": 0.5, "wall_s": 2.0}
    assert value["runs"][0]["ratios"] == {**ratios, "compute_s": pytest.approx(2.0)}
    assert value["runs"][2]["ratios"] == {**ratios, "peak_saved_bytes": 0.25, "wall_s": 0.5}
    row = r"SLTT +90.00% +×1.00 +2 MB +×0.25 +100 +×0.50 +50.0 s +×0.50"
    assert re.search(row, text_of(comparison))
    told = [(row["ratios.wall_s"], row["time_baseline"]) for row in rows_of(comparison)]
    assert told == [(ratio, "BPTT-chunk-1") for ratio in ("2.0", "1.0", "0.5")]
    # naming the slower one does not hide the faster
    for names in (["sltt", "bptt"], ["bptt", "sltt", "stepped"]):
        assert compare(runs_dir, names).to_json() == value
        shown = read_study(runs_dir, names).study.runs
        assert {run.name for run in shown} == {"bptt", "stepped", "sltt"}


def test_the_choices_that_decide_a_comparison_stand_in_every_row(
    make_run: Callable, runs_dir: Path
):
    choices = {"reset_gradient": "detached", "norm_over": "step", "precision": "bf16"}
    split = {"trained_on": [trained(micro_batch=16)]}

    def told(steps: int, **recipe: Any) -> dict[str, Any]:
        conditions = {**choices, "steps_per_forward": steps}
        return {"recipe": {"time_steps": 6, **recipe}, "conditions": conditions, **split}

    recompute = {"target": "x", "kwargs": {"recompute": True}}
    make_all(
        make_run,
        {
            "bptt": {**SLOW, **told(6)},
            "stepped": {"rule": "BPTT-chunk-1", **FAST, **told(1)},
            "sltt": {"rule": "SLTT", **told(1)},
            "recompute": {"rule": "BPTT-recompute", **told(1, rule=recompute)},
            "old": {"rule": "OTTT-A", **split},
        },
    )
    comparison = compare(runs_dir)
    same, last = ["BPTT", "BPTT-chunk-1", *choices.values()], ["16 × 2", "not known"]
    rows = [re.split(r"  +", line.strip()) for line in text_of(comparison).splitlines()]
    for row in (
        ["SLTT", *same, "step by step", *last],
        ["BPTT-recompute", *same, "step by step, recomputed", *last],
        ["BPTT", *same, "folded", *last],
        ["OTTT-A", *same[:2], *4 * ["not known"], *last],
    ):
        assert row in rows
    names = (
        "ratios_to",
        "time_ratios_to",
        "reset_gradient",
        "norm_statistics",
        "precision",
    )
    expected = dict(zip(names, same, strict=True), micro_batch=last[0], evaluated=last[1])
    runs = {run["run"]: run["behind"] for run in comparison.to_json()["runs"]}
    assert runs["bptt"] == {**expected, "over_time": "folded"}
    assert runs["sltt"] == {**expected, "over_time": "step by step"}
    in_csv = {row["behind.reset_gradient"] for row in rows_of(comparison)}
    assert in_csv == {"detached", "not known"}


ELSEWHERE = {"hardware": {**CPU, "cpu": "another cpu"}}


@pytest.fixture
def two_machines(make_run: Callable) -> list[Path]:
    """Seed 1 was finished on another machine, and there with another number of workers by one rule;
    a run failed.
    """
    return make_all(
        make_run,
        {
            "bptt-0": {"wall_s": 100.0},
            "sltt-0": {"rule": "SLTT", "wall_s": 50.0},
            "bptt-1": {"seed": 1, "wall_s": 400.0, **ELSEWHERE},
            "sltt-1": {"rule": "SLTT", "seed": 1, "wall_s": 300.0, **ELSEWHERE},
            "ottt-1": {"rule": "OTTT", "seed": 1, "wall_s": 10.0, "world_size": 1, **ELSEWHERE},
            "dsr-0": {"rule": "DSR", "end": "failed"},
        },
    )


def test_runs_of_different_machines_are_shown_apart_and_never_divided_by_one_another(
    two_machines: list[Path], runs_dir: Path
):
    found = comparisons(runs_dir, two_machines)
    assert [(each.where, ratios_of(each, "wall_s")) for each in found] == [
        ("a cpu, 2 cores; 2 workers", {"bptt-0": 1.0, "sltt-0": 0.5}),
        ("another cpu, 2 cores; 2 workers", {"bptt-1": 1.0, "sltt-1": 0.75}),
        ("another cpu, 2 cores; 1 worker", {"ottt-1": None}),
    ]
    assert [[run.name for run in each.unfinished] for each in found] == [["dsr-0"], [], []]
    assert found[2].to_json()["baseline"] is None

    shown = printed(runs_dir, folders=two_machines)
    for said in (
        "study 01234567 on a cpu, 2 cores; 2 workers",
        "×0.75",
        "no baseline, no ratios: bptt-0 is not comparable: ",
        "study 01234567 has 3 tables for different training conditions: no table has ratios to"
        " another table",
    ):
        assert said in shown
    for names in ([], [STUDY[:6]]):
        assert sorted(printed(runs_dir, *names).splitlines()) == sorted(shown.splitlines())


def test_the_last_line_is_the_answer(make_run: Callable, runs_dir: Path):
    steady = {"steady_forward_s": 0.01, "steady_backward_s": 0.02}
    sltt = {"rule": "SLTT", "top1": 0.9, "wall_s": 90.0, "startup_s": 30.0}
    make_run("sltt", peak_saved_bytes=2_000_000, **sltt, **steady)
    alone = "SLTT: 90.00% top-1, 2 MB saved for backward, 1.0 min of training"
    assert printed(runs_dir, "sltt").splitlines()[-1] == alone
    make_run("bptt", top1=0.91, peak_saved_bytes=8_000_000, **steady)
    answer = "SLTT used 25 % of BPTT's memory and 100 % of its time at -1.0 points (one seed)"
    assert printed(runs_dir).splitlines()[-1] == answer


def test_json_and_csv_have_what_the_tables_have(
    two_machines: list[Path], runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """A list of comparisons, and lines that say where: of one machine or three, and likewise of
    runs that are named.
    """

    def told(format: Any, *names: str) -> Any:
        print_comparison(runs_dir, names, format=format)
        out = capsys.readouterr().out
        return json.loads(out) if format == "json" else list(csv.DictReader(io.StringIO(out)))

    expected = [each.to_json() for each in comparisons(runs_dir, sorted(two_machines))]
    lines = [
        (
            run["run"],
            each["where"],
            each["time_baseline"] or "",
            str(run["ratios"]["wall_s"] or ""),
        )
        for each in expected
        for run in each["runs"]
    ]
    columns = ("run", "where", "time_baseline", "ratios.wall_s")
    for names in ([], [STUDY[:6]]):
        assert told("json", *names) == expected
        rows = told("csv", *names)
        assert [tuple(row[name] for name in columns) for row in rows] == lines
        assert {row["study"] for row in rows} == {STUDY}
    assert told("json", "bptt-1", "sltt-1") == [{**expected[1], "where": None}]
    assert [row["where"] for row in told("csv", "bptt-1", "sltt-1")] == ["", ""]


def test_what_may_not_be_compared_is_raised_after_what_may(
    make_run: Callable, runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    folders = make_all(make_run, {"bptt": {}, "lost": {"study": "f" * 16, "end": "failed"}})
    for format in ("json", "csv"):
        for some, said in ((folders, "bptt"), (folders[1:], "")):
            with pytest.raises(ReportError, match="no finished run: lost is failed"):
                print_comparison(runs_dir, folders=some, format=format)
            out = capsys.readouterr().out
            assert said in out and bool(out) == bool(said)


def test_a_halved_micro_batch_is_not_compared_with_a_whole_one(make_run: Callable, runs_dir: Path):
    halved = {"peak_saved_bytes": 4_000_000, "trained_on": [trained(micro_batch=16)]}
    sltt = {"rule": "SLTT", "peak_saved_bytes": 2_000_000, "trained_on": [trained()]}
    folders = make_all(make_run, {"bptt": halved, "sltt": sltt})
    apart = "micro_batch: 16 and 32"
    with pytest.raises(ReportError, match=f"differ in more than the rule and the seed: {apart}"):
        compare(runs_dir)
    first, second = comparisons(runs_dir, folders)
    where = "a cpu, 2 cores; 2 workers"
    assert (first.where, second.where) == (f"{where}, in micro-batches of 16", where)
    assert ratios_of(second, "peak_saved_bytes") == {"sltt": None}
    assert second.notes == (f"no baseline, no ratios: bptt is not comparable: {apart}",)


@pytest.mark.parametrize(
    ("bptt", "sltt", "told", "shown", "absent"),
    [
        (
            {**SLOW, "inference": {"energy_j": 4e-6}},
            {"steady_forward_s": 0.03, "steady_backward_s": 0.03, "inference": {"energy_j": 1e-6}},
            {"compute_s": (0.06, 0.5), "inference.energy_j": (1e-6, 0.25)},
            r"compute time +inference energy\n(?s:.*)SLTT .* 60 ms +×0.50 +1 µJ +×0.25",
            "measured",
        ),
        (
            {"inference": {"energy_j": 4e-6, "measured_j": 0.02}},
            {"inference": {"energy_j": 1e-6, "measured_j": 0.015}},
            {"inference.measured_j": (0.015, 0.75)},
            r"inference energy +joules of an inference, measured\n"
            r"(?s:.*)SLTT .* 1 µJ +×0.25 +15 mJ +×0.75",
            "states",
        ),
        (
            {"state_bytes": 2_000_000},
            {"peak_saved_bytes": 2_000_000, "state_bytes": 3_000_000},
            {"kept_bytes": (5_000_000, 0.5), "peak_saved_bytes": (2_000_000, 0.25)},
            r"saved bytes +saved bytes and states(?s:.*)SLTT .* 2 MB +×0.25 +5 MB +×0.50 ",
            "energy",
        ),
    ],
)
def test_what_was_measured_has_its_column_in_each_format(
    make_run: Callable,
    runs_dir: Path,
    bptt: dict[str, Any],
    sltt: dict[str, Any],
    told: dict[str, tuple[float, float]],
    shown: str,
    absent: str,
):
    make_all(make_run, {"bptt": bptt, "sltt": {"rule": "SLTT", **sltt}})
    comparison = compare(runs_dir)
    text, (_, row) = text_of(comparison, width=200), rows_of(comparison)
    assert re.search(shown, text) and absent not in text
    found = results.flat(comparison.to_json()["runs"][1])
    for name, (value, ratio) in told.items():
        assert (found[name], found[f"ratios.{name}"]) == (value, ratio)
        assert (float(row[name]), float(row[f"ratios.{name}"])) == (value, ratio)


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
    assert (comparison.group.study, names_of(comparison)) == ("f" * 16, ["new-bptt"])
    resume = f"spiketrain resume new-sltt --runs {runs_dir}\n"
    said = f"not in the table: new-sltt (SLTT) is interrupted; {resume}"
    assert said in text_of(comparison, width=NO_WIDTH)
    [unfinished] = comparison.to_json()["unfinished"]
    assert unfinished == {"run": "new-sltt", "rule": "SLTT", "state": "interrupted"}


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
    text = text_of(comparison, width=NO_WIDTH)
    assert re.search(r"SLTT \(1 of 2 runs, 1 diverged\) +80.00% +×0.89 ", text)
    assert re.search(r"SLTT-1 +diverged +- +- +-\n", text) and "resume" not in text
    why = "sltt-k1 (SLTT-1) diverged: a comparison of rules must not use its values; lower "
    assert re.search(f"{re.escape(why)}.* for every rule, and train again", text)
    value = comparison.to_json()
    assert (names_of(comparison), value["differences"]) == (["bptt", "sltt-0"], [])
    assert {run["run"]: run["state"] for run in value["unfinished"]} == {
        "sltt-1": "diverged",
        "sltt-k1": "diverged",
    }


def test_seeds_that_did_not_diverge_do_not_speak_for_one_that_did(
    make_run: Callable, runs_dir: Path
):
    ends = {0: "finish", 1: "finish", 2: "diverged"}
    runs = {
        **{f"bptt-{seed}": {"seed": seed} for seed in ends},
        **{f"sltt-{seed}": {"seed": seed, "rule": "SLTT", "end": ends[seed]} for seed in ends},
        **{f"ottt-{seed}": {"seed": seed, "rule": "OTTT"} for seed in (0, 2)},
        "sltt-9": {"seed": 9, "rule": "SLTT", "end": "diverged"},  # of a seed that BPTT has not
        "ottt-far": {"seed": 1, "rule": "OTTT", "end": "diverged", **ELSEWHERE},
    }
    make_all(make_run, runs)
    comparison = compare(runs_dir)
    told = {each["rule"]: each for each in comparison.to_json()["differences"]}
    judged = {
        rule: (each["seeds"], each["diverged"], each["verdict"]) for rule, each in told.items()
    }
    assert judged == {"SLTT": (2, 1, "fails"), "OTTT": (2, 0, "holds")}
    text = text_of(comparison, width=300)
    for said in (
        "OTTT (2 runs)",
        "ottt-far (OTTT) diverged under other conditions",
        "BPTT - SLTT: +0.00 points over 2 paired seeds (1 more diverged), 95 % interval",
    ):
        assert said in text


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
    seeds = {f"{rule}-{seed}": (rule, seed) for rule in ("BPTT", "SLTT") for seed in range(10)}
    make_all(make_run, {name: {"rule": rule, "seed": seed} for name, (rule, seed) in seeds.items()})
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

    few, many = looks_for("BPTT-0", "SLTT-0"), looks_for(*seeds)
    assert few == many and many["read_run"] == len(seeds)


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
        ({}, (), "got 0 runs, of which 0 trials finished"),
        ({"a": {"end": "failed"}}, (), "got 1 run, of which 0 trials finished"),
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
            beside({"start": {"commit": "abc"}}, start={"commit": "def"}),
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
            "no ratios: bptt is not comparable: world_size: 8 and 2",
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
            r"12.3[45] GB +×1.00 .* 2 h 03 min(?s:.*)12.3[45] kB +×1e-06 .* 12.3 s +×0.00167",
            "e+",
        ),
        (
            {"bptt-0": {"images_per_s": 31_111.0}, "bptt-1": {"seed": 1, "images_per_s": 31_357.0}},
            (),
            "31234(?s:.*)± 174",
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
    trial = {
        "study": "f" * 16,
        "recipe": {"protocol": "trial", "tuned": ["optimizer.lr"]},
    }
    make_all(make_run, {"bptt": {}, "bptt-lr-0.1": trial, "bptt-lr-0.3": trial})
    assert names_of(compare(runs_dir)) == ["bptt"]
    (runs_dir / "bptt" / "summary.json").unlink()
    said = "no trial of a search; got 3 runs, of which 2 trials finished"
    with pytest.raises(ReportError, match=said):
        compare(runs_dir)


def test_two_tunings_of_the_baseline_are_no_one_baseline(make_run: Callable, runs_dir: Path):
    """--tune twice with other values: the tuned field is not in the study key."""

    def tuned(rate: float, **about: Any) -> dict[str, Any]:
        optimizer = {"target": "timm.optim.create", "kwargs": {"opt": "sgd", "lr": rate}}
        fields = {"protocol": "tuned", "tuned": ["optimizer.lr"], "optimizer": optimizer}
        return {**about, "recipe": fields}

    make_all(
        make_run,
        {
            "bptt-a": tuned(0.1),
            "bptt-b": tuned(0.3, seed=1),
            "sltt": tuned(0.6, rule="SLTT"),
            "bptt-c": tuned(0.1, seed=2, study="f" * 16),
            "bptt-d": tuned(0.1, seed=3, study="f" * 16),
            "ottt": tuned(0.3, rule="OTTT", study="f" * 16),
        },
    )
    said = (
        r"bptt-a and bptt-b differ in more than the rule and the seed: optimizer\.lr: 0\.1 and"
        r" 0\.3; name runs that agree"
    )
    for look, names in ((compare, ["sltt"]), (compare, [STUDY]), (read_study, ["sltt"])):
        with pytest.raises(ReportError, match=said):
            look(runs_dir, names)
    assert names_of(compare(runs_dir, ["sltt", "bptt-b"])) == ["bptt-b", "sltt"]
    assert names_of(compare(runs_dir, ["ottt"])) == ["bptt-c", "bptt-d", "ottt"]


def test_what_json_and_spreadsheets_have_no_place_for(
    make_run: Callable, runs_dir: Path, capsys: pytest.CaptureFixture[str]
):
    lost = {
        "loss": math.nan,
        "top1": math.inf,
        "inference": {"energy_j": -math.inf},
        "trained": [1.0, math.nan],
    }
    bptt = {"loss": 0.5, "images_per_s": None, "peak_saved_bytes": 0}
    make_all(make_run, {"bptt": bptt, "sltt": {"rule": "SLTT", **lost, "versions": {"x": "+x"}}})
    print_comparison(runs_dir, format="json")

    def refuse(constant: str) -> float:
        raise AssertionError(f"not JSON: {constant}")

    [told] = json.loads(capsys.readouterr().out, parse_constant=refuse)
    bptt, sltt = told["runs"]
    assert (bptt["loss"], bptt["not_finite"]) == (0.5, {})
    assert {name: sltt[name] for name in lost} == {
        "loss": None,
        "top1": None,
        "inference": {"energy_j": None},
        "trained": [1.0, None],
    }
    said = {"loss": "nan", "top1": "inf", "inference.energy_j": "-inf", "trained": "[1.0, nan]"}
    assert sltt["not_finite"] == said
    ratios = {"wall_s": 1.0, "peak_saved_bytes": None, "images_per_s": None}
    assert {name: sltt["ratios"][name] for name in ratios} == ratios
    [_, row] = rows_of(compare(runs_dir))
    assert (row["loss"], row["not_finite.loss"], row["versions.x"]) == ("", "nan", "'+x")
    assert row["not_finite.inference.energy_j"] == "-inf"


@pytest.mark.parametrize(
    ("options", "out"),
    [
        ((), "^study 01234567\n.*saved bytes"),
        (
            ("--format", "json"),
            r'^\[\n  \{\n    "study": "0123456789abcdef",(?s:.*)"baseline": "bptt"',
        ),
        (("--format", "csv"), "^run,rule,seed,study,where,"),
        (("--format", "xml"), "^$"),
    ],
)
def test_printing_in_each_format(
    make_run: Callable,
    runs_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    out: str,
):
    make_run("bptt")
    code, said, error = command(monkeypatch, capsys)("compare", "--runs", str(runs_dir), *options)
    assert re.search(out, said) and code == (2 if "xml" in options else 0), error


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.5, 0.7, "holds"), (0.71, 2.0, "fails"), (0.1, 0.9, "is undecided"), (-3, -2, "holds")],
)
def test_verdicts(low: float, high: float, verdict: str):
    mean = (low + high) / 2
    found = Difference(baseline="BPTT", rule="SLTT", seeds=3, mean=mean, low=low, high=high)
    assert found.verdict(0.7) == verdict
    assert found.text(0.7).endswith(f"the claim (at most 0.7 points below) {verdict}")


def test_the_table_says_which(make_run: Callable, runs_dir: Path):
    top1 = {
        "BPTT": (0.91, 0.92, 0.90),
        "SLTT": (0.909, 0.919, 0.8995),
        "OTTT-A": (0.89, 0.90, 0.88),
    }
    for rule, values in top1.items():
        for seed, value in enumerate(values):
            make_run(f"{rule}-{seed}", rule=rule, seed=seed, top1=value)
    verdicts = {each.rule: each.verdict(0.7) for each in compare(runs_dir).group.differences}
    assert verdicts == {"SLTT": "holds", "OTTT-A": "fails"}
    other = compare(runs_dir, against="OTTT-A")
    assert names_of(other)[0] == "OTTT-A-0"
    told = [(each["rule"], each["verdict"]) for each in other.to_json()["differences"]]
    assert told == [("BPTT", "holds"), ("SLTT", "holds")]
    assert other.to_json()["differences"][0]["mean"] == pytest.approx(-2)
