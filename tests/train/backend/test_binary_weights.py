"""1-bit weights on two DeepSpeed ranks, ZeRO-0/1/2, against plain torch on the joint batch: latent
weights and scales.
"""

# T time, B batch

from functools import partial
from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from pipeline.models.transforms import binarized
from pipeline.recipe.recipe import spec
from pipeline.rules.sltt import SLTT
from pipeline.train.backend.base import Backend, OptimizerOf
from pipeline.train.backend.deepspeed import DeepSpeed
from pipeline.train.backend.plain import Plain
from pipeline.train.build import build_optimizer
from tests.helpers.processes import run_ranks
from tests.helpers.rule_networks import batch, lif_network
from tests.helpers.silent import micro_batches, train
from tests.helpers.small import small_recipe

pytestmark = pytest.mark.distributed

TIME, BATCH, STEPS, STAGES = 4, 8, 3, (0, 1, 2)
RECIPE = small_recipe(
    optimizer=spec(create_optimizer_v2, opt="sgd", lr=0.1, momentum=0.9, weight_decay=0.05)
)


def network() -> nn.Module:
    return binarized(lif_network().float(), part="all_but_ends", weights="learnable")


def trained(
    model: nn.Module, backend: Backend, rule: SLTT, *, rank: int = 0, ranks: int = 1
) -> dict[str, Tensor]:
    rule.attach(model)
    x_TBC, target_B = batch(TIME, size=BATCH * STEPS)
    batches = (
        (step, micro_batches(x_TB.float(), target, rank=rank, ranks=ranks))
        for step, (x_TB, target) in enumerate(
            zip(x_TBC.split(BATCH, 1), target_B.split(BATCH), strict=True)
        )
    )
    train(rule, backend, batches)
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _optimizer_of(rule: SLTT) -> OptimizerOf:
    return partial(build_optimizer, RECIPE, rule=rule)


def _ranks(rank: int, ranks: int) -> list[dict[str, Tensor]]:
    found = []
    for zero in STAGES:
        model, rule = network(), SLTT()
        backend = DeepSpeed(model, _optimizer_of(rule), micro_batch=BATCH // ranks, zero=zero)
        found.append(trained(model, backend, rule, rank=rank, ranks=ranks))
    return found


@pytest.mark.timeout(600)
def test_two_ranks_equal_plain_torch_on_the_joint_batch(tmp_path: Path) -> None:
    model, rule = network(), SLTT()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = trained(model, Plain(model, _optimizer_of(rule)), rule)
    for key in ("2.weight", "2.binarizer.scale"):
        assert (expected[key] - before[key]).abs().max() > 1e-3
    for states in run_ranks(_ranks, 2, tmp_path):
        for zero, state in zip(STAGES, states, strict=True):
            assert state.keys() == expected.keys()
            assert all(
                torch.allclose(state[key], expected[key], rtol=0, atol=1e-6) for key in expected
            ), zero
