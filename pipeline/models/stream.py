"""The stream of a residual network: what adds to it, what widens and narrows it, and the variance
that it has by then.

Which of them stand in a network, and where, is decided in `models/residual.py`.
"""

# T time, B batch, C channels, H W pixels

from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.spiking.dropout import DropPath

ShortcutOf = Literal["stream", "first"]

# The weight of each normaliser-free branch: it adds ALPHA^2 to the variance of the stream.
ALPHA = 0.2


class Residual(nn.Module):
    """h = first(x), y = last(shortcut + branch(h)), the shortcut of x or of h; with `alpha` the
    branch has a learnable weight.
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        *,
        first: nn.Module | None = None,
        last: nn.Module | None = None,
        shortcut_of: ShortcutOf = "stream",
        alpha: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.first = nn.Identity() if first is None else first
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.last = nn.Identity() if last is None else last
        self.shortcut_of = shortcut_of
        self.alpha = alpha
        # One number, not a scalar: DeepSpeed 0.19.8 cannot broadcast those.
        self.skip_gain = None if alpha is None else nn.Parameter(torch.zeros(1))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x_TBCHW: Tensor) -> Tensor:
        h = self.first(x_TBCHW)
        carried = self.shortcut(h if self.shortcut_of == "first" else x_TBCHW)
        added = self.drop_path(self.branch(h))
        if self.skip_gain is None or self.alpha is None:
            return self.last(carried + added)
        return self.last(torch.addcmul(carried, added, self.skip_gain, value=self.alpha))


class Repeat(nn.Module):
    """`[T, B, C, ...]` to `[T, B, times C, ...]`: all channels once more, as often as that."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x_TBC: Tensor) -> Tensor:
        return torch.cat([x_TBC] * self.times, dim=2)


class GroupMean(nn.Module):
    """`[T, B, group C, ...]` to `[T, B, C, ...]`: the mean over the copies that `Repeat` made, so
    that it undoes it.
    """

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, x_TBC: Tensor) -> Tensor:
        return x_TBC.unflatten(2, (self.group, -1)).mean(2)


class Rescaled(nn.Module):
    """gain L(x / beta): spikes of unit variance from a current of variance beta^2."""

    def __init__(self, neuron: nn.Module, *, gain: float, beta: float = 1.0) -> None:
        super().__init__()
        self.neuron = neuron
        self.gain = gain
        self.beta = beta

    def forward(self, x_TB: Tensor) -> Tensor:
        return self.gain * self.neuron(x_TB / self.beta if self.beta != 1 else x_TB)

    def extra_repr(self) -> str:
        return f"gain={self.gain:.4g}, beta={self.beta:.4g}"


class StreamVariance:
    """The expected variance of a normaliser-free stream: 1 behind a standardised synapse, ALPHA^2
    more for each branch.
    """

    def __init__(self) -> None:
        self.shared = 1.0
        self.own = 0.0  # what each copy of a repeated stream got by itself

    @property
    def variance(self) -> float:
        return self.shared + self.own

    def add(self) -> None:
        if self.own:
            self.own += ALPHA**2
        else:
            self.shared += ALPHA**2

    def repeat(self) -> None:
        self.own += ALPHA**2

    def average(self, group: int) -> None:
        """Over the copies: what they share stays, what is their own is divided."""
        self.shared += self.own / group + ALPHA**2
        self.own = 0.0

    def restart(self) -> None:
        self.shared, self.own = 1.0 + ALPHA**2, 0.0
