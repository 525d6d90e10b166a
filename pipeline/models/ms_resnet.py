"""MS-ResNet: a residual network with the membrane shortcut, whose stream is real-valued.

    y = N S L N S L x + x
    where the shape changes, the shortcut is N S x, a 1x1 synapse that reads the stream itself

L is a neuron, S a synapse, N its norm. Every neuron precedes its synapse. The 7x7 stem has
no neuron and no pool. The first stage halves the image again. The 104-layer network has a stem of
three 3x3 synapses, an average pool before the 1x1 synapses of its shortcuts, and dropout before the
classifier. The last batch norm of a block starts at gain 0, all others at gain 0.5 (`THRESHOLD`).

With `shortcut="multiple"` every synapse has its own shortcut. With `norm="sws"` there is no batch
norm, and the 1x1 synapse of a shortcut reads spikes (`models/residual.py`).

Source: Hu et al. 2021 (MS-ResNet, arXiv 2112.08954).
"""

# T time, B batch, C channels, H W pixels, K classes

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of
from pipeline.models.parts import StatisticsOver
from pipeline.models.published import (
    PublishedNames,
    PublishedSize,
    load_published,
    resnet_sizes,
)
from pipeline.models.residual import BlockFactory, Layer, Norm, resnet_stages
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.neuron import LIF
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.surrogate import Rectangle
from pipeline.spiking.synapse import Linear

THRESHOLD = 0.5
NEURON = LIF(0.25, threshold=THRESHOLD, reset="zero", surrogate=Rectangle(1.0))

NAMES = PublishedNames(
    (
        (r"^stem\.synapse\.", "conv1.0."),
        (r"^stem\.norm\.", "conv1.1.bn."),
        (r"^stem\.2\.norm\.", "conv1.3.bn."),
        (r"^stem\.(\d)\.(?:synapse\.)?", r"conv1.\1."),
        (r"^stages\.(\d)\.", lambda match: f"conv{int(match[1]) + 2}_x."),
        (r"\.branch\.0\.synapse\.", ".residual_function.1."),
        (r"\.branch\.0\.norm\.", ".residual_function.2.bn."),
        (r"\.branch\.2\.synapse\.", ".residual_function.4."),
        (r"\.branch\.2\.norm\.", ".residual_function.5.bn."),
        (r"\.shortcut\.(\d)\.synapse\.", r".shortcut.\1."),
        (r"\.shortcut\.0\.norm\.", ".shortcut.1.bn."),
        (r"\.shortcut\.1\.norm\.", ".shortcut.2.bn."),
        (r"^classifier\.", "fc."),
    )
)

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 104: (3, 8, 32, 8)}


class MSResNet(nn.Module):
    """`[T, B, C, H, W]` to `[T, B, K]`.

    The order is: stem, stages that each halve the image, neuron, global average pool, dropout,
    classifier.

    Args:
        blocks: number of blocks in each stage. A block has two 3x3 synapses.
        stem: "one" 7x7 synapse, or "three" 3x3 synapses.
        stem_stride: stride of the first synapse; 1 for images of 28 or 32 pixels.
        pooled: an average pool before the 1x1 synapse of a shortcut, instead of its stride.
        dropout: share of features that are dropped before the classifier.
        drop_path: share of dropped branches at the last block; the share grows from 0 at the first.

    Raises: ValueError for sizes below 1, unknown choices, or choices that do not fit together
    (`models/residual.py`).
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int],
        classes: int,
        in_channels: int = 3,
        width: int = 64,
        stem: Literal["one", "three"] = "one",
        stem_stride: int = 2,
        pooled: bool = False,
        dropout: float = 0.0,
        shortcut: Literal["membrane", "multiple"] = "membrane",
        norm: Norm = "batch",
        over: StatisticsOver = "time",
        drop_path: float = 0.0,
        neuron: nn.Module = NEURON,
    ) -> None:
        super().__init__()
        refuse_unless_counts(
            "MSResNet",
            {
                "classes": classes,
                "in_channels": in_channels,
                "width": width,
                "stem_stride": stem_stride,
                "blocks": blocks,
            },
        )
        refuse_unless_one_of("MSResNet", ("one", "three"), stem=stem)
        refuse_unless_one_of("MSResNet", ("membrane", "multiple"), shortcut=shortcut)
        self.published = NAMES if (shortcut, norm) == ("membrane", "batch") else None
        factory = BlockFactory(
            shortcut=shortcut, neuron=neuron, norm=norm, over=over, norm_gain=THRESHOLD
        )
        if stem == "one":
            self.stem = StaticInput.of(
                factory.normed_synapse(Layer(in_channels, width, 7, stem_stride))
            )
        else:
            layer = Layer(width, width, 3, bias=True)
            self.stem = StaticInput(
                factory.synapse(Layer(in_channels, width, 3, stem_stride, bias=True)),
                factory.synapse(layer),
                factory.normed_synapse(layer),
            )
        self.stages, channels = resnet_stages(
            factory,
            blocks,
            width,
            first_stride=2,
            last_gain=0.0,
            pooled=pooled,
            drop_path=drop_path,
        )
        self.last = factory.stream_neuron()
        self.dropout = Dropout(dropout) if dropout else nn.Identity()
        self.classifier = Linear(channels, classes)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return self.classifier(
            self.dropout(self.last(self.stages(self.stem(x_TBCHW))).mean((3, 4)))
        )


def ms_resnet(
    depth: Literal[18, 34, 104] = 34,
    *,
    classes: int = 1000,
    in_channels: int = 3,
    shortcut: Literal["membrane", "multiple"] = "membrane",
    norm: Norm = "batch",
    over: StatisticsOver = "time",
    drop_path: float = 0.0,
    neuron: nn.Module = NEURON,
) -> MSResNet:
    """MS-ResNet-18, -34 and -104 for ImageNet: 11.69, 21.80 and 77.35 M parameters."""
    refuse_unless_one_of("ms_resnet", DEPTHS, depth=depth)
    return MSResNet(
        blocks=DEPTHS[depth],
        classes=classes,
        in_channels=in_channels,
        stem="three" if depth == 104 else "one",
        pooled=depth == 104,
        dropout=0.2 if depth == 104 else 0.0,
        shortcut=shortcut,
        norm=norm,
        over=over,
        drop_path=drop_path,
        neuron=neuron,
    )


def from_published(published: Mapping[str, Tensor], *, over: StatisticsOver = "time") -> MSResNet:
    """An MS-ResNet with published weights. Its sizes are those of the tensors.

    `over`: statistics of batch norm in training. "time" is as published; rules that run in slices
    need "step".

    Raises: ValueError for missing or unknown tensors, or tensors of another shape.
    """
    is_deep = "conv1.2.weight" in published
    return load_published(
        published,
        lambda: MSResNet(
            stem="three" if is_deep else "one",
            pooled=is_deep,
            dropout=0.2 if is_deep else 0.0,
            over=over,
            **resnet_sizes(published, first="conv1.0", stage=r"conv\d_x"),
        ),
    )


PUBLISHED_SIZES = tuple(
    PublishedSize("MS-ResNet", size, parameters, "-", "2112.08954", build)
    for build, size, parameters in (
        (partial(ms_resnet, 18), "18", 11_693_736),
        (partial(ms_resnet, 34), "34", 21_801_896),
        (partial(ms_resnet, 104), "104", 77_350_504),
    )
)
