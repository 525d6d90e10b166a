"""NF-ResNet: the normaliser-free spiking ResNet on which OTTT and SLTT report ImageNet.

    block:   h = gamma LIF(x / beta),   y = x (h through a 1x1 convolution, where the shape changes) + alpha skip_gain branch(h)

Standardised weights keep each branch at unit variance, gamma undoes the variance that the spike function takes away, beta is
the expected standard deviation of the stream, and skip_gain starts at 0: no statistics of the batch anywhere, so a
network may be run one time step at a time. The stream is real-valued, and no neuron stands before the last pool.

Source: Brock et al. 2021 (arXiv 2101.08692) for the normaliser-free net; Xiao et al. 2022 (OTTT, arXiv 2210.04195) and
Meng et al. 2023 (SLTT, arXiv 2302.14311) for the spiking one.
"""

# T time, B batch, C channels, H W pixels, K classes

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.models.parts import one_more, standardized_conv, variance_gain
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Conv2d, Linear, folded

# The weight of each branch: it adds alpha^2 to the variance of the stream.
ALPHA = 0.2


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, a neuron before each."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, *, stride: int, beta: float, neuron: nn.Module) -> None:
        super().__init__()
        self.beta = beta
        self.neuron1, self.neuron2 = one_more(neuron), one_more(neuron)
        self.gain = variance_gain(neuron)
        self.conv1 = standardized_conv(in_channels, width, 3, stride=stride)
        self.conv2 = standardized_conv(width, width, 3)
        self.downsample = _downsample(in_channels, width * self.expansion, stride=stride)
        self.skip_gain = nn.Parameter(torch.zeros(1))  # one number, not a scalar: DeepSpeed 0.19.8 cannot broadcast those

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        h = self.gain * self.neuron1(x_TBCHW / self.beta)
        shortcut = x_TBCHW if self.downsample is None else self.downsample(h)
        h = self.gain * self.neuron2(self.conv1(h))
        return torch.addcmul(shortcut, self.conv2(h), self.skip_gain, value=ALPHA)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, a neuron before each."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, *, stride: int, beta: float, neuron: nn.Module) -> None:
        super().__init__()
        self.beta = beta
        self.neuron1, self.neuron2, self.neuron3 = one_more(neuron), one_more(neuron), one_more(neuron)
        self.gain = variance_gain(neuron)
        self.conv1 = standardized_conv(in_channels, width, 1)
        self.conv2 = standardized_conv(width, width, 3, stride=stride)
        self.conv3 = standardized_conv(width, width * self.expansion, 1)
        self.downsample = _downsample(in_channels, width * self.expansion, stride=stride)
        self.skip_gain = nn.Parameter(torch.zeros(1))  # one number, not a scalar: DeepSpeed 0.19.8 cannot broadcast those

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        h = self.gain * self.neuron1(x_TBCHW / self.beta)
        shortcut = x_TBCHW if self.downsample is None else self.downsample(h)
        h = self.gain * self.neuron2(self.conv1(h))
        h = self.gain * self.neuron3(self.conv2(h))
        return torch.addcmul(shortcut, self.conv3(h), self.skip_gain, value=ALPHA)


class NFResNet(nn.Module):
    """Stem, four (or fewer) stages of blocks, global average pool, classifier: `[T, B, C, H, W]` to `[T, B, K]`.

    `stem="imagenet"` is a 7x7 convolution of stride 2 and an average pool of stride 2; `stem="small"` a 3x3 convolution of
    stride `stem_stride`, for images of 28 to 32 pixels. Stage i has `blocks[i]` blocks of width `width * 2**i`; all but
    the first start with stride 2. The classifier starts at 0, so the first logits are 0 and the first loss is ln K.

    Raises: ValueError for an unknown stem, or numbers that make no network.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        *,
        blocks: Sequence[int],
        classes: int,
        in_channels: int,
        width: int,
        stem: Literal["imagenet", "small"],
        stem_stride: int = 1,
        neuron: nn.Module,
    ) -> None:
        super().__init__()
        numbers = {"classes": classes, "in_channels": in_channels, "width": width, "stem_stride": stem_stride}
        for name, number in {**numbers, "blocks": min(blocks, default=0)}.items():
            if number < 1:
                raise ValueError(f"NFResNet: {name} must be >= 1; got {name}={number}")
        if stem not in ("imagenet", "small"):
            raise ValueError(f"NFResNet: stem must be 'imagenet' or 'small'; got stem={stem!r}")
        if stem == "imagenet":
            self.stem = standardized_conv(in_channels, width, 7, stride=2)
            self.stem_pool = nn.AvgPool2d(3, stride=2, padding=1)
        else:
            self.stem = standardized_conv(in_channels, width, 3, stride=stem_stride)
            self.stem_pool = None
        stages = []
        channels, variance = width, 1.0
        for index, count in enumerate(blocks):
            stage = []
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                stage.append(block(channels, width * 2**index, stride=stride, beta=math.sqrt(variance), neuron=neuron))
                # A block that changes the shape restarts the stream from a branch of unit variance.
                variance = (1.0 if stage[-1].downsample is not None else variance) + ALPHA**2
                channels = width * 2**index * block.expansion
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.classifier = Linear(channels, classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        h = self.stem(x_TBCHW)
        if self.stem_pool is not None:
            h = folded(self.stem_pool, h)
        return self.classifier(self.stages(h).mean((3, 4)))


def nf_resnet34(
    classes: int = 1000,
    *,
    in_channels: int = 3,
    neuron: nn.Module = LIF(),
) -> NFResNet:
    """NF-ResNet-34, 21,797,688 parameters at 1000 classes. SLTT's published leak is 1/11, OTTT's 0.5."""
    return NFResNet(
        BasicBlock, blocks=(3, 4, 6, 3), classes=classes, in_channels=in_channels, width=64, stem="imagenet", neuron=neuron
    )


def nf_resnet50(
    classes: int = 1000,
    *,
    in_channels: int = 3,
    neuron: nn.Module = LIF(),
) -> NFResNet:
    """NF-ResNet-50, 25,557,048 parameters at 1000 classes."""
    return NFResNet(
        Bottleneck, blocks=(3, 4, 6, 3), classes=classes, in_channels=in_channels, width=64, stem="imagenet", neuron=neuron
    )


def nf_resnet101(
    classes: int = 1000,
    *,
    in_channels: int = 3,
    neuron: nn.Module = LIF(),
) -> NFResNet:
    """NF-ResNet-101, 44,549,193 parameters at 1000 classes."""
    return NFResNet(
        Bottleneck, blocks=(3, 4, 23, 3), classes=classes, in_channels=in_channels, width=64, stem="imagenet", neuron=neuron
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
    """NF-ResNet-18 for 28 to 32 pixels: 3x3 stem, no stem pool. `width`, fewer `blocks` and `stem_stride` make it small."""
    return NFResNet(
        BasicBlock,
        blocks=blocks,
        classes=classes,
        in_channels=in_channels,
        width=width,
        stem="small",
        stem_stride=stem_stride,
        neuron=neuron,
    )


def _downsample(in_channels: int, out_channels: int, *, stride: int) -> Conv2d | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return standardized_conv(in_channels, out_channels, 1, stride=stride)
