"""Plain convolutional networks: `[T, B, C, H, W]` to logits `[T, B, K]`.

    per layer:   h = neuron(norm(convolution(h)))
    an average pool between stages, and one before the classifier

In evaluation every map between two neurons is affine, so the network works on spikes, on rates and
with ReLU. `head="linear"` is a linear classifier. `head="rate"` ends in neurons (`RateHead`), as in
DSR's networks.

Source: Meng et al. 2022 (DSR, arXiv 2205.00459) for `head="rate"`.
"""

# T time, B batch, C channels, H W pixels, K classes

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from pipeline.core.checks import (
    are_counts,
    is_count,
    refuse_unless_counts,
    refuse_unless_one_of,
    require,
)
from pipeline.models.parts import MeanPool, RateHead, StatisticsOver, copy_neuron
from pipeline.spiking.dropout import Dropout
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import rate_readout
from pipeline.spiking.synapse import Conv2d, Linear, apply_folded

Norm = Literal["batch", "none"]
Mask = Literal["batch", "step"]
Head = Literal["linear", "rate"]


class Layer(nn.Module):
    """h = dropout(neuron(norm(convolution(h)))).

    The image size changes only by the stride. The convolution has a bias if there is no norm.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        kernel: int,
        stride: int,
        norm: Norm,
        over: StatisticsOver,
        dropout: float,
        mask: Mask,
        neuron: nn.Module,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=norm == "none")
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm = BatchNorm(width, over=over) if norm == "batch" else nn.Identity()
        self.neuron = copy_neuron(neuron)
        self.dropout = nn.Identity()
        if dropout > 0:
            self.dropout = Dropout(dropout) if mask == "batch" else nn.Dropout(dropout)

    def forward(self, h_TBCHW: Tensor) -> Tensor:
        return self.dropout(self.neuron(self.norm(self.conv(h_TBCHW))))


class ConvNet(nn.Module):
    """Stages of layers, see the top of the file. `convnet` explains the arguments.

    Raises: ValueError for no or empty stages, sizes below 1, an even kernel, a dropout below 0 or
    from 1 on, an unknown choice, over="time" without any batch norm, or mask="step" without
    dropout; in `forward` for an image too small for the pools.
    """

    def __init__(
        self,
        *,
        stages: Sequence[Sequence[int]],
        classes: int,
        in_channels: int,
        kernel: int,
        stem_stride: int,
        norm: Norm,
        over: StatisticsOver,
        grid: int,
        dropout: float,
        mask: Mask,
        head: Head,
        neuron: nn.Module,
    ) -> None:
        super().__init__()
        require(
            stages and all(are_counts(widths) for widths in stages),
            f"ConvNet: each stage must hold at least one width >= 1; got stages={stages}",
        )
        require(
            is_count(kernel) and kernel % 2 != 0,
            f"ConvNet: kernel must be odd, to keep the size of the image; got kernel={kernel}",
        )
        refuse_unless_counts(
            "ConvNet",
            {
                "classes": classes,
                "in_channels": in_channels,
                "stem_stride": stem_stride,
                "grid": grid,
            },
        )
        refuse_unless_one_of("ConvNet", ("batch", "none"), norm=norm)
        refuse_unless_one_of("ConvNet", ("linear", "rate"), head=head)
        refuse_unless_one_of("ConvNet", ("batch", "step"), mask=mask)
        require(
            norm != "none" or head != "linear" or over == "step",
            f"ConvNet: over must be 'step' without batch norm; got {over=}",
        )
        require(
            0 <= dropout < 1,
            f"ConvNet: dropout must be in 0..1, 1 excluded; got dropout={dropout}",
        )
        require(
            mask == "batch" or dropout != 0,
            f"ConvNet: mask must be 'batch' without dropout; got {mask=}",
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
                        kernel=kernel,
                        stride=1 if len(self.stages) or len(layers) else stem_stride,
                        norm=norm,
                        over=over,
                        dropout=dropout,
                        mask=mask,
                        neuron=neuron,
                    )
                )
                channels = width
            self.stages.append(layers)
        self.pool = MeanPool(2)
        self.grid = grid
        self.last_pool = nn.AdaptiveAvgPool2d(grid)
        self.min_pixels = (grid * 2 ** (len(stages) - 1) - 1) * stem_stride + 1
        features = channels * grid**2
        self.classifier = (
            RateHead(features, classes, over=over, neuron=neuron)
            if head == "rate"
            else Linear(features, classes)
        )
        self.readout = rate_readout(neuron) if head == "linear" else nn.Identity()

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        if min(x_TBCHW.shape[-2:]) < self.min_pixels:
            raise ValueError(
                f"ConvNet: an image must have at least {self.min_pixels} pixels a side for"
                f" {len(self.stages)} stages, grid={self.grid} and this stem_stride; got"
                f" {tuple(x_TBCHW.shape[-2:])}"
            )
        h = x_TBCHW
        for index, layers in enumerate(self.stages):
            h = layers(h if index == 0 else apply_folded(self.pool, h))
        # Without this condition torch 2.13 spends 9 % of a step on a pool without effect.
        if h.shape[-2:] != (self.grid, self.grid):
            h = apply_folded(self.last_pool, h)
        return self.readout(self.classifier(h.flatten(2)))


def convnet(
    classes: int = 10,
    *,
    in_channels: int = 3,
    stages: Sequence[Sequence[int]] = ((32,), (64,), (128,)),
    kernel: int = 3,
    stem_stride: int = 1,
    norm: Norm = "batch",
    over: StatisticsOver = "step",
    grid: int = 1,
    dropout: float = 0.0,
    mask: Mask = "batch",
    head: Head = "linear",
    neuron: nn.Module = LIF(),
) -> ConvNet:
    """A network for small images.

    Args:
        stages: widths of the layers of each stage.
        stem_stride: stride of the first convolution.
        over: batch norm takes its statistics over the samples of each step ("step"), or over all
            steps and samples ("time").
        grid: the last pool leaves `grid` x `grid` values per channel; 1 is a global pool.
        dropout: probability of dropping an output of a neuron.
        mask: dropout draws a mask per batch ("batch"), or per time step ("step", as in DSR). Masks
            per step depend on how a rule slices time, even for the same seed.
        head: "linear" or "rate", see the top of the file.
    """
    return ConvNet(
        stages=stages,
        classes=classes,
        in_channels=in_channels,
        kernel=kernel,
        stem_stride=stem_stride,
        norm=norm,
        over=over,
        grid=grid,
        dropout=dropout,
        mask=mask,
        head=head,
        neuron=neuron,
    )
