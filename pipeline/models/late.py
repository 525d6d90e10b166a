"""A readout that listens late: for recordings whose class shows in how they go on, not in how they
begin.

    y[t] = T / n x[t]  in the last n of T steps,  0 before;        n = share T, rounded, 1 or more

The mean over T of y is the mean of x over the late steps, which is what predicts. The loss of an
early step is that of logits 0, log K and without gradient, so the loss that is differentiated is
the one of the late steps.
"""

# T time, B batch, K classes

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts
from pipeline.spiking.state import State


class Late(nn.Module):
    """The equation above; it counts time steps from `fresh_state` on, so slices of any length do.

    `time_steps`: T, which slices do not show.

    Raises: ValueError for a share outside 0..1 or fewer than one step (when made), and for more
    steps than T."""

    def __init__(self, *, share: float, time_steps: int) -> None:
        super().__init__()
        refuse_unless_counts("Late", {"time_steps": time_steps})
        if not 0 < share <= 1:
            raise ValueError(f"Late: share must be in 0..1, 0 excluded; got share={share}")
        self.time_steps = time_steps
        self.late = max(1, round(share * time_steps))
        self.state = State("Late")

    def forward(self, x_TBK: Tensor) -> Tensor:
        seen = self.state.read("seen")
        first = 0 if seen is None else int(seen)
        last = first + len(x_TBK)
        if last > self.time_steps:
            raise ValueError(
                f"Late: a recording must have its {self.time_steps} time steps; got step {last}"
            )
        self.state.write("seen", torch.tensor(last))
        speaks = [step >= self.time_steps - self.late for step in range(first, last)]
        scale_T = x_TBK.new_tensor(speaks) * (self.time_steps / self.late)
        return x_TBK * scale_T.view(-1, *[1] * (x_TBK.dim() - 1))

    def extra_repr(self) -> str:
        return f"late={self.late}, time_steps={self.time_steps}"


def late(network: nn.Module, *, share: float = 0.5, time_steps: int) -> nn.Sequential:
    """`network`, heard in the last `share` of its `time_steps`."""
    return nn.Sequential(network, Late(share=share, time_steps=time_steps))
