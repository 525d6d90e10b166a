"""What a summary says of the conditions that its figures hold under."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from pipeline.models.mlp import mlp
from pipeline.recipe.recipe import spec
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.train.metadata import conditions
from tests.helpers.small import small_recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rule", "steps"),
    [(BPTT(), 3), (BPTT(chunk=2), 2), (BPTT(chunk=9), 3), (SLTT(), 1), (SLTT(chunk=3), 3)],
)
def test_how_many_steps_a_forward_takes(rule: Rule, steps: int) -> None:
    assert conditions(nn.Linear(1, 1), rule, small_recipe(), CPU)["steps_per_forward"] == steps


def test_a_cpu_gives_the_same_bits_again() -> None:
    assert conditions(nn.Linear(1, 1), BPTT(), small_recipe(), CPU)["exact"] == "yes"


def test_they_are_read_off_the_network() -> None:
    def told(network: nn.Module, **changes: Any) -> list[str | int]:
        found = conditions(network, BPTT(), small_recipe(**changes), CPU)
        return [found[name] for name in ("reset_gradient", "norm_over", "precision")]

    assert told(nn.Linear(1, 1)) == ["none", "none", "fp32"]
    assert told(nn.Sequential(LIF(), BatchNorm(2)), precision="bf16") == [
        "detached",
        "step",
        "bf16",
    ]
    both = nn.Sequential(LIF(), LIF(reset_gradient="kept"), BatchNorm(2, over="time"))
    assert told(both) == ["detached, kept", "time", "fp32"]
    assert told(nn.Sequential(nn.BatchNorm2d(2), BatchNorm(2)))[1] == "step, time (BatchNorm2d)"
    assert told(nn.Sequential(BatchNormAct2d(2)))[1] == "time (BatchNormAct2d)"
    assert told(
        spec(mlp, in_features=4, hidden=(2,), neuron=spec(LIF, reset_gradient="kept")).build()
    ) == [
        "kept",
        "none",
        "fp32",
    ]
