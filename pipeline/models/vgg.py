"""VGG with scaled weight standardisation: OTTT's network for CIFAR and event data.

    per layer:   h = gamma LIF(sWS convolution(h)),   an average pool between stages, a global one before the classifier

Source: Xiao et al. 2022 (OTTT, arXiv 2210.04195), section 5 and appendix.
"""

# T time, B batch, C channels, H W pixels, K classes

from collections.abc import Sequence

from torch import Tensor, nn

from pipeline.models.parts import one_more, standardized_conv, variance_gain
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear, folded


class Layer(nn.Module):
    """h = gamma LIF(sWS convolution(h))."""

    def __init__(self, in_channels: int, width: int, *, neuron: nn.Module) -> None:
        super().__init__()
        self.conv = standardized_conv(in_channels, width, 3)
        self.neuron = one_more(neuron)
        self.gain = variance_gain(neuron)

    def forward(self, h_TBCHW: Tensor) -> Tensor:
        return self.gain * self.neuron(self.conv(h_TBCHW))


class VGG(nn.Module):
    """3x3 convolutions with a neuron after each, `stages` of widths: `[T, B, C, H, W]` to `[T, B, K]`.

    Raises: ValueError for an empty stage, or an image too small for the pools between the stages.
    """

    def __init__(self, *, stages: Sequence[Sequence[int]], classes: int, in_channels: int, neuron: nn.Module) -> None:
        super().__init__()
        if not stages or any(not widths or min(widths) < 1 for widths in stages):
            raise ValueError(f"VGG: each stage must hold at least one width >= 1; got stages={stages}")
        if classes < 1 or in_channels < 1:
            raise ValueError(f"VGG: classes and in_channels must be >= 1; got classes={classes}, in_channels={in_channels}")
        self.stages = nn.ModuleList()
        channels = in_channels
        for widths in stages:
            layers = nn.Sequential()
            for width in widths:
                layers.append(Layer(channels, width, neuron=neuron))
                channels = width
            self.stages.append(layers)
        self.pool = nn.AvgPool2d(2)
        self.classifier = Linear(channels, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        smallest = 2 ** (len(self.stages) - 1)
        if min(x_TBCHW.shape[-2:]) < smallest:
            raise ValueError(
                f"VGG: {len(self.stages)} stages, the image halved between them, need {smallest} pixels a side; "
                f"got {tuple(x_TBCHW.shape[-2:])}"
            )
        h = x_TBCHW
        for index, layers in enumerate(self.stages):
            h = layers(h if index == 0 else folded(self.pool, h))
        return self.classifier(h.mean((3, 4)))


def vgg_sws(
    classes: int = 10,
    *,
    in_channels: int = 3,
    stages: Sequence[Sequence[int]] = ((64, 128), (256, 256), (512, 512), (512, 512)),
    neuron: nn.Module = LIF(),
) -> VGG:
    """VGG-sWS, 9,228,362 parameters at 10 classes and 3 channels; narrower `stages` for demos.

    OTTT's neuron is LIF(surrogate=Sigmoid(4)).
    """
    return VGG(stages=stages, classes=classes, in_channels=in_channels, neuron=neuron)
