"""Where the signal to a hidden layer comes from: a matrix that follows the mean Jacobian, a fixed
one, or one noisy sample.

    MeanJacobian   g = M e / (1 - lam^k),   M <- lam M + (1 - lam) mean of z o^T / alpha, once per
    batch, k times so far FixedRandom          g = B e,                 B drawn once, entries of variance
    1/K
    SinglePoint    g = z (o^T e) / alpha

with z `[B, N]` the noise of a layer (mean 0, variance 1), alpha its scale, o `[B, K]` the outputs
of the forward that it perturbed, e `[B, K]` their error. In expectation over z, z o^T / alpha is
(do/dx)^T of outputs smoothed by the noise.

Source: Xiao et al. 2024 (OPZO, arXiv 2407.12516); Noekland 2016 (DFA, arXiv 1609.01596) for fixed
matrices.

Other weights than the forward ones to carry an error down, for the seam `backward_weight` of a
synapse.

    dL/dx = B^T g,      B = scale sign(W)   (sign-symmetric)      or      B fixed and random
    (feedback alignment)

Source: Liao et al. 2016 (arXiv 1510.05067) for signs; Lillicrap et al. 2016 (doi
10.1038/ncomms13276) for random feedback; both scales are those of HLOP's code (Xiao et al. 2024,
arXiv 2402.11984).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.spiking.noise import noise
from pipeline.spiking.op_scope import op_scope

# B batch, N units of a layer, K outputs


class ErrorFeedback(nn.Module):
    """Base of the three. Matrices are made when a layer's size is first seen, or by the checkpoint
    that is loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")

    def begin(self, device: torch.device) -> None:
        """Forget every matrix; the new ones live on `device`."""
        self.device = device
        for name in [name for name in self._buffers if name.startswith("matrix_")]:
            del self._buffers[name]

    def signal(
        self, layer: int, units: int, *, e_BK: Tensor, o_BK: Tensor, z_BN: Tensor | None
    ) -> Tensor:
        """g `[B, N]` of a hidden layer of N `units`; what there is to learn from the step is noted
        until `end_of_batch`.
        """
        raise NotImplementedError(f"{type(self).__name__} must override signal")

    def end_of_batch(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Learn from what was noted; `mean` averages a tensor over ranks."""

    def drop(self) -> None:
        """Forget what was noted: the batch that it belongs to did not come to its end."""

    def pending_bytes(self) -> int:
        """Of what is noted when a batch ends."""
        return 0

    def matrix(
        self, layer: int, units: int, outputs: int, make: Callable[[int, int], Tensor]
    ) -> Tensor:
        """The matrix of a layer, made by `make(units, outputs)` where there is none yet.

        Raises: ValueError when there is one of another size.
        """
        name = f"matrix_{layer}"
        if name not in self._buffers:
            self.register_buffer(name, make(units, outputs))
        matrix = self.get_buffer(name)
        if matrix.shape != (units, outputs):
            raise ValueError(
                f"{type(self).__name__}: a layer must keep its size; got {units} units and"
                f" {outputs} outputs at layer {layer}, whose matrix is {tuple(matrix.shape)}"
            )
        return matrix

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Those of this state and no others: the batch that made the first ones may be taken back.
        for name in [
            name
            for name in self._buffers
            if name.startswith("matrix_") and prefix + name not in state_dict
        ]:
            del self._buffers[name]
        for key, value in state_dict.items():
            name = key.removeprefix(prefix)
            if key.startswith(f"{prefix}matrix_") and name not in self._buffers:
                self.register_buffer(name, torch.zeros_like(value, device=self.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MeanJacobian(ErrorFeedback):
    """OPZO's matrices, in the dtype of the noise, never below fp32: an average that moves by a
    thousandth needs it.

    They start at 0 and are divided by 1 - lam^k, as Adam's means are; before the first move the
    signal is 0.

    Raises: ValueError for a momentum that is not in 0..1, or is 1.
    Source: the correction is that of Kingma & Ba 2015 (arXiv 1412.6980), section 3.
    """

    updates: Tensor

    def __init__(self, *, momentum: float, scale: float) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(
                f"MeanJacobian: momentum must be at least 0 and below 1; got momentum={momentum}"
            )
        self.momentum = momentum
        self.scale = scale
        self.register_buffer(
            "updates", torch.zeros(1, dtype=torch.int64)
        )  # on the CPU for good: it is read at every step
        self.drop()

    def begin(self, device: torch.device) -> None:
        super().begin(device)
        self.updates.zero_()
        self.drop()

    def drop(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._samples: dict[int, int] = {}

    def pending_bytes(self) -> int:
        """A sum for each matrix, as large."""
        return sum(
            buffer.nbytes for name, buffer in self.named_buffers() if name.startswith("matrix_")
        )

    def signal(
        self, layer: int, units: int, *, e_BK: Tensor, o_BK: Tensor, z_BN: Tensor | None
    ) -> Tensor:
        assert z_BN is not None and z_BN.shape[1] == units
        self.note(layer, o_BK, z_BN)
        with op_scope("feedback"):
            return e_BK @ self.jacobian(layer).T

    def note(self, layer: int, o_BK: Tensor, z_BN: Tensor) -> None:
        """One step of some samples, for the next move of this layer's matrix."""
        self.matrix(layer, z_BN.shape[1], o_BK.shape[1], z_BN.new_zeros)
        with op_scope("feedback"):
            estimate = z_BN.T @ o_BK / self.scale
        self._sums[layer] = self._sums[layer] + estimate if layer in self._sums else estimate
        self._samples[layer] = self._samples.get(layer, 0) + len(z_BN)

    def jacobian(self, layer: int) -> Tensor:
        """M / (1 - lam^k) `[N, K]`: what is known of the mean Jacobian (do/dx)^T of a layer that
        was noted.
        """
        matrix, moves = self.get_buffer(f"matrix_{layer}"), int(self.updates)
        return matrix / (1 - self.momentum**moves) if moves else matrix

    @torch.no_grad()
    def end_of_batch(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Every matrix moves by the mean over the samples and steps of all micro-batches and ranks;
        one collective.
        """
        if not self._sums:
            return
        layers = sorted(self._sums)
        counts = next(iter(self._sums.values())).new_tensor(
            [self._samples[layer] for layer in layers]
        )
        averaged = mean(torch.cat([*(self._sums[layer].flatten() for layer in layers), counts]))
        *sums, counts = averaged.split(
            [*(self._sums[layer].numel() for layer in layers), len(layers)]
        )
        for layer, total, count in zip(layers, sums, counts, strict=True):
            matrix = self.get_buffer(f"matrix_{layer}")
            matrix.lerp_((total / count).view_as(matrix), 1 - self.momentum)
        self.updates += 1
        self.drop()


class FixedRandom(ErrorFeedback):
    """DFA: `key_of(layer)` gives the 64 bits that a layer's matrix is drawn from, so it is the same
    on every rank.

    The variance of 1/K gives each unit the root mean square of the K errors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key_of: Callable[[int], int] = int

    def signal(
        self, layer: int, units: int, *, e_BK: Tensor, o_BK: Tensor, z_BN: Tensor | None
    ) -> Tensor:
        def drawn(units: int, outputs: int) -> Tensor:
            entries = noise(
                [self.key_of(layer)], units * outputs, distribution="gaussian", device=e_BK.device
            )
            return entries.view(units, outputs).to(e_BK.dtype) / math.sqrt(outputs)

        with op_scope("feedback"):
            return e_BK @ self.matrix(layer, units, e_BK.shape[1], drawn).T


class SinglePoint(ErrorFeedback):
    """Zeroth order without a memory: each sample's own product of noise and outputs, whose variance
    grows with N.
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
