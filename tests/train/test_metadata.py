"""What a run writes about itself: conditions, times, machines."""

import json
from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from pipeline.measure.memory import combine_hardware, hardware
from pipeline.measure.meters import Totals
from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import spec
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.kernels import operators
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.train.evaluation import Evaluation
from pipeline.train.job import Job, RankInfo
from pipeline.train.metadata import conditions, summarise
from pipeline.train.worker import run
from tests.helpers.events import event
from tests.helpers.processes import run_ranks
from tests.helpers.small import events, make_run, small_recipe

CPU = torch.device("cpu")
KEPT = spec(mlp, in_features=4, hidden=(2,), neuron=spec(LIF, reset_gradient="kept"))
RESULT = Evaluation(samples=1, top1=1.0, top5=1.0, loss=0.0, firing_rate=0.0)


@pytest.mark.parametrize(
    ("rule", "steps"),
    [(BPTT(), 3), (BPTT(chunk=2), 2), (BPTT(chunk=9), 3), (SLTT(), 1), (SLTT(chunk=3), 3)],
)
def test_how_many_steps_a_forward_takes(rule: Rule, steps: int) -> None:
    found = conditions(nn.Linear(1, 1), rule, small_recipe(), CPU)
    assert (found["steps_per_forward"], found["exact"]) == (steps, "yes")


@pytest.mark.parametrize(
    ("network", "precision", "reset_gradient", "norm_over"),
    [
        (nn.Linear(1, 1), "fp32", "none", "none"),
        (nn.Sequential(LIF(), BatchNorm(2)), "bf16", "detached", "step"),
        (
            nn.Sequential(LIF(), LIF(reset_gradient="kept"), BatchNorm(2, over="time")),
            "fp32",
            "detached, kept",
            "time",
        ),
        (
            nn.Sequential(nn.BatchNorm2d(2), BatchNorm(2)),
            "fp32",
            "none",
            "step, time (BatchNorm2d)",
        ),
        (nn.Sequential(BatchNormAct2d(2)), "fp32", "none", "time (BatchNormAct2d)"),
        (KEPT.build(), "fp32", "kept", "none"),
    ],
)
def test_they_are_read_off_the_network(
    network: nn.Module, precision: str, reset_gradient: str, norm_over: str
) -> None:
    wanted = {"reset_gradient": reset_gradient, "norm_over": norm_over, "precision": precision}
    found = conditions(network, BPTT(), small_recipe(precision=precision), CPU)
    assert found.items() >= wanted.items()


def test_they_name_the_kernel_of_the_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*neurons: nn.Module, device: str = "cpu") -> object:
        about = BPTT(), small_recipe(), torch.device(device)
        return conditions(nn.Sequential(*neurons), *about)["neuron_kernel"]

    assert kernel(LIF()) == hardware(CPU)["kernels"] == "numba"
    assert kernel(LIF(kernel="eager")) == "eager"
    assert kernel(LIF(), LIF(kernel="eager")) == "eager, numba"
    assert kernel(nn.Linear(1, 1)) == "none"
    assert kernel(LIF(), device="cuda") == "triton"
    monkeypatch.setattr(operators, "_is_installed", lambda package: False)
    assert kernel(LIF()) == hardware(CPU)["kernels"] == "eager"


def test_start_up_is_part_of_the_wall_clock_and_not_of_net_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first attempt's first batch ends after 12 s, 2 of which an evaluation took, and it is
    lost after 25. The second is lost before its first batch, 4 s after it began and 3 after its
    start. The third's first batch ends after 9 s."""
    told = [
        event("start", attempt=0, time=105.0, began=100.0, commit="a"),
        event("first_batch", attempt=0, time=112.0, step=1, startup_s=10.0),
        event("step", attempt=0, time=125.0, step=3),
        event("start", attempt=1, time=201.0, began=200.0, commit="a"),
        event("died", attempt=1, time=204.0),
        event("start", attempt=2, time=307.0, began=300.0, commit="a"),
        event("first_batch", attempt=2, time=309.0, step=1, startup_s=9.0),
        event("step", attempt=2, time=387.0, step=9),
    ]
    monkeypatch.setattr("pipeline.train.metadata.time.time", lambda: 390.0)
    totals = Totals(batches=9, timed_batches=7, operation_samples=1)
    totals.seconds |= {"forward": 60.0, "evaluation": 20.0}
    found = summarise(RESULT, totals, told)
    assert [found[name] for name in ("wall_s", "startup_s", "net_s", "timed_batches")] == [
        25 + 4 + 90,
        10 + 1 + 9,
        80,
        7,
    ]


def test_what_machines_differ_in_is_told_with_how_many_have_it_whoever_is_rank_0() -> None:
    here, h100, a100 = hardware(CPU), {"gpu": "H100", "cores": 16}, {"gpu": "A100", "cores": 16}
    assert combine_hardware([here]) == combine_hardware([here] * 3) == here
    told = {"gpu": "A100 (1 of 3 workers) + H100 (2 of 3 workers)", "cores": 16}
    assert combine_hardware([h100, a100, h100]) == combine_hardware([a100, h100, h100]) == told
    assert combine_hardware([a100, h100, a100]) != told


@pytest.mark.distributed
def test_a_run_tells_of_both_its_workers_machines(tmp_path: Path) -> None:
    job = make_run(tmp_path / "run", small_recipe(backend="deepspeed", micro_batch=4, stop_after=1))
    run_ranks(_on_its_own, 2, tmp_path, job)
    [start] = events(tmp_path / "run", "start")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    wanted = {"cpu": "cpu 0 (1 of 2 workers) + cpu 1 (1 of 2 workers)", "gpu": "none"}
    for told in (start, summary, summary["trained_on"][0]):
        assert told["hardware"].items() >= wanted.items()


def _on_its_own(rank: int, ranks: int, job: Job) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cpu = {"model name": f"cpu {rank}"}
        patch.setattr("pipeline.measure.memory._proc_field", lambda _, field: cpu.get(field, "0"))
        run(job, RankInfo(rank, ranks))
