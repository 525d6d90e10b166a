"""How many parameters ImageNet's networks have: those of the published module, less what it makes
and never uses.

`published` counts the parameters of the module of

    QKFormer               zhouchenlin2096/QKFormer, commit c2a00e8, imagenet/qkformer.py;
                           16.47, 29.08, 64.96 M in its README
    SEW, Spiking ResNet    fangwei123456/Spike-Element-Wise-ResNet, commit cfc547c, imagenet/;
                           as many as torchvision's ResNets
    MS-ResNet              Ariande1/MS-ResNet, commit 7c5f006, models/MS_ResNet.py

made at 1000 classes with nothing in the place of its neurons, and `dead` names those of them that
one forward and backward in training mode left without a gradient, with their numbers. There were
none: what these modules make and do not use (max pools) has no parameters.

The families of ImageNet and the networks of its SEI recipes at 224 pixels in bf16: one image,
one time step.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

spiking_resnet = partial(sew_resnet, shortcut="post_activation")
TABLE: list[tuple[Callable[..., nn.Module], int, int, dict[str, int]]] = [
    # family, width or depth, published, dead
    (qkformer_10, 384, 16_473_688, {}),
    (qkformer_10, 512, 29_079_336, {}),
    (qkformer_10, 768, 64_962_760, {}),
    (sew_resnet, 18, 11_689_512, {}),
    (sew_resnet, 34, 21_797_672, {}),
    (sew_resnet, 50, 25_557_032, {}),
    (sew_resnet, 101, 44_549_160, {}),
    (sew_resnet, 152, 60_192_808, {}),
    (spiking_resnet, 18, 11_689_512, {}),
    (spiking_resnet, 34, 21_797_672, {}),
    (spiking_resnet, 50, 25_557_032, {}),
    (spiking_resnet, 101, 44_549_160, {}),
    (spiking_resnet, 152, 60_192_808, {}),
    (ms_resnet, 18, 11_693_736, {}),
    (ms_resnet, 34, 21_801_896, {}),
    (ms_resnet, 104, 77_350_504, {}),
]


@pytest.mark.parametrize(("family", "size", "published", "dead"), TABLE)
def test_ours_are_the_published_less_the_dead(
    family: Callable[..., nn.Module], size: int, published: int, dead: Mapping[str, int]
) -> None:
    with torch.device("meta"):
        ours = sum(p.numel() for p in family(size).parameters())
    assert ours == published - sum(dead.values())


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
    torch.manual_seed(0)
    model, rule, shapes = network(name), make_rule(), []
    assert bool(binary_synapses(model)) == (name in RECIPES)
    rule.attach(model)

    def loss_of(logits_BK: Tensor) -> Tensor:
        shapes.append(logits_BK.shape)
        return F.cross_entropy(logits_BK, torch.tensor([3]))

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
