"""Error paths that replace backpropagation: signals to hidden layers, and backward weights.

Three classes map the output error e to the signal g of a hidden layer:

    MeanJacobian   g = M e / (1 - lam^k),   after the k-th global batch
                   M <- lam M + (1 - lam) mean of z o^T / alpha
    FixedRandom    g = B e,   B drawn once, entries of variance 1/K
    SinglePoint    g = z (o^T e) / alpha

z `[B, N]` is the noise of the layer (mean 0, variance 1), and alpha its scale. o `[B, K]` are the
outputs of the noisy forward, and e `[B, K]` is their error. The expectation of z o^T / alpha over z
is the transposed Jacobian (do/ds)^T, smoothed by the noise, where s is the output of the layer.

`sign_symmetric` and `FixedFeedback` are backward weights. A rule sets them as the attribute
`backward_weight` of a synapse:

    sign-symmetric       dL/dx = B^T g,   B = scale sign(W)
    feedback alignment   dL/dx = B^T g,   B fixed and random

Source: Xiao et al. 2024 (OPZO, arXiv 2407.12516); Noekland 2016 (DFA, arXiv 1609.01596) for
`FixedRandom`; Liao et al. 2016 (arXiv 1510.05067) for `sign_symmetric`; Lillicrap et al. 2016 (doi
10.1038/ncomms13276) for `FixedFeedback`. The scales of the backward weights are those of HLOP's
code (Xiao et al. 2024, arXiv 2402.11984).
"""

# B batch, N units of a layer, K outputs

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.core.random import signed
from pipeline.spiking.noise import noise
from pipeline.spiking.op_scope import op_scope


class ErrorFeedback(nn.Module):
    """Base class of the three classes that compute signals.

    A layer's matrix is created at the first call of `matrix` for the layer, or when a checkpoint is
    loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")

    def reset(self, device: torch.device) -> None:
        """Delete every matrix. The matrices of a checkpoint are created on `device`."""
        self.device = device
        self._buffers = {
            name: buffer for name, buffer in self._buffers.items() if not name.startswith("matrix_")
        }

    def signal(
        self, layer: int, units: int, *, e_BK: Tensor, o_BK: Tensor, z_BN: Tensor | None
    ) -> Tensor:
        """The signal g `[B, N]` of the hidden layer `layer`, which has N `units`.

        A subclass that learns also accumulates the statistics of the step.
        """
        raise NotImplementedError(f"{type(self).__name__} must override signal")

    def end_of_batch(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Update the matrices from the accumulated statistics; `mean` averages over ranks."""

    def discard(self) -> None:
        """Discard the accumulated statistics of an unfinished batch."""

    def pending_bytes(self) -> int:
        """Bytes of the accumulated statistics at the end of a batch."""
        return 0

    def matrix(
        self, layer: int, shape: tuple[int, int], make: Callable[[tuple[int, int]], Tensor]
    ) -> Tensor:
        """The layer's matrix `[N, K]`, created by `make(shape)` at the first call.

        Raises: ValueError if the existing matrix has another shape.
        """
        name = f"matrix_{layer}"
        if name not in self._buffers:
            self.register_buffer(name, make(shape))
        matrix = self.get_buffer(name)
        require(
            matrix.shape == shape,
            f"{type(self).__name__}: the size of a layer must not change; got {shape[0]} units and"
            f" {shape[1]} outputs at layer {layer}, whose matrix is {tuple(matrix.shape)}",
        )
        return matrix

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Only the matrices of the checkpoint must exist: a rollback may undo the batch that created
        # others.
        self.reset(self.device)
        for key, value in state_dict.items():
            if key.startswith(f"{prefix}matrix_"):
                self.register_buffer(
                    key.removeprefix(prefix), torch.zeros_like(value, device=self.device)
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MeanJacobian(ErrorFeedback):
    """OPZO's matrices: a running mean of Jacobian estimates, bias-corrected as in Adam.

    `momentum` is lam of the equations, and `scale` is alpha. M starts at 0, so the signal is 0
    before the first update. The noise must have at least fp32, because M has the dtype of the
    noise, and an update changes M only by about a thousandth.

    Source: the bias correction is that of Kingma & Ba 2015 (arXiv 1412.6980), section 3.
    """

    updates: Tensor

    def __init__(self, *, momentum: float, scale: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.scale = scale
        self.register_buffer("updates", torch.zeros(1, dtype=torch.int64))
        self.discard()

    def reset(self, device: torch.device) -> None:
        super().reset(device)
        self.updates = torch.zeros_like(self.updates, device=device)
        self.discard()

    def discard(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._samples: dict[int, int] = {}

    def pending_bytes(self) -> int:
        # One sum per matrix, of the same size.
        return sum(
            buffer.nbytes for name, buffer in self.named_buffers() if name.startswith("matrix_")
        )

    def signal(
        self, layer: int, units: int, *, e_BK: Tensor, o_BK: Tensor, z_BN: Tensor | None
    ) -> Tensor:
        assert z_BN is not None and z_BN.shape[1] == units
        self.accumulate(layer, o_BK, z_BN)
        with op_scope("feedback"):
            return e_BK @ self.jacobian(layer).T

    def accumulate(self, layer: int, o_BK: Tensor, z_BN: Tensor) -> None:
        """Add z o^T / alpha of the samples of one time step to the statistics."""
        self.matrix(layer, (z_BN.shape[1], o_BK.shape[1]), z_BN.new_zeros)
        with op_scope("feedback"):
            estimate = z_BN.T @ o_BK / self.scale
        self._sums[layer] = self._sums[layer] + estimate if layer in self._sums else estimate
        self._samples[layer] = self._samples.get(layer, 0) + len(z_BN)

    def jacobian(self, layer: int) -> Tensor:
        """M / (1 - lam^k) `[N, K]`: the estimate of a layer's mean Jacobian (do/ds)^T."""
        updates = self.updates[0].double()
        # Before the first update M is 0, whatever divides it.
        share = 1 - self.momentum ** updates.clamp_min(1)
        return self.get_buffer(f"matrix_{layer}") / share

    @torch.no_grad()
    def end_of_batch(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Update every matrix with the mean over all samples and steps of the global batch.

        It makes one collective call.
        """
        if not self._sums:
            return
        layers = sorted(self._sums)
        sums = [self._sums[layer].flatten() for layer in layers]
        counts = [sums[0].new_full((1,), self._samples[layer]) for layer in layers]
        averages = mean(torch.cat([*sums, *counts]))
        *sums, counts = averages.split([*map(len, sums), len(layers)])
        for layer, total, count in zip(layers, sums, counts, strict=True):
            matrix = self.get_buffer(f"matrix_{layer}")
            matrix.lerp_((total / count).view_as(matrix), 1 - self.momentum)
        self.updates += 1
        self.discard()


class FixedRandom(ErrorFeedback):
    """DFA: a fixed random matrix B per layer.

    `key_of(layer)` is the 64-bit key of the layer's matrix. It is equal on all ranks, so all ranks
    draw the same matrix. With the variance 1/K, the standard deviation of a unit's signal is the
    root mean square of the K errors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key_of: Callable[[int], int] = int

    def signal(
        self, layer: int, units: int, *, e_BK: Tensor, o_BK: Tensor, z_BN: Tensor | None
    ) -> Tensor:
        def draw(shape: tuple[int, int]) -> Tensor:
            key = signed(self.key_of(layer))
            key_1 = torch.full((1,), key, dtype=torch.int64, device=e_BK.device)
            entries = noise(key_1, math.prod(shape), distribution="gaussian")
            return entries.view(shape).to(e_BK.dtype) / math.sqrt(shape[1])

        with op_scope("feedback"):
            return e_BK @ self.matrix(layer, (units, e_BK.shape[1]), draw).T


class SinglePoint(ErrorFeedback):
    """The single-point zeroth-order signal, from the noise and the outputs of each sample alone.

    Its variance grows with N. `scale` is alpha of the equations.
    """

    def __init__(self, *, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def signal(
        self, layer: int, units: int, *, e_BK: Tensor, o_BK: Tensor, z_BN: Tensor | None
    ) -> Tensor:
        assert z_BN is not None and z_BN.shape[1] == units
        return z_BN * ((o_BK * e_BK).sum(1, keepdim=True) / self.scale)


def sign_symmetric(weight: Tensor) -> Tensor:
    """sign(W) / sqrt(in) for a matrix, sign(W) sqrt(2 / (k^2 out)) for a convolution."""
    variance = 1 / weight.shape[1] if weight.dim() == 2 else 2 / weight[:, 0].numel()
    return weight.sign() * math.sqrt(variance)


class FixedFeedback:
    """A fixed random backward weight in the shape of the weight.

    It depends on `key` alone, and is uniform in +-1 / sqrt(fan_in).
    """

    def __init__(self, weight: Tensor, *, key: int) -> None:
        generator = torch.Generator().manual_seed(key & 0x7FFF_FFFF_FFFF_FFFF)
        uniform = 2 * torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 1
        self.matrix = (uniform / math.sqrt(weight[0].numel())).to(weight.device, weight.dtype)

    def __call__(self, weight: Tensor) -> Tensor:
        return self.matrix
