"""Other weights than the forward ones to carry an error down, for the seam `backward_weight` of a synapse.

    dL/dx = B^T g,      B = sign(W) / sqrt(fan_in)   (sign-symmetric)      or      B fixed and random   (feedback alignment)

Source: Liao et al. 2016 (arXiv 1510.05067) for signs; Lillicrap et al. 2016 (doi 10.1038/ncomms13276) for random feedback;
the scale of the signs is HLOP's (Xiao et al. 2024, arXiv 2402.11984).
"""

import math

import torch
from torch import Tensor


def sign_symmetric(weight: Tensor) -> Tensor:
    """sign(W) / sqrt(fan_in)."""
    return weight.sign() / math.sqrt(weight[0].numel())


class FixedFeedback:
    """B, drawn once from `key` alone: normal, of variance 1 / fan_in, in the shape of the weight."""

    def __init__(self, weight: Tensor, *, key: int) -> None:
        generator = torch.Generator().manual_seed(key & 0x7FFF_FFFF_FFFF_FFFF)
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64) / math.sqrt(weight[0].numel())
        self.matrix = drawn.to(weight.device, weight.dtype)

    def __call__(self, weight: Tensor) -> Tensor:
        return self.matrix
