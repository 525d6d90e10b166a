"""SEW-ResNet and Spiking ResNet: residual networks whose neurons follow synapse and norm.

    SEW        y = L(N S L N S x) + x      adds spikes; x and y are whole numbers
    Spiking    y = L(N S L N S x + x)      adds spikes to currents; deep networks do not learn

S is a synapse, N its norm, L a neuron. A bottleneck has three synapses instead of two. Where the
shape changes, the shortcut has a 1x1 synapse with norm, and in SEW a neuron.

Source: Fang et al. 2021 (SEW, arXiv 2102.04159), its variant "ADD".
"""

# T time, B batch, C channels, H W pixels, K classes

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of
from pipeline.models.parts import Pool, StatisticsOver
from pipeline.models.published import (
    RESNET_STAGES,
    PublishedNames,
    PublishedSize,
    load_published,
    resnet_sizes,
)
from pipeline.models.residual import BlockFactory, Layer, resnet_stages
from pipeline.spiking.neuron import IF
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.surrogate import ATan
from pipeline.spiking.synapse import Conv2d, Linear

Shortcut = Literal["sew", "post_activation"]

# The surrogate is SpikingJelly's default, because no setting was published.
NEURON = IF(reset="zero", surrogate=ATan())

NAMES = PublishedNames(
    (
        (r"^stem\.0\.synapse\.", "conv1."),
        (r"^stem\.0\.norm\.", "bn1."),
        *RESNET_STAGES,
        (r"\.branch\.0\.", ".conv1."),
        (r"\.branch\.2\.", ".conv2."),
        (r"\.branch\.4\.", ".conv3."),
        (r"\.shortcut\.0\.", ".downsample.0."),
        (r"\.synapse\.", ".module.0."),
        (r"\.norm\.", ".module.1."),
        (r"^classifier\.", "fc."),
    ),
    # The container of SpikingJelly 0.0.0.0.12 has no "module".
    spellings=[(r"^(layer.*\.(?:conv\d|downsample|downsample\.0))\.(\d\.\w+)$", r"\1.module.\2")],
)
# The shortcut of Spiking ResNet has no neuron.
SPIKING_NAMES = replace(NAMES, renames=(*NAMES.renames, (r"\.downsample\.0\.", ".downsample.")))

DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class SEWResNet(nn.Module):
    """`[T, B, C, H, W]` to `[T, B, K]`.

    The order is: 7x7 stem with max pool, stages, global average pool, classifier.

    Args:
        blocks: number of blocks in each stage. Every stage but the first halves the image.
        bottleneck: whether a block has 1x1, 3x3 and 1x1 synapses and four times the output
            channels, instead of two 3x3 synapses.
        shortcut: "sew" or "post_activation" (Spiking ResNet).

    Raises: ValueError for sizes below 1, or another shortcut.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int],
        bottleneck: bool,
        classes: int,
        in_channels: int = 3,
        width: int = 64,
        shortcut: Shortcut = "sew",
        over: StatisticsOver = "time",
        neuron: nn.Module = NEURON,
    ) -> None:
        super().__init__()
        refuse_unless_counts(
            "SEWResNet",
            {"classes": classes, "in_channels": in_channels, "width": width, "blocks": blocks},
        )
        refuse_unless_one_of("SEWResNet", ("sew", "post_activation"), shortcut=shortcut)
        self.published = NAMES if shortcut == "sew" else SPIKING_NAMES
        factory = BlockFactory(shortcut=shortcut, neuron=neuron, over=over)
        self.stem = nn.Sequential(
            StaticInput.of(factory.normed_synapse(Layer(in_channels, width, 7, stride=2))),
            factory.neuron(),
            Pool(nn.MaxPool2d(3, stride=2, padding=1)),
        )
        self.stages, channels = resnet_stages(factory, blocks, width, bottleneck=bottleneck)
        self.classifier = Linear(channels, classes)
        for module in self.modules():  # as torchvision's ResNet
            if isinstance(module, Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(x_TBCHW)).mean((3, 4)))


def sew_resnet(
    depth: Literal[18, 34, 50, 101, 152] = 34,
    *,
    classes: int = 1000,
    in_channels: int = 3,
    shortcut: Shortcut = "sew",
    over: StatisticsOver = "time",
    neuron: nn.Module = NEURON,
) -> SEWResNet:
    """SEW-ResNet-18 to -152 for ImageNet; 11.69, 21.80, 25.56, 44.55, 60.19 M parameters.

    `shortcut="post_activation"` gives Spiking ResNet.
    """
    refuse_unless_one_of("sew_resnet", DEPTHS, depth=depth)
    return SEWResNet(
        blocks=DEPTHS[depth],
        bottleneck=depth >= 50,
        classes=classes,
        in_channels=in_channels,
        shortcut=shortcut,
        over=over,
        neuron=neuron,
    )


def from_published(published: Mapping[str, Tensor], *, over: StatisticsOver = "time") -> SEWResNet:
    """A SEW-ResNet or a Spiking ResNet with published weights. Its sizes are those of the tensors.

    `over`: statistics of batch norm in training. "time" is as published; rules that run in slices
    need "step".

    Raises: ValueError for missing or unknown tensors, or tensors of another shape.
    """
    is_sew = any(re.search(r"\.downsample\.0\.(module|\d)\.", name) for name in published)
    return load_published(
        published,
        lambda: SEWResNet(
            bottleneck=any(".conv3." in name for name in published),
            shortcut="sew" if is_sew else "post_activation",
            over=over,
            **resnet_sizes(published),
        ),
    )


# Top-1 is that of the best epoch in the published logs.
PUBLISHED_SIZES = tuple(
    PublishedSize(
        "SEW-ResNet",
        size,
        parameters,
        f"{top1}, T=4",
        "2102.04159",
        build,
    )
    for build, size, parameters, top1 in (
        (partial(sew_resnet, 18), "18", 11_689_512, 63.18),
        (partial(sew_resnet, 34), "34", 21_797_672, 67.04),
        (partial(sew_resnet, 50), "50", 25_557_032, 67.78),
        (partial(sew_resnet, 101), "101", 44_549_160, 68.76),
        (partial(sew_resnet, 152), "152", 60_192_808, 69.26),
    )
)
