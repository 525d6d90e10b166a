"""Parts of several families: copies of a neuron, pools, standardised convolutions, the rate head.

A builder takes its neuron as a module, `neuron=LIF(decay=0.5)`, in a recipe `neuron=spec(LIF,
decay=0.5)`. Each layer gets a copy. `neuron=nn.ReLU()` gives the ANN with the same layers.
"""

# T time, B batch, C channels, H W pixels

import copy
import math
from typing import Literal

from torch import Tensor, nn

from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import rate_readout
from pipeline.spiking.synapse import Conv2d, Linear, folded

Over = Literal["step", "time"]
"""statistics of batch norm: of each time step, or over time steps and samples together"""

# 1 / sqrt(p (1 - p)) = 2.737 with p = P(N(0, 1) >= 1): a spike of a unit-variance current at
# threshold 1 has unit variance after it. Rounded as published.
SPIKE_GAIN = 2.74
# The same for max(0, N(0, 1)), whose variance is (1 - 1/pi) / 2 (Brock et al. 2021, arXiv
# 2101.08692).
RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))


def copy_neuron(neuron: nn.Module) -> nn.Module:
    """A copy of the prototype, with its own parameters and state."""
    return copy.deepcopy(neuron)


def variance_gain(neuron: nn.Module) -> float:
    """The factor that restores unit variance after a neuron whose input current has unit
    variance.
    """
    if isinstance(neuron, nn.ReLU):
        return RELU_GAIN
    if not isinstance(neuron, LIF) or neuron.threshold == 1:
        return SPIKE_GAIN
    p = math.erfc(neuron.threshold / math.sqrt(2)) / 2
    return 1 / math.sqrt(p * (1 - p))


class Pool(nn.Module):
    """A pool of torch on time-first tensors."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return folded(self.pool, x_TBCHW)


def standardized_conv(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1
) -> Conv2d:
    """A convolution with standardised weights that keeps the image size up to its stride; Kaiming
    fan-out, bias 0.
    """
    conv = Conv2d(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, weights="standardized"
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def init_kaiming(model: nn.Module) -> None:
    """Draw convolutions as torchvision's ResNet does: normal, Kaiming fan-out."""
    for module in model.modules():
        if isinstance(module, Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class RateHead(nn.Module):
    """logits = readout(neuron(norm(linear(neuron(x))))): pooled features `[T, B, C]` to `[T, B,
    K]`.

    The pool yields means of spikes, and the first neuron turns them into spikes again. The last
    neuron's logits are rates; the readout weights those of LIF. With `nn.ReLU` as the neuron it is
    the head of the ANN.

    Source: Meng et al. 2022 (DSR, arXiv 2205.00459).
    """

    def __init__(self, in_features: int, classes: int, *, over: Over, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron_in = copy_neuron(neuron)
        self.linear = Linear(in_features, classes)
        self.norm = BatchNorm(classes, over=over)
        self.neuron_out = copy_neuron(neuron)
        self.readout = rate_readout(neuron)

    def forward(self, x_TBC: Tensor) -> Tensor:
        return self.readout(self.neuron_out(self.norm(self.linear(self.neuron_in(x_TBC)))))
