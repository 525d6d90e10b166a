"""VGG with scaled weight standardisation: OTTT's network for CIFAR and event data.

    per layer:   h = gamma LIF(sWS convolution(h))
    an average pool between stages, a global one before the classifier

gamma restores the variance that the spikes remove. VGG-F feeds its last features back to its first
layer, one time step later:

    first layer:   h[t] = gamma LIF(sWS convolution(x[t]) + convolution(upsampled h_last[t-1]))

The second convolution starts at zero, so VGG-F starts as VGG. At the first time step the second
convolution contributes nothing, not even its bias.

Source: Xiao et al. 2022 (OTTT, arXiv 2210.04195), section 5 and appendix.
"""

# T time, B batch, C channels, H W pixels, K classes

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import are_counts, refuse_unless_counts, refuse_unless_one_of, require
from pipeline.models.parts import (
    MeanPool,
    copy_neuron,
    scaled_spikes,
    standardized_conv,
    variance_gain,
)
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.neuron import LIF, identity
from pipeline.spiking.slice_cache import StaticInput
from pipeline.spiking.state import State
from pipeline.spiking.synapse import Conv2d, Linear, apply_folded


class Layer(nn.Module):
    """h = dropout(gamma LIF(sWS convolution(h) + feedback(h))); the feedback is optional.

    The first layer of a network computes its convolution once for a static input.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        is_first: bool,
        stem: tuple[int, int],
        dropout: float,
        neuron: nn.Module,
    ) -> None:
        super().__init__()
        kernel, stride = stem if is_first else (3, 1)
        conv = standardized_conv(in_channels, width, kernel, stride=stride)
        self.conv = StaticInput(conv) if is_first else conv
        self.neuron = copy_neuron(neuron)
        self.gain = variance_gain(neuron)
        self.dropout = Dropout(dropout)

    def forward(self, h_TBCHW: Tensor, feedback: nn.Module | None = None) -> Tensor:
        current_TBCHW = self.conv(h_TBCHW)
        if feedback is not None:
            current_TBCHW = current_TBCHW + feedback(h_TBCHW)
        return self.dropout(scaled_spikes(self.neuron, current_TBCHW, gain=self.gain))


class FeedbackConv(nn.Module):
    """The current from the last features h[t-1] into the first layer.

    The features are upsampled to the size of x[t] with nearest neighbours, then a 3x3 convolution
    is applied. At the first time step the current is zero, without the bias, as published. `store`
    stores h[t] as one step `[1, B, ...]`, so a network with feedback runs its time steps one after
    another. `carry` is applied to stored features, as in `LIF`: the identity under BPTT, detach
    under online rules.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.carry: Callable[[Tensor], Tensor] = identity
        self.state = State("FeedbackConv")
        self.conv = Conv2d(channels, width, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        h_TBCHW = self.state.read("h")
        if h_TBCHW is None:
            return x_TBCHW.new_zeros(())
        return self.conv(
            apply_folded(
                lambda h_NCHW: F.interpolate(h_NCHW, x_TBCHW.shape[3:], mode="nearest"), h_TBCHW
            )
        )

    def store(self, h_1BCHW: Tensor) -> None:
        self.state.write("h", self.carry(h_1BCHW))


class VGG(nn.Module):
    """3x3 convolutions with a neuron after each: `[T, B, C, H, W]` to `[T, B, K]`.

    Args:
        stages: widths of the layers of each stage.
        stem: (kernel, stride) of the first convolution. (5, 2) needs a quarter of the time on
            images of 28 pixels.
        dropout: share of neurons whose spikes are dropped. The neurons are the same in all time
            steps of a batch.
        feedback: "last" is VGG-F, which runs the time steps of each input one after another.

    Raises: ValueError for an empty stage, sizes below 1, an even kernel or a stride below 1 in
    `stem`, an unknown feedback, or a feedback with a stem stride above 1; in `forward` for an
    image too small for the pools.
    """

    def __init__(
        self,
        *,
        stages: Sequence[Sequence[int]],
        classes: int,
        in_channels: int,
        stem: tuple[int, int] = (3, 1),
        dropout: float = 0.0,
        feedback: Literal["none", "last"] = "none",
        neuron: nn.Module,
    ) -> None:
        super().__init__()
        require(
            stages and all(are_counts(widths) for widths in stages),
            f"VGG: each stage must hold at least one width >= 1; got stages={stages}",
        )
        refuse_unless_counts("VGG", {"classes": classes, "in_channels": in_channels})
        refuse_unless_one_of("VGG", ("none", "last"), feedback=feedback)
        require(
            are_counts(stem) and len(stem) == 2 and stem[0] % 2 != 0,
            f"VGG: stem must be an odd kernel and a stride >= 1; got stem={stem}",
        )
        require(
            feedback != "last" or stem[1] == 1,
            "VGG: the stride of stem must be 1 with feedback='last', to keep the size of the image;"
            f" got {stem=}",
        )
        self.stages = nn.ModuleList()
        channels = in_channels
        for widths in stages:
            layers = nn.Sequential()
            for width in widths:
                layers.append(
                    Layer(
                        channels,
                        width,
                        is_first=not self.stages and not layers,
                        stem=stem,
                        dropout=dropout,
                        neuron=neuron,
                    )
                )
                channels = width
            self.stages.append(layers)
        self.pool = MeanPool(2)
        self.min_pixels = stem[1] * 2 ** (len(stages) - 1)
        self.feedback = FeedbackConv(channels, stages[0][0]) if feedback == "last" else None
        self.classifier = Linear(channels, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        if min(x_TBCHW.shape[-2:]) < self.min_pixels:
            raise ValueError(
                f"VGG: an image must have at least {self.min_pixels} pixels a side for"
                f" {len(self.stages)} stages and this stem; got {tuple(x_TBCHW.shape[-2:])}"
            )
        if self.feedback is None:
            return self.classifier(self._features(x_TBCHW).mean((3, 4)))
        logits = []
        for x_1BCHW in x_TBCHW.split(1):
            h_1BCHW = self._features(x_1BCHW)
            self.feedback.store(h_1BCHW)
            logits.append(self.classifier(h_1BCHW.mean((3, 4))))
        return torch.cat(logits)

    def _features(self, x_TBCHW: Tensor) -> Tensor:
        first, *others = self.stages[0].children()
        h = first(x_TBCHW, self.feedback)
        for layer in others:
            h = layer(h)
        for layers in self.stages[1:]:
            h = layers(apply_folded(self.pool, h))
        return h


def vgg_sws(
    classes: int = 10,
    *,
    in_channels: int = 3,
    stages: Sequence[Sequence[int]] = ((64, 128), (256, 256), (512, 512), (512, 512)),
    stem: tuple[int, int] = (3, 1),
    dropout: float = 0.0,
    neuron: nn.Module = LIF(),
) -> VGG:
    """VGG-sWS, 9,228,362 parameters at 10 classes and 3 channels. Demos use smaller `stages`.

    OTTT's neuron is LIF(surrogate=Sigmoid(4)). Its dropout is 0.1 on event data and 0 on images.
    `stages`, `stem` and `dropout`, a probability, are those of `VGG`.
    """
    return VGG(
        stages=stages,
        classes=classes,
        in_channels=in_channels,
        stem=stem,
        dropout=dropout,
        neuron=neuron,
    )


def vgg_sws_f(
    classes: int = 10,
    *,
    in_channels: int = 3,
    stages: Sequence[Sequence[int]] = ((64, 128), (256, 256), (512, 512), (512, 512)),
    neuron: nn.Module = LIF(),
) -> VGG:
    """VGG-F: VGG-sWS with feedback, 9,523,338 parameters at 10 classes and 3 channels."""
    return VGG(
        stages=stages, classes=classes, in_channels=in_channels, feedback="last", neuron=neuron
    )
