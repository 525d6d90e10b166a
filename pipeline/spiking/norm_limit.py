"""Synapses with a limited weight norm, which make a feedback connection a contraction.

    SpectralLimit     W = clamp(gain, -1, 1) V / sigma(V)
                      sigma is the largest singular value of V as a matrix [out, the rest]
    FrobeniusLimit    W = min(1, largest / |V|) V

With threshold 2, a fully connected feedback of spectral norm 1 has the Lipschitz constant 1/2. The
operator norm of a convolution on images differs from the norm of its matrix: with k taps (9 for
3x3) it can be up to sqrt(k) times as large. For convolutions, and for chains that contain unlimited
synapses, contraction is likely but not certain. The solver of `rules/ide.py` warns if it does not
converge.

The weight is limited, not the output. So the seam `presynaptic` of a synapse changes the gradients
of V and gain too.

Source: Xiao et al. 2021 (IDE, arXiv 2109.14247) for the spectral limit, Xiao et al. 2023 (SPIDE,
arXiv 2302.00232) for the Frobenius limit. The published code estimates both norms from random
vectors. It keeps the vectors of a power iteration as buffers and makes one iteration per forward.
So after a large weight update the estimate is too old, and it depends on the number of
micro-batches. Here each norm depends on the weight alone. The Frobenius norm is exact. The spectral
norm is computed from a fixed start vector (Golub & Kahan 1965, doi 10.1137/0702016). It is exact
for matrices with at most 32 rows or columns. For larger matrices it is at most 1e-3 too small
(relative), so the norm of W can be too large by this factor.
"""

# V [M, N] the weight as a matrix

import inspect

import torch
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.core.torch_settings import without_autocast
from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.state import State

STEPS = 32


class LimitedSynapse(nn.Module):
    """A synapse that uses the limited weight `weight()`. Its parameter is the unlimited weight V.

    Raises: ValueError for a module whose forward has no argument `weight`, weights that are not
    plain, or a synapse with a bias.
    """

    def __init__(self, synapse: nn.Module) -> None:
        super().__init__()
        require(
            "weight" in inspect.signature(synapse.forward).parameters
            and getattr(synapse, "weights", "plain") == "plain"
            and getattr(synapse, "bias", None) is None,
            f"{type(self).__name__}: the synapse must be one of pipeline.spiking.synapse, with"
            f" plain weights and without bias; got {synapse}",
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
    """Sets the spectral norm to |clamp(gain, -1, 1)|; `gain` is learnable and starts at 1.

    A weight V of zeros gives W = 0.
    """

    def __init__(self, synapse: nn.Module) -> None:
        super().__init__(synapse)
        self.gain = nn.Parameter(torch.ones(1))
        self.state = State("SpectralLimit")

    def weight(self) -> Tensor:
        sigma = self._sigma()
        divisor = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
        return self.gain.clamp(-1, 1) / divisor * self.V

    def _sigma(self) -> Tensor:
        """sigma(V). In a batch, the singular vectors are recomputed only if V has changed."""
        V_MN = self.V.flatten(1)
        cache = self.state.values if self.state.is_open else {}
        if not cache or not torch.equal(product(V_MN, cache["v"]), cache["product"]):
            u, v = top_singular_vectors(V_MN, steps=STEPS)
            cache.update(u=u, v=v, product=product(V_MN, v))
        return singular_value(cache["u"], V_MN, cache["v"])


class FrobeniusLimit(LimitedSynapse):
    """Limits the Frobenius norm to `largest`.

    Raises: ValueError unless `largest` > 0.
    """

    def __init__(self, synapse: nn.Module, largest: float) -> None:
        super().__init__(synapse)
        require(largest > 0, f"FrobeniusLimit: the largest norm must be > 0; got largest={largest}")
        self.largest = largest

    def weight(self) -> Tensor:
        # The maximum comes before the square root, whose derivative is infinite at 0. Above the
        # limit the gradient also passes through the norm.
        square = self.V.square().sum().clamp_min(self.largest**2)
        return self.largest * square.rsqrt() * self.V


# --------------------------------------------------------------------------- largest singular value


def singular_value(u: Tensor, V: Tensor, v: Tensor) -> Tensor:
    """u^T V v, at least in fp32, with its gradient u v^T."""
    with without_autocast(V.device), op_scope("limit"):
        return u @ V.to(u.dtype) @ v


@torch.no_grad()
def product(V: Tensor, v: Tensor) -> Tensor:
    """V v without a graph. If the product has changed, V has changed."""
    with without_autocast(V.device), op_scope("limit"):
        return V.to(v.dtype) @ v


def top_singular_vectors(V: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Unit vectors u, v that maximise u^T V v over the Krylov spaces of a fixed start vector.

    The method is Golub-Kahan-Lanczos with reorthogonalisation. The result is a pure function of V.
    u^T V v is the largest singular value if `steps` >= min(M, N). With 32 steps it is at most 1e-3
    too small (relative), also for random square matrices of size 400, whose largest singular values
    are close to each other (tests/spiking/test_norm_limit.py).
    """
    with torch.no_grad(), without_autocast(V.device), op_scope("limit"):
        V = V.to(torch.promote_types(V.dtype, torch.float32))
        A = V if V.shape[0] >= V.shape[1] else V.T
        size = A.shape[1]
        steps = min(steps, size)
        # Irregular positive numbers: the start must not be orthogonal to the top singular vector,
        # which often has almost equal entries.
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
        # The Rayleigh-Ritz projection on both Krylov spaces.
        P, _, Qh = torch.linalg.svd(left @ A @ right.T)
        p, q = P[:, 0] @ left, Qh[0] @ right
        tiny = torch.finfo(V.dtype).tiny  # a zero matrix gives 0, not 0 / 0
        p, q = p / p.norm().clamp_min(tiny), q / q.norm().clamp_min(tiny)
        return (p, q) if V.shape[0] >= V.shape[1] else (q, p)


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """The component of `x` orthogonal to the rows of `basis`, scaled to norm 1.

    The result is 0 if the component is only rounding error. This occurs for a matrix of low rank,
    whose Krylov space is small. Zero rows of `basis` do not change the projection.
    """
    norm_before = x.norm()
    for _ in range(2):
        x = x - (basis @ x) @ basis
    norm = x.norm()
    limits = torch.finfo(x.dtype)
    return torch.where(norm > 10 * limits.eps * norm_before, x / norm.clamp_min(limits.tiny), 0 * x)
