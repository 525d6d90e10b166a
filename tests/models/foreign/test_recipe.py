"""A wrapped network in a recipe: it trains, and goes on to the same bits after a kill."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from pipeline import wrap
from pipeline.recipe.recipe import Spec, spec
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from tests.helpers.foreign import CLASSES, chain, learnt_chain
from tests.helpers.small import goes_on, small_recipe


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("build", "rule"),
    [(chain, spec(OTTT)), (learnt_chain, spec(SLTT, k=1)), (learnt_chain, spec(BPTT))],
)
def test_it_trains_is_killed_and_goes_on(
    build: Callable[..., nn.Module], rule: Spec, tmp_path: Path
) -> None:
    """With DeepSpeed, which refuses parameters without dimensions."""
    recipe = small_recipe(
        model=spec(wrap, network=spec(build)),
        data=small_recipe().data.with_(classes=CLASSES),
        rule=rule,
        backend="deepspeed",
    )
    whole, broken = goes_on(tmp_path, recipe, trust=("tests",))
    assert broken["loss"] == whole["loss"]
