"""The subspace of a layer's inputs, learnt by lateral neurons.

Their rule has a Hebbian and an anti-Hebbian term:

    y = x H^T                               lateral neurons, one per row of H
    D = clamp(E[y^T (x - y H)], -10, 10)    Hebbian in y x, anti-Hebbian in y (y H);
                                            E over samples and time steps
    m <- momentum m + (1 - momentum) D,   H <- H + rate m      for the rows that still learn

Frozen rows take part in y H, so new rows learn the rest of the input space. D depends on the inputs
only through their second moments: D = H S (I - H^T H) with S = E[x^T x]. S is summed over time
steps, micro-batches and ranks, and H is updated once per global batch. So every rank has the same
H, however the batch was divided.

`InputRecorder` records what D is learnt from: the factors that a synapse's weight gradient
multiplies, as rows.

Source: Xiao et al. 2024 (HLOP, arXiv 2402.11984), section 4; Oja 1989 (doi
10.1142/S0129065789000475) for the subspace rule.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.checks import require
from pipeline.spiking.encode import is_static
from pipeline.spiking.op_scope import op_scope
from pipeline.spiking.rate import rate_weights
from pipeline.spiking.synapse import Conv2d, Linear

# N samples and time steps, C inputs of a layer, K lateral neurons


LARGEST_CHANGE = 10.0
LARGEST_RESPONSE = 20.0


class Subspace(nn.Module):
    """H over `size` inputs: frozen rows `old` and learning rows `new`. All are orthonormal.

    `energy` is the share of E|x|^2 that the rows kept, when last computed.

    The projection needs orthonormal rows. The Hebbian rule converges to them, but only for rows
    that have inputs to learn from. So the new rows are orthonormalised after each batch, which
    keeps their span; this is an addition to the published rule.
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
    def free(self) -> int:
        """Number of directions that no row covers yet."""
        return self.old.shape[1] - len(self.old) - len(self.new)

    @torch.no_grad()
    def grow(self, count: int, *, key: int) -> None:
        """Freeze the learnt rows and start `count` new ones.

        The new rows are drawn from `key` alone and are orthogonal to all others.
        """
        generator = torch.Generator().manual_seed(key & 0x7FFF_FFFF_FFFF_FFFF)
        size, double = self.old.shape[1], torch.float64
        drawn = torch.randn(count, size, generator=generator, dtype=double).to(self.old.device)
        self.old = torch.cat([self.old, self._beside_old(self.new)])
        self.new = self._beside_old(drawn)
        self.velocity = torch.zeros_like(self.new)

    def _beside_old(self, rows: Tensor) -> Tensor:
        """Orthonormal rows, orthogonal to the frozen ones, in float64 and twice for exactness."""
        old = self.old.double()
        return orthonormal(orthonormal(rows.double(), old), old).to(self.old.dtype)

    @torch.no_grad()
    def learn(self, moments: "Moments", *, rate: float, momentum: float, iterations: int) -> None:
        """Apply the Hebbian update `iterations` times."""
        with op_scope("lateral"):
            for _ in range(iterations):
                change = moments.drive(self).clamp_(-LARGEST_CHANGE, LARGEST_CHANGE)
                self.velocity = momentum * self.velocity + (1 - momentum) * change
                self.new = self.new + rate * self.velocity
            self.new = orthonormal(self.new, self.old)

    @torch.no_grad()
    def project(self, g: Tensor) -> Tensor:
        """g - (g H^T) H over the frozen rows.

        `g` is a weight gradient, flattened to `[outputs, C]`.
        """
        with torch.autocast(g.device.type, enabled=False), op_scope("lateral"):
            g_KC = g.flatten(1).to(self.old.dtype)
            return (g_KC - (g_KC @ self.old.T) @ self.old).view_as(g).to(g.dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **more: Any
    ) -> None:
        # The number of rows depends on the finished tasks, so it comes from the checkpoint.
        for name in ("old", "new", "velocity"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(len(saved), self.old.shape[1]))
        super()._load_from_state_dict(state_dict, prefix, *args, **more)


class SecondMoments:
    """S = E[x^T x], for lateral neurons with real-valued responses: D = H S (I - H^T H).

    `mean` turns sums over this rank's samples into means over all ranks; it is collective, and
    every rank must hold the same number of samples. `drive` is E[y^T (x - y H)] of the learning
    rows. `energy` is the share of E|x|^2 that the rows keep, E|y|^2 / E|x|^2 for orthonormal rows,
    and 1 if x is 0.
    """

    def __init__(self, subspace: Subspace) -> None:
        self.second_CC = subspace.new.new_zeros(subspace.new.shape[1], subspace.new.shape[1])
        self.samples = 0

    def add(self, x_NC: Tensor) -> None:
        self.second_CC.addmm_(x_NC.T, x_NC)
        self.samples += len(x_NC)

    def mean(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        self.second_CC = over_ranks(self.second_CC / self.samples)

    def drive(self, subspace: Subspace) -> Tensor:
        old, new = subspace.old, subspace.new
        response_KC = new @ self.second_CC
        return response_KC - (response_KC @ old.T) @ old - (response_KC @ new.T) @ new

    def energy(self, subspace: Subspace) -> Tensor:
        rows = subspace.rows
        return _share(((rows @ self.second_CC) * rows).sum(), self.second_CC.trace())


class SpikingMoments:
    """E[y^T x] and E[y^T y] for lateral neurons with spiking responses.

    The methods are those of `SecondMoments`.

    y is clipped to +-20 and rounded to multiples of 20 / steps. The neurons fire once per batch,
    with the weights at its start, and all iterations use these spikes. (The published neurons fire
    anew in each iteration, for which the whole global batch would have to be stored.)
    """

    def __init__(self, subspace: Subspace, *, steps: int) -> None:
        self.rows, self.steps = subspace.rows, steps
        count = len(self.rows)
        self.cross_KC = torch.zeros_like(self.rows)
        self.lateral_KK = self.rows.new_zeros(count, count)
        self.power = self.rows.new_zeros(1)
        self.samples = 0

    def add(self, x_NC: Tensor) -> None:
        y_NK = quantized_response(x_NC @ self.rows.T, self.steps)
        self.cross_KC.addmm_(y_NK.T, x_NC)
        self.lateral_KK.addmm_(y_NK.T, y_NK)
        self.power += x_NC.square().sum()
        self.samples += len(x_NC)

    def mean(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        self.cross_KC = over_ranks(self.cross_KC / self.samples)
        self.lateral_KK = over_ranks(self.lateral_KK / self.samples)
        self.power = over_ranks(self.power / self.samples)

    def drive(self, subspace: Subspace) -> Tensor:
        first = len(subspace.old)
        return self.cross_KC[first:] - self.lateral_KK[first:] @ subspace.rows

    def energy(self, subspace: Subspace) -> Tensor:
        return _share(self.lateral_KK.trace(), self.power[0])


# The statistics of a global batch that the lateral neurons learn from.
Moments = SecondMoments | SpikingMoments


def _share(kept: Tensor, energy: Tensor) -> Tensor:
    """kept / energy; 1 for inputs that are 0."""
    return torch.where(
        energy > 0, kept / energy.clamp_min(torch.finfo(energy.dtype).tiny), torch.ones_like(energy)
    )


def quantized_response(y: Tensor, steps: int) -> Tensor:
    """y as `steps` time steps of signed spikes can represent it.

    It is clipped to +-20 and rounded to multiples of 20 / `steps`.
    """
    return (y.clamp(-LARGEST_RESPONSE, LARGEST_RESPONSE) * (steps / LARGEST_RESPONSE)).round() * (
        LARGEST_RESPONSE / steps
    )


def orthonormal(rows: Tensor, others: Tensor) -> Tensor:
    """Orthonormal rows, orthogonal to `others`, that span `rows` apart from the span of `others`.

    Gram-Schmidt in the order of the rows. Rows that are orthonormal already do not change.
    """
    q, r = torch.linalg.qr((rows - (rows @ others.T) @ others).T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)).T.contiguous()


# T time, B batch, N samples and time steps, C inputs of a synapse (for a convolution: of a patch)


class InputRecorder:
    """Accumulates moments of one synapse's inputs, for one subspace.

    The inputs are the values of each step, or with `decay` their weighted mean over time. `steps`
    is the number of time steps of the batch while recording, else None. `pending` are the moments
    of the current global batch, `last` those of the one before.

    With `factor`, a `presynaptic` seam, the recorder takes the place of the seam.
    """

    def __init__(
        self,
        name: str,
        synapse: Linear | Conv2d,
        subspace: Subspace,
        moments: Callable[[Subspace], Moments],
        decay: float | None,
        factor: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.name, self.synapse, self.subspace = name, synapse, subspace
        self.moments, self.decay = moments, decay
        self.factor, self.state = factor, getattr(factor, "state", None)
        self.steps: int | None = None
        self.pending: Moments | None = None
        self.last: Moments | None = None

    def __call__(self, x_TB: Tensor) -> Tensor:
        """The factor of `x_TB`, which is recorded."""
        assert self.factor is not None
        factor_TB = self.factor(x_TB)
        self.record(factor_TB)
        return factor_TB

    @torch.no_grad()
    def record(self, x_TB: Tensor) -> None:
        """Add the inputs `x_TB` to the moments.

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
        with torch.autocast(x_TB.device.type, enabled=False), op_scope("lateral"):
            if is_static(x_TB):  # the mean over time is the frame itself
                x_TB = x_TB[:1]
            elif self.decay is not None:
                x_TB = torch.einsum(
                    "t,tb...->b...",
                    rate_weights(self.decay, x_TB),
                    x_TB.to(self.subspace.old.dtype),
                ).unsqueeze(0)
            for x_NC in input_rows(self.synapse, x_TB.to(self.subspace.old.dtype)):
                self.pending.add(x_NC)

    def energy(self) -> float:
        """The share of the inputs' energy in the last batch that the rows keep.

        Before the first batch it is the checkpoint's value, or 0.
        """
        if self.last is not None:
            self.subspace.energy.copy_(self.last.energy(self.subspace))
        return float(self.subspace.energy)

    def bytes(self) -> int:
        """Bytes of the moments of the current batch and of the last one."""
        values = vars(self.moments(self.subspace)).values()
        return 2 * sum(each.nbytes for each in values if isinstance(each, Tensor))

    def finish(self, over_ranks: Callable[[Tensor], Tensor]) -> Moments | None:
        """The moments of a global batch, averaged over ranks, and a new start. Collective.

        The result is None if the batch did not pass this synapse.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.mean(over_ranks)
            self.last = pending
        return pending


def input_rows(synapse: Linear | Conv2d, x_TB: Tensor) -> Iterator[Tensor]:
    """Blocks `[N, C]` of the inputs that each row of the weight multiplies.

    For a convolution they are the patches, one time step after another.
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
