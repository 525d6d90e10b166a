"""A synapse whose weight, as a matrix, has a spectral norm of at most 1: what makes a feedback a contraction.

    W = clamp(gain, -1, 1) V / sigma(V),     sigma the largest singular value of V as a matrix [out, everything else]

With threshold 2 a fully connected feedback then has Lipschitz constant 1/2, so its equilibrium is one and is reached. The
norm of a convolution as an operator on images is another: with k taps (9 for 3x3) it may be up to sqrt(k) times that of its
matrix. There, and in a chain with synapses that are not limited, contraction is likely, not certain; the solvers of
`spiking/solvers.py` notice where it fails.

sigma is computed anew from V for each batch, by Lanczos from a fixed start. The published code keeps the vectors of a power
iteration as buffers and makes one iteration per forward instead: its sigma lags behind a large step (the norm is then above
1), and depends on how many micro-batches a batch was cut into.

Source: Xiao et al. 2021 (IDE, arXiv 2109.14247); Golub & Kahan 1965 (doi 10.1137/0702016).
"""

# V [M, N]; K Lanczos steps

import torch
from torch import Tensor, nn

from pipeline.spiking.state import State

STEPS = 32


class SpectralLimit(nn.Module):
    """`synapse` with the weight of the equation at the head of the file; V is the synapse's own, `gain` learnable, from 1.

    The map is linear, so it is its output that is scaled: y = clamp(gain, -1, 1) / sigma(V) synapse(x).

    Raises: ValueError for a synapse with bias, which would be scaled too, or without a weight.
    """

    def __init__(self, synapse: nn.Module) -> None:
        super().__init__()
        if not isinstance(getattr(synapse, "weight", None), Tensor) or getattr(synapse, "bias", None) is not None:
            raise ValueError(f"SpectralLimit: the synapse must have a weight and no bias; got {synapse}")
        self.synapse = synapse
        self.gain = nn.Parameter(torch.ones(1))
        self.state = State("SpectralLimit")

    def forward(self, x_TB: Tensor) -> Tensor:
        y_TB = self.synapse(x_TB)
        return self._scale().to(y_TB.dtype) * y_TB

    def weight(self) -> Tensor:
        """W, in the shape of V."""
        V: Tensor = self.synapse.weight  # type: ignore[assignment]
        return self._scale() * V

    def _scale(self) -> Tensor:
        return self.gain.clamp(-1, 1) / self._sigma()

    def _sigma(self) -> Tensor:
        """Of one batch, whose time steps share the weight, the singular vectors are sought once."""
        V_MN: Tensor = self.synapse.weight.flatten(1)  # type: ignore[operator]
        if not self.state.is_open:
            return spectral_norm(V_MN)
        u, v = self.state.read("u"), self.state.read("v")
        if u is None or v is None:
            u, v = top_vectors(V_MN, steps=STEPS)
            self.state.write("u", u)
            self.state.write("v", v)
        return _stretch(u, V_MN, v)


def spectral_norm(V: Tensor, *, steps: int = STEPS) -> Tensor:
    """The largest singular value of V `[M, N]`, with its gradient u v^T; a pure function of V, never below fp32.

    Exact from min(M, N) steps on; before that from below, within 1e-3 at 32 steps even where singular values crowd
    together at the top, as in random square matrices of 400 (tests/spiking/test_spectral.py).
    """
    u, v = top_vectors(V, steps=steps)
    return _stretch(u, V, v)


def _stretch(u: Tensor, V: Tensor, v: Tensor) -> Tensor:
    with torch.autocast(V.device.type, enabled=False):
        return u @ V.to(u.dtype) @ v


def top_vectors(V: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Unit u, v that make u^T V v largest over the Krylov space of a fixed start: Golub-Kahan-Lanczos, reorthogonalised."""
    with torch.no_grad(), torch.autocast(V.device.type, enabled=False):
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
    p, q = p / p.norm(), q / q.norm()
    return (p, q) if V.shape[0] >= V.shape[1] else (q, p)


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """x without its part in the rows of `basis`, as a unit vector; 0 where nothing but rounding is left."""
    size = x.norm()
    for _ in range(2):
        x = x - (basis @ x) @ basis
    left = x.norm()
    # A space that is closed under A (a low rank) has no next vector: a zero adds nothing to the projection.
    return torch.where(left > 10 * torch.finfo(x.dtype).eps * size, x / left.clamp_min(torch.finfo(x.dtype).tiny), 0 * x)
