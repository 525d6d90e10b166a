"""Kernels of a batch and the bytes that they move, on tensors without values, against a budget.

They are those of `plan`: forward and backward of 32 images in bf16, without the optimizer; a fused
kernel is one. A change that needs more raises the budget on purpose, and one that needs less lowers
it, so that no other change loses it again.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pipeline.forecast.step_counts import FakeBench, count_rule
from pipeline.recipe.recipe import spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT

BUDGET: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "golden" / "kernels.json").read_text()
)
RULES = {"BPTT": spec(BPTT), "SLTT": spec(SLTT), "OTTT-A": spec(OTTT, readout="plain")}
TOLERANCE = 0.02


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.full] if name.startswith("qkformer") or "OTTT" in name else []
        )
        for name in BUDGET
    ],
)
def test_a_batch_keeps_to_its_budget(name: str) -> None:
    file, rule = name.split()
    recipe = import_module(f"recipes.imagenet.{file}").recipe()
    changes = {"precision": "bf16", "batch_size": 32, "time_steps": BUDGET[name]["T"]}
    recipe = recipe.override(changes)
    counts = count_rule(FakeBench(recipe, 32), RULES[rule])
    kernels, gigabytes = counts.kernel_log.kernels, counts.kernel_log.bytes / 1e9
    for found, budget in ((kernels, BUDGET[name]["kernels"]), (gigabytes, BUDGET[name]["GB"])):
        assert (1 - TOLERANCE) * budget <= found <= budget * 1.0001, (kernels, gigabytes)
