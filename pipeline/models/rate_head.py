"""The classifier of rate-coded networks, which ends in neurons and has one before it."""

# T time, B batch, C channels, K classes

from typing import Literal

from torch import Tensor, nn

from pipeline.models.parts import one_more
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import rate_readout
from pipeline.spiking.synapse import Linear


class RateHead(nn.Module):
    """logits = readout(neuron(norm(linear(neuron(x))))): `[T, B, C]`, as pooled, to `[T, B, K]`.

    The pool leaves means of spikes, the first neuron makes them spikes again; the last one gives logits that are rates, of
    which LIF's are weighted by the readout. With `nn.ReLU` as the neuron it is the head of the ANN.

    Source: Meng et al. 2022 (DSR, arXiv 2205.00459).
    """

    def __init__(self, in_features: int, classes: int, *, over: Literal["step", "time"], neuron: nn.Module) -> None:
        super().__init__()
        self.neuron_in = one_more(neuron)
        self.linear = Linear(in_features, classes)
        self.norm = BatchNorm(classes, over=over)
        self.neuron_out = one_more(neuron)
        self.readout = rate_readout(neuron)

    def forward(self, x_TBC: Tensor) -> Tensor:
        return self.readout(self.neuron_out(self.norm(self.linear(self.neuron_in(x_TBC)))))
