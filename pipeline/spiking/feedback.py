"""What a network hands back to itself across a time step, other than a membrane."""

# T time, B batch

from collections.abc import Callable

from torch import Tensor, nn

from pipeline.spiking.neuron import identity
from pipeline.spiking.state import State


class Feedback(nn.Module):
    """h[t-1] at time t: `recall` before it is needed, `keep` when h[t] is known. Both hold one step, `[1, B, ...]`.

    A model with feedback runs its time steps one after another, whatever the length of the slice that it is given.
    The seam `carry` is applied to what is kept, as in `LIF`: the identity under BPTT, detach under online rules.

    Raises: ValueError outside `fresh_state`, or when more than one step is kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.carry: Callable[[Tensor], Tensor] = identity
        self.state = State("Feedback")

    def recall(self) -> Tensor | None:
        """h[t-1], or None at the first time step of a batch."""
        return self.state.read("h")

    def keep(self, h_TB: Tensor) -> None:
        if h_TB.shape[0] != 1:
            raise ValueError(f"Feedback: keep must be handed one time step, [1, B, ...]; got shape {tuple(h_TB.shape)}")
        self.state.write("h", self.carry(h_TB))
