"""The families of ImageNet and the networks of its SEI recipes at 224 pixels in bf16: one image,
one time step.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.ms_resnet import ms_resnet
from pipeline.models.qkformer import qkformer_10
from pipeline.models.residual import Residual
from pipeline.models.sew_resnet import sew_resnet
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.binary import binary_synapses
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from tests.helpers.small import recipes_of

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "QKFormer-10-384": partial(qkformer_10, 384),
    "QKFormer-10-384, multiple": partial(qkformer_10, 384, shortcut="multiple"),
    "QKFormer-10-384, multiple, sws": partial(qkformer_10, 384, shortcut="multiple", norm="sws"),
    "QKFormer-10-768": partial(qkformer_10, 768),
    "SEW-ResNet-50": partial(sew_resnet, 50, over="step"),
    "Spiking ResNet-50": partial(sew_resnet, 50, shortcut="post_activation", over="step"),
    "MS-ResNet-34": partial(ms_resnet, 34, over="step"),
    "MS-ResNet-104": partial(ms_resnet, 104, over="step"),
    "MS-ResNet-34, multiple, sws": partial(
        ms_resnet, 34, shortcut="multiple", norm="sws", neuron=LIF(0.25, threshold=0.5)
    ),
}
RECIPES = {
    file.stem: file
    for file in sorted((Path(__file__).parents[2] / "recipes" / "imagenet").glob("*_sei_bw*.py"))
}


def network(name: str) -> nn.Module:
    """Of a family, or of the last stage of a recipe, its silent branches awake: behind a gain of 0
    every gradient is 0.
    """
    model = recipes_of(RECIPES[name])[-1].model.build() if name in RECIPES else FAMILIES[name]()
    for module in model.modules():
        if isinstance(module, BatchNorm) and not module.weight.any():
            nn.init.ones_(module.weight)
        elif isinstance(module, Residual) and module.skip_gain is not None:
            nn.init.ones_(module.skip_gain)
    return model


def test_the_recipes_with_1_bit_weights():
    of_qkformer = [
        f"qkformer_10_{which}"
        for which in ("384_sei_bw", "384_sei_bw_reading_b", "512_sei_bw", "768_sei_bw")
    ]
    assert list(RECIPES) == ["ms_resnet34_sei_bw", *of_qkformer]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("make_rule", [BPTT, SLTT])
@pytest.mark.parametrize("name", [*FAMILIES, *RECIPES])
def test_gradients_are_finite_in_bf16(name, make_rule):
    model, rule, shapes = network(name), make_rule(), []
    assert bool(binary_synapses(model)) == (name in RECIPES)
    rule.attach(model)

    def loss_of(logits_BK: Tensor) -> Tensor:
        shapes.append(logits_BK.shape)
        return nn.functional.cross_entropy(logits_BK, torch.tensor([3]))

    x_TBCHW = torch.randn(1, 1, 3, 224, 224)
    with torch.autocast("cpu", torch.bfloat16):
        for objective in rule.loss_terms(model, x_TBCHW, loss_of, step=0):
            assert objective.backward is not None and objective.backward.isfinite()
            objective.backward.backward()
    assert shapes == [(1, 1000)]
    assert [
        key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ] == []
    # it has come down to the stem
    assert next(model.parameters()).grad.any()  # type: ignore[union-attr]
