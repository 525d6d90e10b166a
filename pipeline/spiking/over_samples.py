"""A neuron that takes the samples of a batch for time steps, as QKFormer's published code does behind its last attentions."""

# T time, B batch

from torch import Tensor, nn

from pipeline.spiking.neuron import LIF


class OverSamples(LIF):
    """The LIF on `[T, B, ...]`, one membrane for all samples: it runs over the B samples of a step, then over the next step's.

        u[t, b] = leak v[t, b-1] + x[t, b],      v[t, 0] = v[t-1, B],      v[0, B] = 0

    What a sample gives depends on the samples before it in its batch, and so on the order and size of the batch, on
    micro-batches and on workers. In a batch of one it is the LIF.
    """

    @classmethod
    def of(cls, neuron: nn.Module) -> "OverSamples":
        """Raises: ValueError for a neuron that is no plain LIF."""
        if type(neuron) is not LIF:
            raise ValueError(f"OverSamples: the neuron must be a LIF; got {type(neuron).__name__}")
        made = cls(neuron.leak, threshold=neuron.threshold, decay_input=neuron.decay_input, surrogate=neuron.surrogate)
        made.reset, made.subtract, made.reset_gradient = neuron.reset, neuron.subtract, neuron.reset_gradient
        return made

    def forward(self, x_TB: Tensor) -> Tensor:
        return super().forward(x_TB.flatten(0, 1).unsqueeze(1)).view_as(x_TB)
