"""The largest singular value of a matrix, computed anew from a fixed start: a pure function of the matrix.

The published code keeps the vectors of a power iteration as buffers and makes one iteration per forward instead: its value
lags behind a large step (what is divided by it is then above 1), and depends on how many micro-batches a batch was cut into.

Source: Golub & Kahan 1965 (doi 10.1137/0702016).
"""

# V [M, N]; K Lanczos steps

import torch
from torch import Tensor

from pipeline.spiking.serving import serving

STEPS = 32


def spectral_norm(V: Tensor, *, steps: int = STEPS) -> Tensor:
    """The largest singular value of V `[M, N]`, with its gradient u v^T; a pure function of V, never below fp32.

    Exact from min(M, N) steps on; before that from below, within 1e-3 at 32 steps even where singular values crowd
    together at the top, as in random square matrices of 400 (tests/spiking/test_spectral.py).
    """
    u, v = top_vectors(V, steps=steps)
    return stretch(u, V, v)


def stretch(u: Tensor, V: Tensor, v: Tensor) -> Tensor:
    """u^T V v, with its gradient u v^T; never below fp32."""
    with torch.autocast(V.device.type, enabled=False), serving("limit"):
        return u @ V.to(u.dtype) @ v


@torch.no_grad()
def answer(V: Tensor, v: Tensor) -> Tensor:
    """V v, without a graph: another one shows that V has moved."""
    with torch.autocast(V.device.type, enabled=False), serving("limit"):
        return V.to(v.dtype) @ v


def top_vectors(V: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Unit u, v that make u^T V v largest over the Krylov space of a fixed start: Golub-Kahan-Lanczos, reorthogonalised."""
    with torch.no_grad(), torch.autocast(V.device.type, enabled=False), serving("limit"):
        return _lanczos(V.to(torch.promote_types(V.dtype, torch.float32)), steps=steps)


def _lanczos(V: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    A = V if V.shape[0] >= V.shape[1] else V.T
    size = A.shape[1]
    steps = min(steps, size)
    # Numbers without a pattern, all positive: what a matrix is large along is often the common direction, and never lies
    # orthogonal to this.
    start = (torch.arange(1, size + 1, device=V.device, dtype=torch.float64) * 0.6180339887498949) % 1
    q = (start / start.norm()).to(V.dtype)
    right, left = V.new_zeros(steps, size), V.new_zeros(steps, A.shape[0])
    for k in range(steps):
        right[k] = q
        p = _orthogonal(A @ q, left[:k])
        left[k] = p
        q = _orthogonal(A.T @ p, right[: k + 1])
    # Rayleigh-Ritz on both spaces.
    P, _, Qh = torch.linalg.svd(left @ A @ right.T)
    p, q = P[:, 0] @ left, Qh[0] @ right
    tiny = torch.finfo(V.dtype).tiny  # of zeros: a stretch of 0, not 0 / 0
    p, q = p / p.norm().clamp_min(tiny), q / q.norm().clamp_min(tiny)
    return (p, q) if V.shape[0] >= V.shape[1] else (q, p)


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """x without its part in the rows of `basis`, as a unit vector; 0 where nothing but rounding is left."""
    size = x.norm()
    for _ in range(2):
        x = x - (basis @ x) @ basis
    left = x.norm()
    # A space that is closed under A (a low rank) has no next vector: a zero adds nothing to the projection.
    return torch.where(left > 10 * torch.finfo(x.dtype).eps * size, x / left.clamp_min(torch.finfo(x.dtype).tiny), 0 * x)
