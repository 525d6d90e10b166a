"""A wrapped network in a recipe: it trains, and goes on to the same bits after a kill."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import compare, wrap
from pipeline.recipe.recipe import Spec, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from tests.helpers.foreign import CASES, CLASSES, POOLED, Case, chain, learnt_chain, sew
from tests.helpers.small import finished, goes_on, small_recipe


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("build", "shape", "rule"),
    [
        (chain, (1, 8, 8), spec(OTTT)),
        (learnt_chain, (1, 8, 8), spec(SLTT, k=1)),
        (learnt_chain, (1, 8, 8), spec(BPTT)),
        (sew, (3, 8, 8), spec(SLTT, k=1)),
        # OTTT refuses the batch norm of the first two networks
        *(
            pytest.param(case.build, case.shape, rule, marks=pytest.mark.full)
            for case in CASES
            for rule in (spec(BPTT), spec(SLTT), spec(SLTT, k=1), spec(OTTT))
            if rule.target is not OTTT or not case.has_batch_norm
        ),
    ],
)
def test_it_trains_is_killed_and_goes_on(
    build: Callable[..., nn.Module], shape: tuple[int, ...], rule: Spec, tmp_path: Path
) -> None:
    """With DeepSpeed, which refuses parameters without dimensions."""
    recipe = small_recipe(
        model=spec(wrap, network=spec(build), norm="step"),
        data=small_recipe().data.with_(classes=CLASSES, shape=shape, val_samples=4),
        rule=rule,
        backend="deepspeed",
        stop_after=6,
    )
    whole, broken = goes_on(tmp_path, recipe, trust=("tests",))
    assert broken["loss"] == whole["loss"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.full] if case.has_batch_norm else [])
        for case in (*CASES, POOLED)
    ],
    ids=str,
)
def test_compare_tells_the_bytes_of_a_run(case: Case, tmp_path: Path) -> None:
    recipe = small_recipe(
        model=spec(wrap, network=spec(case.build), norm="step"),
        data=small_recipe().data.with_(classes=CLASSES, shape=case.shape),
        rule=spec(SLTT),
        stop_after=3,
    )
    summary = finished(tmp_path / "run", recipe, trust=("tests",))
    x_BCHW, target_B = torch.rand(8, *case.shape), torch.arange(8) % CLASSES
    found = compare(recipe.model.build(), x_BCHW, target_B, steps=3, rules=[SLTT()], rounds=1)
    cost = found.cost("SLTT")
    assert cost is not None
    for measured in ("peak_saved_bytes", "state_bytes"):
        assert getattr(cost, measured) == summary[measured]
