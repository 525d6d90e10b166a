"""Dropout of single units or of residual branches, with one mask for all time steps."""

# T time, B batch

import torch
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.spiking.state import State


class Dropout(nn.Module):
    """y[t] = m x[t] / (1 - share). The mask m is 0 with probability `share`, else 1.

    The mask is drawn once per `fresh_state`, from torch's generator of the device. It is the same
    at all time steps and in every forward of a batch, so it drops units, not single spikes. In
    evaluation mode the layer is the identity.

    Raises: ValueError if share < 0, share >= 1, or a training forward is outside `fresh_state`.
    Source: Gal & Ghahramani 2016 (arXiv 1512.05287).
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        require(
            0 <= share < 1,
            f"{type(self).__name__}: share must be in 0..1, 1 excluded; got share={share}",
        )
        self.share = share
        self.state = State(type(self).__name__)

    def forward(self, x_TB: Tensor) -> Tensor:
        if not self.training or self.share == 0:
            return x_TB
        mask_B = self.state.read("mask")
        if mask_B is None:
            is_kept_B = torch.rand(self._mask_shape(x_TB[0]), device=x_TB.device) >= self.share
            mask_B = is_kept_B.to(x_TB.dtype) / (1 - self.share)
            self.state.write("mask", mask_B)
        return x_TB * mask_B

    def _mask_shape(self, x_B: Tensor) -> torch.Size:
        return x_B.shape

    def extra_repr(self) -> str:
        return f"share={self.share}"


class DropPath(Dropout):
    """Dropout of residual branches, one m per sample: `share` is the probability that m = 0. Then
    the shortcut remains.

    Source: Huang et al. 2016 (stochastic depth, arXiv 1603.09382).
    """

    def _mask_shape(self, x_B: Tensor) -> torch.Size:
        return torch.Size([len(x_B), *[1] * (x_B.dim() - 1)])
