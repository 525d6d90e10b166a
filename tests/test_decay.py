"""Latent weights have no weight decay, whatever makes the optimizer; everything else has what it
had.
"""

from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from pipeline.models.convnet import convnet
from pipeline.models.transforms import binarized, late
from pipeline.recipe.recipe import Spec, spec
from pipeline.rules.bptt import BPTT
from pipeline.spiking.binary import latent_parameters
from pipeline.train.build import build_optimizer
from tests.helpers.small import small_recipe

DECAY = 0.1


def network(weights: str) -> nn.Module:
    """Wrapped, so that the outermost network knows nothing of its bits."""
    inside = convnet(3, in_channels=1, stages=((4,), (4,), (4,)))
    network: Any = binarized(inside, part="all_but_ends", weights=weights)
    return late(network, time_steps=2)


def by_torch(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.named_parameters(), lr=0.1, weight_decay=weight_decay)


def latents_alone(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    latent = {id(parameter) for parameter in latent_parameters(model)}
    groups = [
        {
            "params": [p for p in model.parameters() if (id(p) in latent) is own],
            "lr": 0.1 if own else 0.3,
        }
        for own in (True, False)
    ]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


TIMM: dict[str, Any] = {"lr": 0.1, "weight_decay": DECAY}


@pytest.mark.parametrize(
    "optimizer",
    [
        spec(create_optimizer_v2, opt="adamw", **TIMM),
        spec(create_optimizer_v2, opt="sgd", momentum=0.9, **TIMM),
        spec(create_optimizer_v2, opt="lamb", **TIMM),
        spec(create_optimizer_v2, opt="lookahead_adamw", **TIMM),
        spec(create_optimizer_v2, opt="adamw", filter_bias_and_bn=False, **TIMM),
        spec(by_torch, weight_decay=DECAY),
        spec(latents_alone, weight_decay=DECAY),
    ],
    ids=lambda optimizer: optimizer.label,
)
@pytest.mark.parametrize("weights", ["scaled", "learnable"])
def test_no_optimizer_decays_latent_weights(optimizer: Spec, weights: str) -> None:
    model = network(weights)
    latent = {id(parameter) for parameter in latent_parameters(model)}
    before = {id(p): g for g in optimizer.build(model).param_groups for p in g["params"]}
    made = build_optimizer(small_recipe(optimizer=optimizer), model, BPTT())
    assert all(group["params"] for group in made.param_groups)
    after = {id(p): g for g in made.param_groups for p in g["params"]}
    assert after.keys() == before.keys() and sum(
        len(group["params"]) for group in made.param_groups
    ) == len(after)
    assert any(before[key]["weight_decay"] for key in latent)
    for key, group in after.items():
        settings = {name for name in group if name not in ("params", "param_names", "weight_decay")}
        assert all(group[name] == before[key][name] for name in settings)
        assert group["weight_decay"] == (0 if key in latent else before[key]["weight_decay"])
        assert len(group.get("param_names", group["params"])) == len(group["params"])
