"""Fully connected networks: `[T, B, ...]` to `[T, B, K]`, with a neuron after each hidden layer."""

# T time, B batch, K classes

from collections.abc import Sequence

from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts
from pipeline.models.parts import copy_neuron
from pipeline.spiking.neuron import LIF
from pipeline.spiking.rate import rate_readout
from pipeline.spiking.synapse import Linear, Weights


class MLP(nn.Module):
    """A linear layer and a neuron for each width in `hidden`, and then a linear classifier.

    The input is flattened first. For leaky rate neurons, the readout multiplies each time step by a
    weight (`rate_readout`).

    Raises: ValueError for sizes below 1.
    """

    def __init__(
        self,
        *,
        in_features: int,
        hidden: Sequence[int],
        classes: int,
        bias: bool,
        weights: Weights,
        neuron: nn.Module,
    ) -> None:
        super().__init__()
        refuse_unless_counts(
            "MLP",
            {
                "in_features": in_features,
                "classes": classes,
                **({"hidden": hidden} if hidden else {}),
            },
        )
        self.layers = nn.Sequential()
        size = in_features
        for width in hidden:
            self.layers.extend([Linear(size, width, bias, weights=weights), copy_neuron(neuron)])
            size = width
        self.classifier = Linear(size, classes, bias)
        self.readout = rate_readout(neuron)

    def forward(self, x_TB: Tensor) -> Tensor:
        return self.readout(self.classifier(self.layers(x_TB.flatten(2))))


def mlp(
    classes: int = 10,
    *,
    in_features: int = 784,
    hidden: Sequence[int] = (800, 800),
    bias: bool = True,
    weights: Weights = "plain",
    neuron: nn.Module = LIF(),
) -> MLP:
    """A network 784-800-800-10 by default. HLOP's published network has no bias."""
    return MLP(
        in_features=in_features,
        hidden=hidden,
        classes=classes,
        bias=bias,
        weights=weights,
        neuron=neuron,
    )
