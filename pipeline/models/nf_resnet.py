"""NF-ResNet: the spiking ResNet without batch norm on which OTTT and SLTT report ImageNet results.

    block:   h = gamma LIF(x / beta)
             y = x + alpha skip_gain branch(h)
             where the shape changes, the shortcut is a 1x1 convolution of h, not of x

Standardised weights keep each branch at unit variance. gamma restores the variance that the spike
function removes. beta is the expected standard deviation of the stream. alpha is 0.2, and skip_gain
starts at 0. No batch statistics are used, so the network can run one time step at a time. The
stream is real-valued, and no neuron precedes the last pool.

Source: Brock et al. 2021 (arXiv 2101.08692) for the network without batch norm; Xiao et al.
2022 (OTTT, arXiv 2210.04195) and Meng et al. 2023 (SLTT, arXiv 2302.14311) for the spiking network.
"""

# T time, B batch, C channels, H W pixels, K classes

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of
from pipeline.models.parts import Pool, standardized_conv
from pipeline.models.published import (
    RESNET_STAGES,
    PublishedNames,
    PublishedSize,
    load_published,
    resnet_sizes,
)
from pipeline.models.residual import BlockFactory, resnet_stages
from pipeline.spiking.neuron import LIF
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.synapse import Linear

NAMES = PublishedNames(
    (
        (r"^stem\.0\.", "conv1."),
        *RESNET_STAGES,
        (r"\.skip_gain$", ".skipinit_gain"),
        (r"\.branch\.0\.synapse\.", ".conv1."),
        (r"\.branch\.2\.synapse\.", ".conv2."),
        (r"\.branch\.4\.synapse\.", ".conv3."),
        (r"\.shortcut\.0\.synapse\.", ".downsample."),
        (r"^classifier\.", "fc."),
    ),
    flat=r"skipinit_gain$",
    spellings=[(r"\.op\.", ".")],  # of OTTT's wrapper around layers
)


class NFResNet(nn.Module):
    """`[T, B, C, H, W]` to `[T, B, K]`.

    The order is: stem, stages of blocks, global average pool, classifier.

    `stem="imagenet"` is a 7x7 convolution of stride 2 and an average pool of stride 2;
    `stem="small"` is a 3x3 convolution of stride `stem_stride`, for images of 28 to 32 pixels.
    Stage i has `blocks[i]` blocks of width `width * 2**i`. A block has two 3x3 convolutions, or is
    a `bottleneck` (1x1, 3x3, 1x1). Every stage but the first starts with stride 2. The classifier
    starts at 0, so the first loss is ln K.

    Raises: ValueError for an unknown stem, sizes below 1, or a neuron that scales its input.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int],
        bottleneck: bool = False,
        classes: int,
        in_channels: int,
        width: int,
        stem: Literal["imagenet", "small"],
        stem_stride: int = 1,
        neuron: nn.Module,
    ) -> None:
        super().__init__()
        refuse_unless_counts(
            "NFResNet",
            {
                "classes": classes,
                "in_channels": in_channels,
                "width": width,
                "stem_stride": stem_stride,
                "blocks": blocks,
            },
        )
        refuse_unless_one_of("NFResNet", ("imagenet", "small"), stem=stem)
        self.published = NAMES if stem == "imagenet" else None
        factory = BlockFactory(shortcut="membrane", neuron=neuron, norm="sws")
        if stem == "imagenet":
            self.stem = StaticInput(
                standardized_conv(in_channels, width, 7, stride=2),
                Pool(nn.AvgPool2d(3, stride=2, padding=1)),
            )
        else:
            self.stem = StaticInput(standardized_conv(in_channels, width, 3, stride=stem_stride))
        self.stages, channels = resnet_stages(factory, blocks, width, bottleneck=bottleneck)
        self.classifier = Linear(channels, classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(x_TBCHW)).mean((3, 4)))


def nf_resnet34(
    classes: int = 1000,
    *,
    in_channels: int = 3,
    neuron: nn.Module = LIF(),
) -> NFResNet:
    """NF-ResNet-34, 21,797,688 parameters at 1000 classes.

    The published decay is 1/11 for SLTT, and 0.5 for OTTT.
    """
    return NFResNet(
        blocks=(3, 4, 6, 3),
        classes=classes,
        in_channels=in_channels,
        width=64,
        stem="imagenet",
        neuron=neuron,
    )


def nf_resnet50(
    classes: int = 1000,
    *,
    in_channels: int = 3,
    neuron: nn.Module = LIF(),
) -> NFResNet:
    """NF-ResNet-50, 25,557,048 parameters at 1000 classes."""
    return NFResNet(
        blocks=(3, 4, 6, 3),
        bottleneck=True,
        classes=classes,
        in_channels=in_channels,
        width=64,
        stem="imagenet",
        neuron=neuron,
    )


def nf_resnet101(
    classes: int = 1000,
    *,
    in_channels: int = 3,
    neuron: nn.Module = LIF(),
) -> NFResNet:
    """NF-ResNet-101, 44,549,193 parameters at 1000 classes."""
    return NFResNet(
        blocks=(3, 4, 23, 3),
        bottleneck=True,
        classes=classes,
        in_channels=in_channels,
        width=64,
        stem="imagenet",
        neuron=neuron,
    )


def nf_resnet18_small(
    classes: int = 10,
    *,
    in_channels: int = 3,
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
    stem_stride: int = 1,
    neuron: nn.Module = LIF(),
) -> NFResNet:
    """NF-ResNet-18 for images of 28 to 32 pixels: 3x3 stem, no stem pool.

    Smaller networks have another `width`, other `blocks` or a larger `stem_stride`.
    """
    return NFResNet(
        blocks=blocks,
        classes=classes,
        in_channels=in_channels,
        width=width,
        stem="small",
        stem_stride=stem_stride,
        neuron=neuron,
    )


def from_published(published: Mapping[str, Tensor], *, neuron: nn.Module = LIF(1 / 11)) -> NFResNet:
    """An NF-ResNet with the weights of SLTT or OTTT. Its sizes are those of the tensors.

    No tensor shows the neuron. The default is SLTT's. OTTT's is LIF(surrogate=Sigmoid(4.0)).

    Raises: ValueError for missing or unknown tensors, or tensors of another shape.
    """
    return load_published(
        published,
        lambda: NFResNet(
            bottleneck=any(".conv3." in name for name in published),
            stem="imagenet",
            neuron=neuron,
            **resnet_sizes(published),
        ),
    )


PUBLISHED_SIZES = tuple(
    PublishedSize("NF-ResNet", size, parameters, top1, source, build)
    for size, parameters, top1, source, build in (
        ("34", 21_797_688, "66.19, T=6, SLTT", "2302.14311", nf_resnet34),
        ("34", 21_797_688, "65.15, T=6, OTTT", "2210.04195", nf_resnet34),
        ("50", 25_557_048, "67.02, T=6, SLTT, unconfirmed", "2302.14311", nf_resnet50),
        ("101", 44_549_193, "69.26, T=6, SLTT, unconfirmed", "2302.14311", nf_resnet101),
    )
)
