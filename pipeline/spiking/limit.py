"""Synapses with a limited weight: what makes a feedback a contraction, so that its equilibrium is
one and is reached.

    SpectralLimit     W = clamp(gain, -1, 1) V / sigma(V),       sigma the largest singular value of
    V as a matrix [out, the rest] FrobeniusLimit    W = min(1, largest / |V|) V

With threshold 2 a fully connected feedback of spectral norm 1 has Lipschitz constant 1/2. The norm
of a convolution as an operator on images is another than that of its matrix: with k taps (9 for
3x3) it may be up to sqrt(k) times as large. There, and in a chain with synapses that are not
limited, contraction is likely, not certain; the solvers of `rules/ide.py` notice where it
fails.

It is the weight that is limited, not the output: whatever a seam puts in the place of the synapse's
input reaches V and gain.

Source: Xiao et al. 2021 (IDE, arXiv 2109.14247) for the former, Xiao et al. 2023 (SPIDE, arXiv
2302.00232) for the latter. The published code estimates both norms from random vectors; here the
latter is exact and the former exact up to 32 directions, beyond them within 1e-3 and from below, so
that W may be so much longer than 1. It keeps the vectors of a power iteration as buffers and makes
one iteration per forward; its value then lags behind a large step and depends on how many
micro-batches a batch was cut into. Here a norm is computed anew from a fixed start (Golub & Kahan
1965, doi 10.1137/0702016).
"""

# V [M, N] the weight as a matrix; K Lanczos steps

import inspect

import torch
from torch import Tensor, nn

from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.state import State

STEPS = 32


class LimitedSynapse(nn.Module):
    """`synapse` with `weight()` in the place of its own weight V, the parameter.

    Raises: ValueError for a synapse that takes no weight from outside, whose weight is standardised
    already, or with a bias."""

    def __init__(self, synapse: nn.Module) -> None:
        super().__init__()
        takes_weight = "weight" in inspect.signature(synapse.forward).parameters
        plain = takes_weight and getattr(synapse, "weights", "plain") == "plain"
        if not plain or getattr(synapse, "bias", None) is not None:
            raise ValueError(
                f"{type(self).__name__}: the synapse must be one of pipeline.spiking.synapse, plain"
                f" and without bias; got {synapse}"
            )
        self.synapse = synapse

    @property
    def V(self) -> Tensor:
        return self.synapse.weight  # type: ignore[return-value]

    def forward(self, x_TB: Tensor) -> Tensor:
        return self.synapse(x_TB, self.weight().to(self.V.dtype))

    def weight(self) -> Tensor:
        """W, in the shape of V."""
        raise NotImplementedError(f"{type(self).__name__} must override weight")


class SpectralLimit(LimitedSynapse):
    """A spectral norm of at most 1; `gain` is learnable, from 1. A weight of zeros stays what it
    is.
    """

    def __init__(self, synapse: nn.Module) -> None:
        super().__init__(synapse)
        self.gain = nn.Parameter(torch.ones(1))
        self.state = State("SpectralLimit")

    def weight(self) -> Tensor:
        sigma = self._sigma()
        return (
            self.gain.clamp(-1, 1) / torch.where(sigma > 0, sigma, torch.ones_like(sigma)) * self.V
        )

    def _sigma(self) -> Tensor:
        """Of one batch, whose time steps share the weight, the singular vectors are sought once;
        again if the weight moves.
        """
        V_MN = self.V.flatten(1)
        if not self.state.is_open:
            return spectral_norm(V_MN)
        u, v, answer_M = (self.state.read(name) for name in ("u", "v", "answer"))
        if u is None or v is None or answer_M is None or not torch.equal(answer(V_MN, v), answer_M):
            u, v = top_singular_vectors(V_MN, steps=STEPS)
            for name, value in (("u", u), ("v", v), ("answer", answer(V_MN, v))):
                self.state.write(name, value)
        return stretch(u, V_MN, v)


class FrobeniusLimit(LimitedSynapse):
    """A Frobenius norm of at most `largest`.

    Raises: ValueError for a `largest` that is not above 0.
    """

    def __init__(self, synapse: nn.Module, largest: float) -> None:
        super().__init__(synapse)
        if not largest > 0:
            raise ValueError(f"FrobeniusLimit: the largest norm must be > 0; got largest={largest}")
        self.largest = largest

    def weight(self) -> Tensor:
        # Before the square root, whose derivative is infinite at 0; where the limit acts, the scale
        # has a gradient too.
        smallest = torch.tensor(self.largest**2, dtype=self.V.dtype, device=self.V.device)
        return self.largest * self.V.square().sum().maximum(smallest).rsqrt() * self.V


# --------------------------------------------------------------------------- largest singular value


def spectral_norm(V: Tensor, *, steps: int = STEPS) -> Tensor:
    """The largest singular value of V `[M, N]`, with its gradient u v^T; a pure function of V,
    never below fp32.

    Exact from min(M, N) steps on; before that from below, within 1e-3 at 32 steps even where
    singular values crowd together at the top, as in random square matrices of 400
    (tests/spiking/test_limit.py).
    """
    u, v = top_singular_vectors(V, steps=steps)
    return stretch(u, V, v)


def stretch(u: Tensor, V: Tensor, v: Tensor) -> Tensor:
    """u^T V v, with its gradient u v^T; never below fp32."""
    with torch.autocast(V.device.type, enabled=False), op_scope("limit"):
        return u @ V.to(u.dtype) @ v


@torch.no_grad()
def answer(V: Tensor, v: Tensor) -> Tensor:
    """V v, without a graph: another one shows that V has moved."""
    with torch.autocast(V.device.type, enabled=False), op_scope("limit"):
        return V.to(v.dtype) @ v


def top_singular_vectors(V: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Unit u, v that make u^T V v largest over the Krylov space of a fixed start:
    Golub-Kahan-Lanczos, reorthogonalised.
    """
    with torch.no_grad(), torch.autocast(V.device.type, enabled=False), op_scope("limit"):
        return _lanczos(V.to(torch.promote_types(V.dtype, torch.float32)), steps=steps)


def _lanczos(V: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    A = V if V.shape[0] >= V.shape[1] else V.T
    size = A.shape[1]
    steps = min(steps, size)
    # Numbers without a pattern, all positive: what a matrix is large along is often the common
    # direction, and never lies orthogonal to this.
    start = (
        torch.arange(1, size + 1, device=V.device, dtype=torch.float64) * 0.6180339887498949
    ) % 1
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
    """x without its part in the rows of `basis`, as a unit vector; 0 where nothing but rounding is
    left.
    """
    size = x.norm()
    for _ in range(2):
        x = x - (basis @ x) @ basis
    left = x.norm()
    # A space that is closed under A (a low rank) has no next vector: a zero adds nothing to the
    # projection.
    return torch.where(
        left > 10 * torch.finfo(x.dtype).eps * size,
        x / left.clamp_min(torch.finfo(x.dtype).tiny),
        0 * x,
    )
