"""`spiketrain probe`, `sweep` and `plan` on recipe files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.cli.forecast import _threads
from pipeline.forecast.plan import plan
from pipeline.forecast.probe import probe
from pipeline.forecast.sweep import sweep
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.sltt import SLTT
from tests.helpers.small import Command, Done

RECIPE = """
from tests.helpers.small import small_recipe
from pipeline.recipe.recipe import spec
from pipeline.models.mlp import mlp

def recipe():
    return small_recipe(model=spec(mlp, in_features=64, hidden=(16,)))
"""
SEVERAL = """
from dataclasses import replace
from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from tests.helpers.small import small_recipe

def recipe():
    one = small_recipe(model=spec(mlp, in_features=64, hidden=(8,)), rule=spec(SLTT))
    bptt = replace(one, name="bptt", rule=spec(BPTT))
    rules = [one, bptt, replace(one, name="two", rule=spec(SLTT, k=2), seed=1)]
    return [*rules, replace(one, name="wide", init="@bptt", micro_batch=4)]
"""


@pytest.fixture(autouse=True)
def few_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rules in place of ten. One of them cannot train the network."""
    for forecast in (probe, sweep, plan):
        few = (spec(BPTT), spec(SLTT), spec(DSR))
        monkeypatch.setitem(forecast.__kwdefaults__ or {}, "rules", few)
    monkeypatch.setattr("pipeline.forecast.bench.RULES", (spec(BPTT),))  # of several recipes


@pytest.fixture
def done(spiketrain: Command) -> Done:
    def done(*words: str) -> str:
        code, out, err = spiketrain(*words)
        assert (code, err) == (0, "")
        return out

    return done


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(RECIPE)
    return str(tmp_path / "mine.py")


def test_probe(file: str, done: Done) -> None:
    out = done("probe", file, "--batch", "4")
    assert "measured on one batch of 4 samples, T = 3, before training" in out
    assert "temporal share" in out and "not in the tables:\n- DSR: every" in out
    found = json.loads(done("probe", file, "--format", "json"))
    assert {cost["rule"] for cost in found["costs"]} >= {"BPTT", "SLTT"} and found["advice"]


def test_sweep(file: str, done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = done("sweep", file, *["--steps", "2,4", "--batch", "auto", "--memory", "0.001"])
    assert "largest batch" in out and "times as many saved bytes at T = 4 as at T = 2" in out
    assert '"about": estimated' in out and "at largest" not in out
    assert 'without "about"' not in out
    out = done(
        "sweep", file, *["--steps", "4", "--batch", "auto", "--memory", "0.00006", "--at-largest"]
    )
    assert "images/s at largest" in out and 'without "about": trained, and fits; 0: one' in out
    found = json.loads(done("sweep", file, *["--steps", "2", "--batch", "4", "--format", "json"]))
    assert found["samples"] == 4 and found["commit"]


def test_plan(file: str, done: Done) -> None:
    words = ("plan", file, *["--device", "h100", "--price", "2"])
    out = " ".join(
        done(*words, *["--workers", "4", "--per-node", "2", "--node-gbps", "100"]).split()
    )
    assert all(each in out for each in ("estimated, not measured", "Fastest", "model at 40%"))
    assert "450 GB/s between cards, 100 Gb/s between nodes" in out
    found = json.loads(done(*words, "--format", "json"))
    assert {each["rule"] for each in found["rules"]} >= {"BPTT", "SLTT"}
    assert found["kind"] == "estimated, not measured"


@pytest.mark.parametrize(
    ("words", "once"),
    [
        ("probe", ["one batch of 8 samples", "one batch of 4 samples"]),
        ("sweep --steps 2", ["one batch of 8 samples", "one batch of 4 samples"]),
        ("plan --device h100", ["small, bptt, two: estimated", "wide: estimated"]),
    ],
)
def test_each_network_of_several_recipes_is_forecast_once_with_all_their_rules(
    words: str, once: list[str], file: str, done: Done
) -> None:
    Path(file).write_text(SEVERAL)
    verb, *more = words.split()
    out = done(verb, file, *more)
    assert [out.count(each) for each in once] == [1, 1]
    assert "small, bptt, two" in out and "\nwide" in out
    found = json.loads(done(verb, file, *more, "--format", "json"))
    rules = [re.findall(r'"rule": "([\w-]+)"', json.dumps(each)) for each in found]
    assert [each["recipe"] for each in found] == ["small, bptt, two", "wide"]
    assert list(map(set, rules)) == [{"BPTT", "SLTT", "SLTT-2"}, {"BPTT", "SLTT"}]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_plan_at_full_size_takes_less_than_a_minute_of_one_core_and_no_data() -> None:
    words = "plan recipes/imagenet/nf_resnet34_sltt.py --workers 64 --device h100 --format json"
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert sum(os.times()[2:4]) - sum(before[2:4]) < 60  # seconds of children
    found = json.loads(done.stdout)
    planned = {each["rule"]: each for each in found["rules"]}
    assert found["samples"] is None and done.stderr.count("counting a step of") == 10
    assert planned["SLTT"]["flops"] == planned["BPTT"]["flops"] == 512_475_856_896
    assert planned["SLTT"]["saved_bytes"] < planned["BPTT"]["saved_bytes"] / 4


def test_a_worker_gets_the_cores_that_a_launch_would_give_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One on a CPU; on a card its share of the node."""
    assert (_threads("auto"), _threads(3)) == (1, 3)
    monkeypatch.setattr("pipeline.core.cpu_affinity.cores_here", lambda: 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _threads("auto") == 8


MEMORY = "sweep: --memory is a limit in GB, from 1e-6 to 1e6, for --batch auto; got"
STEPS = "sweep: --steps must be numbers of time steps, such as 1,2,4,8; got"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("probe --batch 1000", None),
        ("sweep --steps 1,x", f"{STEPS} '1,x'"),
        ("sweep --steps 0", f"{STEPS} '0'"),
        (
            "sweep --batch 4 --at-largest",
            "sweep: --at-largest needs --batch auto; got --at-largest with --batch 4",
        ),
        (
            "sweep --at-largest",
            "sweep: --at-largest needs --batch auto; got --at-largest without --batch",
        ),
        ("sweep --batch none", "sweep: --batch must be a number of samples or auto; got none"),
        ("sweep --memory 3", f"{MEMORY} 3 without --batch"),
        ("sweep --memory inf --batch auto", f"{MEMORY} inf with --batch auto"),
        (
            "plan --device h1000",
            "plan: --device must be one of h100, h200, a100, v100, rtx4090; got h1000",
        ),
        (
            "plan --device v100 --set precision=bf16",
            "plan: V100 SXM2, 32 GB: precision must be fp32; got bf16",
        ),
    ],
)
def test_bad_use_ends_in_a_line(
    words: str, said: str | None, file: str, spiketrain: Command
) -> None:
    verb, *more = words.split()
    code, out, err = spiketrain(verb, file, *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said is None or err == f"{said}\n"
