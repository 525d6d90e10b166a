"""SEW-ResNet, Spiking ResNet and MS-ResNet; the numbers of parameters and neurons of every
network.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from pipeline.models.convnet import convnet
from pipeline.models.feedback import (
    alexnet_f,
    cifarnet_f,
    conv_feedback,
    convnet_f,
    fc_feedback,
    lenet_f,
)
from pipeline.models.mlp import mlp
from pipeline.models.ms_resnet import ms_resnet
from pipeline.models.nf_resnet import nf_resnet18_small, nf_resnet34, nf_resnet50, nf_resnet101
from pipeline.models.qkformer import qkformer_10
from pipeline.models.sew_resnet import sew_resnet
from pipeline.models.vgg import vgg_sws, vgg_sws_f
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state
from pipeline.spiking.surrogate import Sigmoid
from tests.helpers.families import RESNETS
from tests.helpers.rule_networks import refusals


def test_ms_block_starts_as_its_shortcut():
    """Published: the last batch norm of a block at gain 0, the others at the threshold."""
    gains = [
        float(m.weight.detach()[0]) for m in ms_resnet(18).modules() if isinstance(m, BatchNorm)
    ]
    # stem; a block of the first kind has two norms and that of its shortcut, one of the second two
    assert gains == [0.5, *[0.5, 0.0, 0.5, 0.5, 0.0] * 4]


@pytest.mark.parametrize("build", [partial(sew_resnet, 18), partial(ms_resnet, 18), nf_resnet34])
def test_sizes_of_the_image(build):
    with torch.device("meta"), fresh_state(model := build()):
        h = model.stem(torch.empty(1, 1, 3, 224, 224))
        shapes = [tuple((h := stage(h)).shape[2:]) for stage in model.stages]
    assert shapes == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]


test_refuses = refusals(
    [
        (
            lambda: sew_resnet(20),  # type: ignore[arg-type]
            r"sew_resnet: depth must be 18, 34, 50, 101 or 152; got depth=20",
        ),
        (
            lambda: ms_resnet(50),  # type: ignore[arg-type]
            r"ms_resnet: depth must be 18, 34 or 104; got depth=50",
        ),
        (
            lambda: RESNETS["sew"](shortcut="membrane"),
            r"SEWResNet: shortcut must be 'sew' or 'post_activation'",
        ),
        (
            lambda: RESNETS["ms"](shortcut="sew"),
            r"MSResNet: shortcut must be 'membrane' or 'multiple'; got shortcut='sew'",
        ),
        (
            lambda: RESNETS["ms"](stem="two"),
            r"MSResNet: stem must be 'one' or 'three'; got stem='two'",
        ),
        (
            lambda: RESNETS["ms"](blocks=()),
            r"MSResNet: blocks must be whole numbers >= 1; got blocks=\(\)",
        ),
    ]
)


# ------------------------------------------------------------------------------------------ counts


spiking_resnet = partial(sew_resnet, shortcut="post_activation")


def parameters(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


# A 3x3 stem and 10 classes for torchvision's ResNet-18 (11,689,512), and a skip gain per block.
NF_18 = 11_689_512 - 64 * 3 * (49 - 9) - 513 * 990 + 8
COUNTS: list[tuple[Callable[..., nn.Module], dict, int]] = [
    # published, by width or depth
    (qkformer_10, {"channels": 384}, 16_473_688),
    (qkformer_10, {"channels": 512}, 29_079_336),
    (qkformer_10, {"channels": 768}, 64_962_760),
    *(
        (build, {"depth": depth}, count)
        for build in (sew_resnet, spiking_resnet)
        for depth, count in (
            (18, 11_689_512),
            (34, 21_797_672),
            (50, 25_557_032),
            (101, 44_549_160),
            (152, 60_192_808),
        )
    ),
    (ms_resnet, {"depth": 18}, 11_693_736),
    (ms_resnet, {"depth": 34}, 21_801_896),
    (ms_resnet, {"depth": 104}, 77_350_504),
    (mlp, {"bias": False}, 784 * 800 + 800 * 800 + 800 * 10),
    (mlp, {"hidden": (400,)}, 785 * 400 + 401 * 10),
    (convnet, {"in_channels": 1, "norm": "none"}, 320 + 64 * 289 + 128 * 577 + 1290),
    (convnet, {"stages": ((4, 4),), "grid": 3}, 4 * 27 + 4 * 36 + 16 + 10 * (4 * 9 + 1)),
    (alexnet_f, {}, 3_708_139),  # published: 3.7 M
    (cifarnet_f, {}, 11_837_579),  # published: 11.8 M
    (fc_feedback, {}, 478_011),
    (convnet_f, {}, 25 * 64 + 2 * 25 * 64**2 + 3 * 64 + 9 * 64**2 + (64 * 49 + 1) * 10),
    (convnet_f, {}, 274_826),
    (lenet_f, {}, 15 * 26 + 40 * (15 * 25 + 1) + 300 * (40 * 49 + 1) + 3010),
    (lenet_f, {}, 606_740),
    (conv_feedback, {}, 25 * 64 + 2 * 64 + 25 * 64 * 64 + 1 + (64 * 14 * 14 + 1) * 10),
    (nf_resnet34, {}, 21_797_688),
    (nf_resnet50, {}, 25_557_048),
    (nf_resnet101, {}, 44_549_193),
    (nf_resnet18_small, {}, NF_18),
    (vgg_sws, {}, 9_228_362),
    # One 3x3 convolution with bias from 512 to 64 channels more.
    (vgg_sws_f, {}, 9_228_362 + 512 * 64 * 9 + 64),
    (vgg_sws_f, {}, 9_523_338),
]


@pytest.mark.parametrize(("build", "choices", "count"), COUNTS)
def test_parameter_counts(build, choices, count):
    assert parameters(partial(build, **choices)) == count


@pytest.mark.parametrize(("build", "layers"), [(nf_resnet50, 48), (vgg_sws, 8), (alexnet_f, 5)])
def test_neuron_arguments_reach_every_neuron(build, layers):
    about = {"decay": 0.25, "threshold": 1.5, "surrogate": Sigmoid(2.0)}
    if build is not alexnet_f:  # an equilibrium resets by subtraction
        about |= {"reset": "zero", "reset_gradient": "kept"}
    with torch.device("meta"):
        neurons = [m for m in build(neuron=LIF(**about)).modules() if isinstance(m, LIF)]
    found = [{name: getattr(each, name) for name in about} for each in neurons]
    assert found == [about] * layers and len({id(each.state) for each in neurons}) == layers
