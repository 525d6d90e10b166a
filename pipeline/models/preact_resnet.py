"""PreAct-ResNet: DSR's network for CIFAR and ImageNet, and SLTT's for CIFAR.

    block:   h = neuron(norm(x))
             y = convolution(neuron(norm(convolution(h)))) + h
             where the shape changes, the shortcut is a 1x1 convolution of h

The shortcut therefore always reads spikes, whereas He et al.'s identity shortcut reads x. All
pools are average pools. Norm, neuron, a global pool and the head follow the last block. The head
"rate" ends in neurons (`RateHead`), the head "linear" is a linear classifier.

Source: He et al. 2016 (arXiv 1603.05027); Meng et al. 2022 (DSR, arXiv 2205.00459) and Meng et al.
2023 (SLTT, arXiv 2302.14311) for the spiking form.
"""

# T time, B batch, C channels, H W pixels, K classes

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of
from pipeline.models.parts import Pool, RateHead, StatisticsOver, copy_neuron
from pipeline.models.published import (
    RESNET_STAGES,
    PublishedNames,
    PublishedSize,
    load_published,
    resnet_sizes,
)
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateIF, rate_readout
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.synapse import Conv2d, Linear

Head = Literal["rate", "linear"]

# Of DSR's network for ImageNet. That for CIFAR has biases, which ours has not.
NAMES = PublishedNames(
    (
        (r"^stem\.0\.", "conv1."),
        (r"^stem\.1\.", "bn1."),
        (r"^stem_spikes\.0\.", "relu1."),
        (r"^norm\.", "bn2."),
        (r"^neuron\.", "relu2."),
        (r"^classifier\.neuron_in\.", "relu3."),
        (r"^classifier\.linear\.", "fc."),
        (r"^classifier\.norm\.", "bn3."),
        (r"^classifier\.neuron_out\.", "relu4."),
        *RESNET_STAGES,
        (r"\.norm(\d)\.", r".bn\1."),
        (r"\.neuron(\d)\.", r".relu\1."),
        (r"\.shortcut\.", ".downsample."),
        (r"\.threshold$", ".Vth"),
    ),
    flat=r"\.Vth$",
)


class Block(nn.Module):
    """Two 3x3 convolutions, with norm and neuron before each."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int,
        has_shortcut_norm: bool,
        over: StatisticsOver,
        neuron: nn.Module,
    ) -> None:
        super().__init__()
        self.norm1, self.neuron1 = BatchNorm(in_channels, over=over), copy_neuron(neuron)
        self.conv1 = _conv(in_channels, width, 3, stride=stride)
        self.norm2, self.neuron2 = BatchNorm(width, over=over), copy_neuron(neuron)
        self.conv2 = _conv(width, width, 3)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != width:
            self.shortcut.append(_conv(in_channels, width, 1, stride=stride))
            if has_shortcut_norm:
                self.shortcut.append(BatchNorm(width, over=over))

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        h = self.neuron1(self.norm1(x_TBCHW))
        return self.conv2(self.neuron2(self.norm2(self.conv1(h)))) + self.shortcut(h)


class PreActResNet(nn.Module):
    """Stem, stages of blocks, head: `[T, B, C, H, W]` to `[T, B, K]`.

    `stem="imagenet"` is a 7x7 convolution with norm, neuron and pool. The 1x1 convolutions of the
    shortcuts then have norms. `stem="small"` is a 3x3 convolution, and the shortcuts have no norms.

    Raises: ValueError for an unknown `stem` or `head`, or sizes below 1.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int],
        classes: int,
        in_channels: int,
        width: int,
        stem: Literal["imagenet", "small"],
        head: Head,
        over: StatisticsOver,
        neuron: nn.Module,
    ) -> None:
        super().__init__()
        refuse_unless_counts(
            "PreActResNet",
            {"classes": classes, "in_channels": in_channels, "width": width, "blocks": blocks},
        )
        refuse_unless_one_of("PreActResNet", ("imagenet", "small"), stem=stem)
        refuse_unless_one_of("PreActResNet", ("rate", "linear"), head=head)
        self.published = NAMES if (stem, head) == ("imagenet", "rate") else None
        self.stem, self.stem_spikes = StaticInput(), nn.Sequential()
        if stem == "imagenet":
            self.stem.extend([_conv(in_channels, width, 7, stride=2), BatchNorm(width, over=over)])
            self.stem_spikes.extend(
                [copy_neuron(neuron), Pool(nn.AvgPool2d(3, stride=2, padding=1))]
            )
        else:
            self.stem.append(_conv(in_channels, width, 3))
        self.stages = nn.Sequential()
        channels = width
        for index, count in enumerate(blocks):
            stage = nn.Sequential()
            for position in range(count):
                stage.append(
                    Block(
                        channels,
                        width * 2**index,
                        stride=2 if index > 0 and position == 0 else 1,
                        has_shortcut_norm=stem == "imagenet",
                        over=over,
                        neuron=neuron,
                    )
                )
                channels = width * 2**index
            self.stages.append(stage)
        self.norm, self.neuron = BatchNorm(channels, over=over), copy_neuron(neuron)
        self.classifier = (
            RateHead(channels, classes, over=over, neuron=neuron)
            if head == "rate"
            else Linear(channels, classes)
        )
        self.readout = rate_readout(neuron) if head == "linear" else nn.Identity()

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        h = self.stages(self.stem_spikes(self.stem(x_TBCHW)))
        return self.readout(self.classifier(self.neuron(self.norm(h)).mean((3, 4))))


def preact_resnet18(
    classes: int = 1000,
    *,
    in_channels: int = 3,
    over: StatisticsOver = "time",
    neuron: nn.Module = RateIF(),
) -> PreActResNet:
    """PreAct-ResNet-18 for ImageNet, 11.69 M parameters. Published with `over="time"`."""
    return PreActResNet(
        blocks=(2, 2, 2, 2),
        classes=classes,
        in_channels=in_channels,
        width=64,
        stem="imagenet",
        head="rate",
        over=over,
        neuron=neuron,
    )


def preact_resnet18_small(
    classes: int = 10,
    *,
    in_channels: int = 3,
    width: int = 64,
    blocks: Sequence[int] = (2, 2, 2, 2),
    head: Head = "rate",
    over: StatisticsOver = "time",
    neuron: nn.Module = RateIF(),
) -> PreActResNet:
    """PreAct-ResNet-18 for images of 28 to 32 pixels: 3x3 stem, no stem pool.

    Smaller networks have another `width` or other `blocks`. The published convolutions have biases.
    The convolutions here have none, because the next batch norm would remove them. SLTT's network
    is `head="linear", over="step", neuron=LIF(1 / 11)`.
    """
    return PreActResNet(
        blocks=blocks,
        classes=classes,
        in_channels=in_channels,
        width=width,
        stem="small",
        head=head,
        over=over,
        neuron=neuron,
    )


def from_published(
    published: Mapping[str, Tensor],
    *,
    over: StatisticsOver = "time",
    neuron: nn.Module = RateIF(threshold_gradient=0.001),
) -> PreActResNet:
    """A PreAct-ResNet-18 or -34 with DSR's weights for ImageNet.

    Its sizes are those of the tensors. Of the neuron the tensors show the threshold alone. The
    default is the published IF.

    Raises: ValueError for missing or unknown tensors, or tensors of another shape.
    """
    return load_published(
        published,
        lambda: PreActResNet(
            stem="imagenet", head="rate", over=over, neuron=neuron, **resnet_sizes(published)
        ),
    )


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> Conv2d:
    conv = Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


PUBLISHED_SIZES = (
    PublishedSize(
        "PreAct-ResNet",
        "18",
        11_691_660,
        "67.74, T=50, unconfirmed",
        "2205.00459",
        preact_resnet18,
    ),
)
