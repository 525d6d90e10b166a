"""Integer neurons: the number of spikes of D steps as one number, without a membrane over time.

    y[t] = k[t] / unit,   k[t] = round(clamp(x[t], 0, D))
    dy/dx = 1 / unit where 0 <= x <= D, else 0 (straight through)

k[t] is the number of spikes in D binary steps: the d-th fires where k[t] >= d (`binary_steps`). A
synapse that reads these steps and sums their currents gives the current of y, because it is linear.
So a network of such neurons is trained on numbers, in one step, and runs on spikes, in D steps. A
half is rounded to the even number, as `torch.round` does.

Source: Yao et al. 2024 (spike firing approximation, arXiv 2411.16061).
"""

# T time, B batch, D binary steps

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts


class IntegerNeuron(nn.Module):
    """`[T, B, ...]` to numbers of the same shape. It has no state.

    Args:
        levels: D, the largest number of spikes.
        unit: numbers are divided by it. None: by D, so that outputs are rates in 0..1.

    Raises: ValueError for `levels` or `unit` below 1.
    """

    def __init__(self, levels: int = 4, *, unit: int | None = None) -> None:
        super().__init__()
        self.levels = levels
        self.unit = levels if unit is None else unit
        refuse_unless_counts("IntegerNeuron", {"levels": levels, "unit": self.unit})

    def forward(self, x_TB: Tensor) -> Tensor:
        clamped_TB = x_TB.clamp(0, self.levels)
        # The difference is 0, and has the gradient of the clamp.
        return (clamped_TB.detach().round() + (clamped_TB - clamped_TB.detach())) / self.unit

    def binary_steps(self, y_TB: Tensor) -> Tensor:
        """The spikes `[D, T, B, ...]` of an output: their sum divided by `unit` is the output."""
        steps_D = torch.arange(1, self.levels + 1, device=y_TB.device)
        return ((y_TB * self.unit).round() >= steps_D.view(-1, *[1] * y_TB.dim())).to(y_TB.dtype)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, unit={self.unit}"
