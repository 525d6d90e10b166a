"""How many parameters ImageNet's networks have: those of the published module, less what it makes
and never uses.

`published` counts the parameters of the module of

    QKFormer               zhouchenlin2096/QKFormer, commit c2a00e8, imagenet/qkformer.py; 16.47,
    29.08, 64.96 M in its README SEW, Spiking ResNet    fangwei123456/Spike-Element-Wise-ResNet,
    commit cfc547c, imagenet/; as many as torchvision's ResNets MS-ResNet
    Ariande1/MS-ResNet, commit 7c5f006, models/MS_ResNet.py

made at 1000 classes with nothing in the place of its neurons, and `dead` names those of them that
one forward and backward in training mode left without a gradient, with their numbers. There were
none: what these modules make and do not use (max pools) has no parameters.
"""

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import nn

from pipeline.models.ms_resnet import ms_resnet
from pipeline.models.qkformer import qkformer_10
from pipeline.models.sew_resnet import sew_resnet

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
