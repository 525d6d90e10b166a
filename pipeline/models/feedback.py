"""Feedback networks that reach an equilibrium, as IDE and SPIDE train them.

    dropout_on="readout"
        inject -> [layer 1 -> ... -> layer N -> layer 1] -> dropout -> classifier
    dropout_on="currents", as published
        inject -> [layer 1 -> ... -> layer N -> layer 1] -> classifier

`dropout` is a probability. "currents" puts a dropout after every synapse, including `inject` and
the feedback, and none before the classifier. A mask is drawn once per batch. It is the same in all
T steps and in the equation that IDE and SPIDE solve for the gradient.

Docstrings use the papers' notation. 96C3s is a 3x3 convolution with 96 output channels and stride
2. (F96C3u) is the feedback: a 3x3 transposed convolution of the last layer, with 96 output channels
and the image size of the first layer.

Source: Xiao et al. 2021 (IDE, arXiv 2109.14247); Xiao et al. 2023 (SPIDE, arXiv 2302.00232) for the
networks without norm.
"""

# T time, B batch, C channels, H W pixels, K classes

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import are_counts, refuse_unless_counts, refuse_unless_one_of, require
from pipeline.models.parts import Pool, copy_neuron
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.neuron import IF, LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.norm_limit import FrobeniusLimit, SpectralLimit
from pipeline.spiking.synapse import Conv2d, Linear, apply_folded

Norm = Literal["batch", "none"]
# Limit of the feedback's weight: "spectral" is SpectralLimit; a number limits the Frobenius norm.
Limit = Literal["spectral", "none"] | float
# Place of `dropout`: before the classifier, or after every synapse, see the head of the file.
DropoutOn = Literal["readout", "currents"]


class FeedbackNetwork(nn.Module):
    """An `Equilibrium` and a classifier: `[T, B, ...]` to logits `[T, B, K]`.

    The mean of the logits over T is the readout of the rate a[T]. `flattens` converts inputs to
    vectors.
    """

    def __init__(
        self,
        equilibrium: Equilibrium,
        *,
        features: int,
        classes: int,
        dropout: float,
        flattens: bool,
    ) -> None:
        super().__init__()
        self.equilibrium = equilibrium
        self.dropout = Dropout(dropout)
        self.classifier = Linear(features, classes)
        self.flattens = flattens

    def forward(self, x_TB: Tensor) -> Tensor:
        x_TB = x_TB.flatten(2) if self.flattens else x_TB
        return self.classifier(self.dropout(self.equilibrium(x_TB).flatten(2)))


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on `[T, B, C, H, W]`, without bias.

    For an odd kernel the image grows by the factor `stride`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            output_padding=stride - 1,
            bias=False,
        )

    def forward(  # type: ignore[override]
        self, input: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        apply = partial(
            F.conv_transpose2d,
            weight=self.weight if weight is None else weight,
            stride=self.stride[0],
            padding=self.kernel_size[0] // 2,
            output_padding=self.output_padding[0],
        )
        return apply_folded(apply, input)


class ZeroFeedback(nn.Module):
    """A map to zeros, of `shape` per sample."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x_TB: Tensor) -> Tensor:
        # The zeros are a function of x, because the solvers need a gradient.
        zeros_TB = 0 * x_TB.flatten(2).sum(2)
        return zeros_TB.view(*zeros_TB.shape, *[1] * len(self.shape)).expand(
            *zeros_TB.shape, *self.shape
        )


def fc_feedback(
    classes: int = 10,
    *,
    in_features: int = 784,
    hidden: int = 400,
    norm: Norm = "none",
    dropout: float = 0.2,
    dropout_on: DropoutOn = "readout",
    limit: Limit = "spectral",
    neuron: nn.Module = IF(threshold=2.0),
) -> FeedbackNetwork:
    """One fully connected layer with feedback to itself, 400 (F400) by default.

    It has 478,011 parameters without norm. IDE's neurons have threshold 2, which makes the limited
    feedback a contraction with factor 1/2. Published settings are `norm="batch"` on the input and
    `dropout_on="currents"`.

    Raises: ValueError for sizes below 1, or an unknown `norm`, `limit` or `dropout_on`.
    """
    refuse_unless_counts(
        "fc_feedback", {"classes": classes, "in_features": in_features, "hidden": hidden}
    )
    on_currents, on_readout = _dropout_shares(dropout, dropout_on)
    return FeedbackNetwork(
        Equilibrium(
            inject=_with_dropout(
                _with_norm(Linear(in_features, hidden, bias=norm == "none"), hidden, norm),
                on_currents,
            ),
            feedback=_with_dropout(
                _with_limit(Linear(hidden, hidden, bias=False), limit), on_currents
            ),
            neurons=[copy_neuron(neuron)],
        ),
        features=hidden,
        classes=classes,
        dropout=on_readout,
        flattens=True,
    )


def conv_feedback(
    classes: int = 10,
    *,
    in_channels: int = 1,
    size: int = 28,
    layers: Sequence[tuple[int, int, int]] = ((64, 5, 2),),
    kernel: int = 5,
    norm: Norm = "batch",
    dropout: float = 0.2,
    dropout_on: DropoutOn = "readout",
    limit: Limit = "spectral",
    neuron: nn.Module = IF(threshold=2.0),
) -> FeedbackNetwork:
    """Convolutions `(width, kernel, stride)` on images of `size` pixels, with feedback.

    The feedback is a convolution of size `kernel`, transposed if a layer after the first has a
    stride above 1. The default is 64C5s (F64C5).

    Raises: ValueError for sizes below 1, no layers, strides that do not divide the image, or an
    unknown `norm`, `limit` or `dropout_on`.
    """
    refuse_unless_counts(
        "conv_feedback",
        {"classes": classes, "in_channels": in_channels, "size": size, "kernel": kernel},
    )
    require(
        layers and all(are_counts(layer) and len(layer) == 3 for layer in layers),
        f"conv_feedback: layers must be (width, kernel, stride), each >= 1; got {tuple(layers)}",
    )
    total_stride = math.prod(stride for _, _, stride in layers)
    require(
        size % total_stride == 0,
        "conv_feedback: size must be a multiple of the product of the strides; got size="
        f"{size}, product {total_stride}",
    )
    on_currents, on_readout = _dropout_shares(dropout, dropout_on)
    widths = [in_channels, *(width for width, _, _ in layers)]
    synapses = [
        _with_dropout(_conv(in_width, *layer, norm), on_currents)
        for in_width, layer in zip(widths, layers, strict=False)
    ]
    (first, _, first_stride), last = layers[0], widths[-1]
    feedback = (
        ConvTranspose2d(last, first, kernel, total_stride // first_stride)
        if total_stride > first_stride
        else Conv2d(last, first, kernel, 1, kernel // 2, bias=False)
    )
    return FeedbackNetwork(
        Equilibrium(
            inject=synapses[0],
            feedback=_with_dropout(_with_limit(feedback, limit), on_currents),
            neurons=[copy_neuron(neuron) for _ in layers],
            synapses=synapses[1:],
        ),
        features=last * (size // total_stride) ** 2,
        classes=classes,
        dropout=on_readout,
        flattens=False,
    )


def alexnet_f(
    classes: int = 10,
    *,
    in_channels: int = 3,
    size: int = 32,
    width: float = 1.0,
    dropout: float = 0.2,
    dropout_on: DropoutOn = "readout",
    neuron: nn.Module = LIF(0.99, threshold=2.0),
) -> FeedbackNetwork:
    """AlexNet-F: 96C3s-256C3-384C3s-384C3-256C3 (F96C3u), 3,708,139 parameters at 10 classes.

    `width` scales the channels, for demos.
    """
    return conv_feedback(
        classes,
        in_channels=in_channels,
        size=size,
        layers=_five_layers((96, 256, 384, 384, 256), width),
        kernel=3,
        norm="batch",
        dropout=dropout,
        dropout_on=dropout_on,
        neuron=neuron,
    )


def cifarnet_f(
    classes: int = 10,
    *,
    in_channels: int = 3,
    size: int = 32,
    width: float = 1.0,
    dropout: float = 0.2,
    dropout_on: DropoutOn = "readout",
    neuron: nn.Module = LIF(0.99, threshold=2.0),
) -> FeedbackNetwork:
    """CIFARNet-F: 128C3s-256C3-512C3s-1024C3-512C3 (F128C3u), 11,837,579 parameters at 10 classes.

    `width` scales the channels, for demos.
    """
    return conv_feedback(
        classes,
        in_channels=in_channels,
        size=size,
        layers=_five_layers((128, 256, 512, 1024, 512), width),
        kernel=3,
        norm="batch",
        dropout=dropout,
        dropout_on=dropout_on,
        neuron=neuron,
    )


def convnet_f(
    classes: int = 10,
    *,
    in_channels: int = 1,
    size: int = 28,
    layers: Sequence[tuple[int, int, int]] = ((64, 5, 2), (64, 5, 2), (64, 5, 1)),
    kernel: int = 3,
    gain: float = 2.0,
    limit: Limit = 2.0,
    dropout: float = 0.2,
    dropout_on: DropoutOn = "readout",
    neuron: nn.Module = IF(threshold=1.0, subtract=2.0),
) -> FeedbackNetwork:
    """SPIDE's networks without norm, by default 64C5s-64C5s-64C5 (F64C3u) with 274,826 parameters.

    Weights before the classifier start as N(0, gain / fan_in), with a tenth of the standard
    deviation in an upsampling feedback. Their biases start at 0. (The published weights for CIFAR
    are rows of uniform numbers, scaled to norm 1. Rows of N(0, 1 / fan_in) have about this norm.)
    """
    network = conv_feedback(
        classes,
        in_channels=in_channels,
        size=size,
        layers=layers,
        kernel=kernel,
        norm="none",
        limit=limit,
        dropout=dropout,
        dropout_on=dropout_on,
        neuron=neuron,
    )
    _init_weights(network.equilibrium, gain)
    return network


def lenet_f(
    classes: int = 10,
    *,
    in_channels: int = 1,
    size: int = 28,
    width: float = 1.0,
    dropout: float = 0.5,
    dropout_on: DropoutOn = "readout",
    neuron: nn.Module = IF(threshold=1.0, subtract=2.0),
) -> FeedbackNetwork:
    """SPIDE's LeNet: 15C5-P2-40C5-P2-300, with neurons after the pools too, and without feedback.

    It has 606,740 parameters. Without feedback a layer reaches its equilibrium as soon as the layer
    before it has done so. `dropout_on="currents"` adds dropout after the last synapse only, as
    published.

    Raises: ValueError for sizes below 1, a `size` that is not a multiple of 4, or an unknown
    `dropout_on`.
    """
    refuse_unless_counts("lenet_f", {"classes": classes, "in_channels": in_channels, "size": size})
    require(not size % 4, f"lenet_f: size must be a multiple of 4; got size={size}")
    first, second, features = (max(1, round(channels * width)) for channels in (15, 40, 300))
    on_currents, on_readout = _dropout_shares(dropout, dropout_on)
    equilibrium = Equilibrium(
        inject=Conv2d(in_channels, first, 5, padding=2),
        feedback=ZeroFeedback((first, size, size)),
        neurons=[copy_neuron(neuron) for _ in range(5)],
        synapses=[
            Pool(nn.AvgPool2d(2)),
            Conv2d(first, second, 5, padding=2),
            Pool(nn.AvgPool2d(2)),
            _with_dropout(
                nn.Sequential(nn.Flatten(2), Linear(second * (size // 4) ** 2, features)),
                on_currents,
            ),
        ],
    )
    _init_weights(equilibrium, 2.0)
    return FeedbackNetwork(
        equilibrium, features=features, classes=classes, dropout=on_readout, flattens=False
    )


def _init_weights(equilibrium: Equilibrium, gain: float) -> None:
    """Draw weights with variance gain / fan_in, and set biases to 0.

    fan_in is the number of weights of one output. Transposed convolutions get a tenth of the
    standard deviation. The second dimension of their weights is the output.
    """
    for module in equilibrium.modules():
        if isinstance(module, Linear | Conv2d):
            nn.init.normal_(module.weight, std=math.sqrt(gain / module.weight[0].numel()))
        elif isinstance(module, ConvTranspose2d):
            nn.init.normal_(module.weight, std=0.1 * math.sqrt(gain / module.weight[:, 0].numel()))
        if isinstance(getattr(module, "bias", None), Tensor):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def _five_layers(channels: Sequence[int], width: float) -> list[tuple[int, int, int]]:
    return [
        (max(1, round(count * width)), 3, stride)
        for count, stride in zip(channels, (2, 1, 2, 1, 1), strict=True)
    ]


def _dropout_shares(dropout: float, dropout_on: DropoutOn) -> tuple[float, float]:
    """The share of dropout after each synapse, and the share before the classifier."""
    refuse_unless_one_of("feedback", ("readout", "currents"), dropout_on=dropout_on)
    return (dropout, 0.0) if dropout_on == "currents" else (0.0, dropout)


def _conv(in_channels: int, width: int, kernel: int, stride: int, norm: Norm) -> nn.Module:
    conv = Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=norm == "none")
    return _with_norm(conv, width, norm)


def _with_dropout(synapse: nn.Module, share: float) -> nn.Module:
    if share == 0:
        return synapse
    modules = list(synapse) if isinstance(synapse, nn.Sequential) else [synapse]
    return nn.Sequential(*modules, Dropout(share))


def _with_norm(synapse: nn.Module, channels: int, norm: Norm) -> nn.Module:
    refuse_unless_one_of("feedback", ("batch", "none"), norm=norm)
    return synapse if norm == "none" else nn.Sequential(synapse, BatchNorm(channels))


def _with_limit(synapse: nn.Module, limit: Limit) -> nn.Module:
    if isinstance(limit, int | float):
        return FrobeniusLimit(synapse, limit)
    require(
        limit in ("spectral", "none"),
        f"feedback: limit must be 'spectral', 'none' or a number; got limit={limit!r}",
    )
    return synapse if limit == "none" else SpectralLimit(synapse)
