"""Traces, written out."""

import torch
from torch import Tensor


def traces_of(x_TBC: Tensor, decay: float) -> Tensor:
    """a[t] = sum_k decay^(t-k) x[k], the sum written out."""
    steps = x_TBC.shape[0]
    weights = torch.tensor(
        [[decay ** (t - k) if k <= t else 0.0 for k in range(steps)] for t in range(steps)],
        dtype=x_TBC.dtype,
    )
    return torch.einsum("tk,k...->t...", weights, x_TBC)
