"""Synapses with a limited weight norm, which make a feedback connection a contraction.

    SpectralLimit     W = clamp(gain, -1, 1) V / sigma(V)
                      sigma is the largest singular value of V as a matrix [out, the rest]
    FrobeniusLimit    W = min(1, largest / |V|) V

With threshold 2, a fully connected feedback of spectral norm 1 has the Lipschitz constant 1/2. The
operator norm of a convolution on images differs from the norm of its matrix: with k taps (9 for
3x3) it can be up to sqrt(k) times as large. For convolutions, and for chains that contain unlimited
synapses, contraction is likely but not certain. The solvers of `rules/ide.py` detect a failure.

The weight is limited, not the output. A seam that replaces the synapse's input acts on V and gain
too.

Source: Xiao et al. 2021 (IDE, arXiv 2109.14247) for the spectral limit, Xiao et al. 2023 (SPIDE,
arXiv 2302.00232) for the Frobenius limit. The published code estimates both norms from random
vectors. It keeps the vectors of a power iteration as buffers and makes one iteration per forward,
so its value lags behind a large step and depends on the number of micro-batches. Here each norm is
computed anew from a fixed start (Golub & Kahan 1965, doi 10.1137/0702016). The Frobenius norm is
exact. The spectral norm is exact up to 32 directions; beyond them it is at most 1e-3 too small, so
that W can be too long by that factor.
"""

# V [M, N] the weight as a matrix; K Lanczos steps

import inspect

import torch
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.state import State

STEPS = 32


class LimitedSynapse(nn.Module):
    """`synapse` with the weight `weight()`. Its own weight V stays the parameter.

    Raises: ValueError for a synapse that takes no weight argument, whose weights are not plain, or
    that has a bias.
    """

    def __init__(self, synapse: nn.Module) -> None:
        super().__init__()
        require(
            "weight" in inspect.signature(synapse.forward).parameters
            and getattr(synapse, "weights", "plain") == "plain"
            and getattr(synapse, "bias", None) is None,
            f"{type(self).__name__}: the synapse must be one of pipeline.spiking.synapse, plain"
            f" and without bias; got {synapse}",
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
    """Limits the spectral norm to 1; `gain` is learnable and starts at 1. A zero weight stays
    zero.
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
        """sigma(V). The singular vectors are computed once per batch, and if the weight changes."""
        V_MN = self.V.flatten(1)
        kept = self.state.values if self.state.is_open else {}
        if not kept or not torch.equal(product(V_MN, kept["v"]), kept["product"]):
            u, v = top_singular_vectors(V_MN, steps=STEPS)
            kept.update(u=u, v=v, product=product(V_MN, v))
        return singular_value(kept["u"], V_MN, kept["v"])


class FrobeniusLimit(LimitedSynapse):
    """Limits the Frobenius norm to `largest`.

    Raises: ValueError unless `largest` > 0.
    """

    def __init__(self, synapse: nn.Module, largest: float) -> None:
        super().__init__(synapse)
        require(largest > 0, f"FrobeniusLimit: the largest norm must be > 0; got largest={largest}")
        self.largest = largest

    def weight(self) -> Tensor:
        # The maximum comes before the square root, whose derivative is infinite at 0. Where the
        # limit is active, the scale has a gradient too.
        square = self.V.square().sum().maximum(self.V.new_tensor(self.largest**2))
        return self.largest * square.rsqrt() * self.V


# --------------------------------------------------------------------------- largest singular value


def singular_value(u: Tensor, V: Tensor, v: Tensor) -> Tensor:
    """u^T V v, at least in fp32, with its gradient u v^T."""
    with torch.autocast(V.device.type, enabled=False), op_scope("limit"):
        return u @ V.to(u.dtype) @ v


@torch.no_grad()
def product(V: Tensor, v: Tensor) -> Tensor:
    """V v without a graph. A changed product shows that V has changed."""
    with torch.autocast(V.device.type, enabled=False), op_scope("limit"):
        return V.to(v.dtype) @ v


def top_singular_vectors(V: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Unit vectors u, v that maximise u^T V v over the Krylov space of a fixed start vector.

    The method is Golub-Kahan-Lanczos with reorthogonalisation. The result is a pure function of V.
    u^T V v is the largest singular value for `steps` >= min(M, N). With 32 steps it is at most 1e-3
    too small, even for random square matrices of size 400, whose top singular values lie close
    together (tests/spiking/test_norm_limit.py).
    """
    with torch.no_grad(), torch.autocast(V.device.type, enabled=False), op_scope("limit"):
        V = V.to(torch.promote_types(V.dtype, torch.float32))
        A = V if V.shape[0] >= V.shape[1] else V.T
        size = A.shape[1]
        steps = min(steps, size)
        # Irregular positive numbers: the top singular vector is often close to the direction of
        # equal entries, and the start must not be orthogonal to it.
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
        tiny = torch.finfo(V.dtype).tiny  # a zero matrix gives 0, not 0 / 0
        p, q = p / p.norm().clamp_min(tiny), q / q.norm().clamp_min(tiny)
        return (p, q) if V.shape[0] >= V.shape[1] else (q, p)


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """The unit vector of x's part orthogonal to the rows of `basis`.

    It is 0 if only rounding error is left.
    """
    size = x.norm()
    for _ in range(2):
        x = x - (basis @ x) @ basis
    left = x.norm()
    # For a matrix of low rank the Krylov space is exhausted early. A zero vector then leaves the
    # projection unchanged.
    return torch.where(
        left > 10 * torch.finfo(x.dtype).eps * size,
        x / left.clamp_min(torch.finfo(x.dtype).tiny),
        0 * x,
    )
