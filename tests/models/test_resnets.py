"""SEW-ResNet, Spiking ResNet and MS-ResNet."""

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import nn

from pipeline.models.ms_resnet import ms_resnet
from pipeline.models.qkformer import qkformer_10
from pipeline.models.sew_resnet import sew_resnet
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state
from tests.helpers.families import RESNETS


def test_ms_block_starts_as_its_shortcut():
    """Published: the last batch norm of a block at gain 0, the others at the threshold."""
    gains = [
        float(m.weight.detach()[0]) for m in ms_resnet(18).modules() if isinstance(m, BatchNorm)
    ]
    # stem; a block of the first kind has two norms and that of its shortcut, one of the second two
    assert gains == [0.5, *[0.5, 0.0, 0.5, 0.5, 0.0] * 4]


def test_sizes_of_the_image():
    with torch.device("meta"):
        for model, expected in (
            (sew_resnet(18), [56, 28, 14, 7]),
            (ms_resnet(18), [56, 28, 14, 7]),
        ):
            with fresh_state(model):
                h = model.stem(torch.empty(1, 1, 3, 224, 224))
                sizes = [h := stage(h) for stage in model.stages]
            assert [y.shape[-1] for y in sizes] == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sew_resnet(20), r"sew_resnet: depth must be 18, 34, 50, 101 or 152; got depth=20"),  # type: ignore[arg-type]
        (lambda: ms_resnet(50), r"ms_resnet: depth must be 18, 34 or 104; got depth=50"),  # type: ignore[arg-type]
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
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ------------------------------------------------------------------------------------------ counts


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
