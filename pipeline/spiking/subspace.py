"""The subspace of a synapse's inputs, learnt by lateral neurons.

The learning rule has a Hebbian and an anti-Hebbian term:

    y = x H^T                               lateral neurons, one per row of H
    D = clamp(E[y^T (x - y H)], -10, 10)    Hebbian in y x, anti-Hebbian in y (y H);
                                            E over samples and time steps
    m <- momentum m + (1 - momentum) D,   H <- H + rate m      for the learning rows only

The frozen rows also contribute to y H, so the learning rows find the rest of the input space. With
real-valued responses, D depends on the inputs only through their second moments: E[y^T (x - y H)] =
H S (I - H^T H) with S = E[x^T x]. The moments are averaged over time steps, micro-batches and
ranks. Then several iterations update H, once per global batch. So every rank has the same H,
whatever the division of the batch.

`InputRecorder` accumulates the moments of one synapse's inputs.

Source: Xiao et al. 2024 (HLOP, arXiv 2402.11984), section 4; Oja 1989 (doi
10.1142/S0129065789000475) for the subspace rule.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import require
from pipeline.core.torch_settings import without_autocast
from pipeline.spiking.encode import is_static
from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.rate import rate_weights
from pipeline.spiking.synapse import Conv2d, Linear, Presynaptic

# T time, B batch, N samples and time steps, K lateral neurons, O outputs of a synapse,
# C inputs of a synapse (for a convolution: of a patch)

MAX_CHANGE = 10.0
MAX_RESPONSE = 20.0


class Subspace(nn.Module):
    """The matrix H over `size` inputs: frozen rows `old` and learning rows `new`.

    `velocity` is m of the equations. `energy` is the share of E|x|^2 that the rows preserve, as of
    its last computation.

    All rows are orthonormal, because the projection requires orthonormal rows. The Hebbian rule
    converges to orthonormal rows only if the rows have inputs to learn from. So the learning rows
    are orthonormalised after each batch, which preserves the span of all rows. The published rule
    does not orthonormalise them.
    """

    old: Tensor
    new: Tensor
    velocity: Tensor
    energy: Tensor

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for name in ("old", "new", "velocity"):
            self.register_buffer(name, torch.zeros(0, size, dtype=dtype, device=device))
        self.register_buffer("energy", torch.zeros(1, dtype=dtype, device=device))

    @property
    def rows(self) -> Tensor:
        return torch.cat([self.old, self.new])

    @property
    def free_directions(self) -> int:
        """The number of input directions without a row."""
        return self.old.shape[1] - len(self.old) - len(self.new)

    @torch.no_grad()
    def grow(self, count: int, *, key: int) -> None:
        """Freeze the learning rows, and add `count` random learning rows.

        The random rows are drawn from `key`, and made orthogonal to the frozen rows.
        """
        generator = torch.Generator().manual_seed(key & 0x7FFF_FFFF_FFFF_FFFF)
        random_KC = torch.randn(
            count, self.old.shape[1], generator=generator, dtype=torch.float64
        ).to(self.old.device)
        self.old = torch.cat([self.old, self._orthogonal_to_old(self.new)])
        self.new = self._orthogonal_to_old(random_KC)
        self.velocity = torch.zeros_like(self.new)

    def _orthogonal_to_old(self, rows: Tensor) -> Tensor:
        """`rows`, made orthonormal and orthogonal to `old`, twice in float64 for accuracy."""
        old = self.old.double()
        return orthonormal(orthonormal(rows.double(), old), old).to(self.old.dtype)

    @torch.no_grad()
    def learn(self, moments: "Moments", *, rate: float, momentum: float, iterations: int) -> None:
        """Apply the Hebbian update `iterations` times, then orthonormalise the learning rows."""
        with op_scope("lateral"):
            for _ in range(iterations):
                change = moments.hebbian_change(self).clamp_(-MAX_CHANGE, MAX_CHANGE)
                self.velocity = momentum * self.velocity + (1 - momentum) * change
                self.new = self.new + rate * self.velocity
            self.new = orthonormal(self.new, self.old)

    @torch.no_grad()
    def project(self, g: Tensor) -> Tensor:
        """g - (g H^T) H with the frozen rows H, for a weight gradient `g` in the weight's shape."""
        with without_autocast(g.device), op_scope("lateral"):
            g_OC = g.flatten(1).to(self.old.dtype)
            return (g_OC - (g_OC @ self.old.T) @ self.old).view_as(g).to(g.dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The number of rows depends on the finished tasks, so the checkpoint determines it.
        for name in ("old", "new", "velocity"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(len(saved), self.old.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class SecondMoments:
    """S = E[x^T x], for lateral neurons with real-valued responses.

    `average` divides the sums by the number of this rank's samples, and averages over ranks. It is
    collective, and every rank must have the same number of samples. `hebbian_change` is
    E[y^T (x - y H)] of the learning rows. `energy` is the share of E|x|^2 that the rows preserve:
    E|y|^2 / E|x|^2 for orthonormal rows, and 1 if x is 0.
    """

    def __init__(self, subspace: Subspace) -> None:
        self.second_CC = subspace.new.new_zeros(subspace.new.shape[1], subspace.new.shape[1])
        self.samples = 0

    def add(self, x_NC: Tensor) -> None:
        self.second_CC.addmm_(x_NC.T, x_NC)
        self.samples += len(x_NC)

    def average(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        self.second_CC = mean_over_ranks(self.second_CC / self.samples)

    def hebbian_change(self, subspace: Subspace) -> Tensor:
        old, new = subspace.old, subspace.new
        cross_KC = new @ self.second_CC
        return cross_KC - (cross_KC @ old.T) @ old - (cross_KC @ new.T) @ new

    def energy(self, subspace: Subspace) -> Tensor:
        rows = subspace.rows
        return _share(((rows @ self.second_CC) * rows).sum(), self.second_CC.trace())


class SpikingMoments:
    """E[y^T x] and E[y^T y] for lateral neurons with spiking responses.

    The methods are those of `SecondMoments`. y is the result of `quantized_response`.

    The neurons fire once per batch, with H as at the batch's start. All iterations use these
    spikes. The published neurons fire again in each iteration, which would require storing the
    whole global batch.
    """

    def __init__(self, subspace: Subspace, *, steps: int) -> None:
        self.rows, self.steps = subspace.rows, steps
        self.cross_KC = torch.zeros_like(self.rows)
        self.lateral_KK = self.rows.new_zeros(len(self.rows), len(self.rows))
        self.power = self.rows.new_zeros(1)
        self.samples = 0

    def add(self, x_NC: Tensor) -> None:
        y_NK = quantized_response(x_NC @ self.rows.T, self.steps)
        self.cross_KC.addmm_(y_NK.T, x_NC)
        self.lateral_KK.addmm_(y_NK.T, y_NK)
        self.power += x_NC.square().sum()
        self.samples += len(x_NC)

    def average(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        self.cross_KC = mean_over_ranks(self.cross_KC / self.samples)
        self.lateral_KK = mean_over_ranks(self.lateral_KK / self.samples)
        self.power = mean_over_ranks(self.power / self.samples)

    def hebbian_change(self, subspace: Subspace) -> Tensor:
        frozen = len(subspace.old)
        return self.cross_KC[frozen:] - self.lateral_KK[frozen:] @ subspace.rows

    def energy(self, subspace: Subspace) -> Tensor:
        return _share(self.lateral_KK.trace(), self.power[0])


# The statistics of a global batch that the lateral neurons learn from.
Moments = SecondMoments | SpikingMoments


def _share(preserved: Tensor, total: Tensor) -> Tensor:
    """preserved / total, or 1 if the total is 0."""
    return torch.where(
        total > 0,
        preserved / total.clamp_min(torch.finfo(total.dtype).tiny),
        torch.ones_like(total),
    )


def quantized_response(y: Tensor, steps: int) -> Tensor:
    """y, rounded to a value that the signed spikes of `steps` time steps can represent.

    It is clipped to +-20 and rounded to multiples of 20 / `steps`.
    """
    levels = y.clamp(-MAX_RESPONSE, MAX_RESPONSE) * (steps / MAX_RESPONSE)
    return levels.round() * (MAX_RESPONSE / steps)


def orthonormal(rows: Tensor, basis: Tensor) -> Tensor:
    """Remove the span of the orthonormal `basis` from `rows`, and orthonormalise the result.

    The result is that of Gram-Schmidt in the order of the rows. Rows that are already orthonormal,
    and orthogonal to `basis`, do not change. Linearly dependent rows give NaN.

    A QR decomposition would make the host wait for a GPU. The Cholesky factor L of the rows' inner
    products gives the same rows, L^-1 `rows`. It is computed twice in float64, because its error
    grows with the square of the rows' condition number (Yamamoto et al. 2015, doi
    10.1553/etna_vol44s306).
    """
    q = (rows - (rows @ basis.T) @ basis).double()
    for _ in range(2):
        lower, info = torch.linalg.cholesky_ex(q @ q.T)
        q = torch.linalg.solve_triangular(lower, q, upper=False)
        q = torch.where(info == 0, q, math.nan)
    return q.to(rows.dtype).contiguous()


class InputRecorder:
    """Accumulates the moments of one synapse's inputs, for one subspace.

    The inputs are the values of each step, or with `decay` their weighted mean over time.
    `moments` creates empty moments. `steps` is the number of time steps of the batch; None turns
    the recording off. `pending` has the moments of the current global batch, and `last` those of
    the previous batch.

    If `presynaptic` (the trace of the synapse) is given, the recorder replaces the trace as the
    synapse's attribute `presynaptic`, and records it.
    """

    def __init__(
        self,
        name: str,
        synapse: Linear | Conv2d,
        subspace: Subspace,
        moments: Callable[[Subspace], Moments],
        decay: float | None,
        presynaptic: Presynaptic | None,
    ) -> None:
        self.name, self.synapse, self.subspace = name, synapse, subspace
        self.moments, self.decay = moments, decay
        self.presynaptic, self.state = presynaptic, getattr(presynaptic, "state", None)
        self.steps: int | None = None
        self.pending: Moments | None = None
        self.last: Moments | None = None

    def __call__(self, x_TB: Tensor) -> Tensor:
        """Record the trace of `x_TB`, and return it."""
        assert self.presynaptic is not None
        trace_TB = self.presynaptic(x_TB)
        self.record(trace_TB)
        return trace_TB

    @torch.no_grad()
    def record(self, x_TB: Tensor) -> None:
        """Add the inputs `x_TB` to the moments, if the recording is on.

        Raises: ValueError if a mean over time is needed and `x_TB` is only a part of the sequence.
        """
        if self.steps is None:
            return
        require(
            self.decay is None or len(x_TB) == self.steps,
            "HLOP: learn_from='rates' needs a rule that gives all T steps to the model at"
            f" once; got {len(x_TB)} of {self.steps} steps at {self.name}",
        )
        if self.pending is None:
            self.pending = self.moments(self.subspace)
        dtype = self.subspace.old.dtype
        with without_autocast(x_TB.device), op_scope("lateral"):
            if is_static(x_TB):  # all steps are one frame
                x_TB = x_TB[:1]
            elif self.decay is not None:
                weights_T = rate_weights(self.decay, x_TB)
                x_TB = torch.einsum("t,tb...->b...", weights_T, x_TB.to(dtype)).unsqueeze(0)
            for x_NC in input_rows(self.synapse, x_TB.to(dtype)):
                self.pending.add(x_NC)

    def energy(self) -> float:
        """The share of the energy of the last batch's inputs that the rows preserve.

        Before the first batch it is the checkpoint's value, or 0.
        """
        if self.last is not None:
            self.subspace.energy.copy_(self.last.energy(self.subspace))
        return float(self.subspace.energy)

    def bytes(self) -> int:
        # The moments of the current batch, or between batches those of the last.
        return sum(
            value.nbytes
            for value in vars(self.moments(self.subspace)).values()
            if isinstance(value, Tensor)
        )

    def finish_batch(self, mean_over_ranks: Callable[[Tensor], Tensor]) -> Moments | None:
        """Average the moments of the global batch over ranks, and start the next batch.

        If the batch did not run this synapse, return None, without a collective call.
        """
        moments, self.pending = self.pending, None
        if moments is not None:
            moments.average(mean_over_ranks)
            self.last = moments
        return moments


def input_rows(synapse: Linear | Conv2d, x_TB: Tensor) -> Iterator[Tensor]:
    """The input vectors that the weight matrix multiplies, in blocks `[N, C]`.

    For a convolution the vectors are the patches of its input, one block per time step.
    """
    if isinstance(synapse, Linear):
        yield x_TB.flatten(0, -2)
        return
    geometry = {"dilation": synapse.dilation, "padding": synapse.padding, "stride": synapse.stride}
    for x_BCHW in x_TB:
        yield (
            F.unfold(x_BCHW, synapse.kernel_size, **geometry)  # type: ignore[arg-type]
            .transpose(1, 2)
            .flatten(0, 1)
        )
