"""Other weights than the forward ones to carry an error down, for the seam `backward_weight` of a
synapse.

    dL/dx = B^T g,      B = scale sign(W)   (sign-symmetric)      or      B fixed and random
    (feedback alignment)

Source: Liao et al. 2016 (arXiv 1510.05067) for signs; Lillicrap et al. 2016 (doi
10.1038/ncomms13276) for random feedback; both scales are those of HLOP's code (Xiao et al. 2024,
arXiv 2402.11984).
"""

import math

import torch
from torch import Tensor


def sign_symmetric(weight: Tensor) -> Tensor:
    """sign(W) / sqrt(in) for a matrix, sign(W) sqrt(2 / (k^2 out)) for a convolution."""
    is_matrix = weight.dim() == 2
    return weight.sign() * math.sqrt(1 / weight.shape[1] if is_matrix else 2 / weight[:, 0].numel())


class FixedFeedback:
    """B, drawn once from `key` alone: uniform within +-1 / sqrt(fan_in), in the shape of the
    weight.
    """

    def __init__(self, weight: Tensor, *, key: int) -> None:
        generator = torch.Generator().manual_seed(key & 0x7FFF_FFFF_FFFF_FFFF)
        drawn = 2 * torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 1
        self.matrix = (drawn / math.sqrt(weight[0].numel())).to(weight.device, weight.dtype)

    def __call__(self, weight: Tensor) -> Tensor:
        return self.matrix
