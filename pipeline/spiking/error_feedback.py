"""Error paths that replace backpropagation: signals to hidden layers, and fixed backward weights.

Three classes map the output error to the signal g of a hidden layer:

    MeanJacobian   g = M e / (1 - lam^k),   after the k-th global batch
                   M <- lam M + (1 - lam) mean of z o^T / alpha
    FixedRandom    g = B e,   B drawn once, entries of variance 1/K
    SinglePoint    g = z (o^T e) / alpha

z `[B, N]` is the noise of the layer (mean 0, variance 1) and alpha its scale. o `[B, K]` are the
outputs of the noisy forward and e `[B, K]` their error. The expectation of z o^T / alpha over z is
(do/dx)^T of the outputs, smoothed by the noise.

`sign_symmetric` and `FixedFeedback` are backward weights, for the seam `backward_weight` of a
synapse:

    sign-symmetric       dL/dx = B^T g,   B = scale sign(W)
    feedback alignment   dL/dx = B^T g,   B fixed and random

Source: Xiao et al. 2024 (OPZO, arXiv 2407.12516); Noekland 2016 (DFA, arXiv 1609.01596) for fixed
matrices; Liao et al. 2016 (arXiv 1510.05067) for signs; Lillicrap et al. 2016 (doi
10.1038/ncomms13276) for feedback alignment. The scales of the last two are those of HLOP's code
(Xiao et al. 2024, arXiv 2402.11984).
"""

# B batch, N units of a layer, K outputs

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.spiking.noise import noise
from pipeline.spiking.op_scope import op_scope


class ErrorFeedback(nn.Module):
    """Base class of the three signal sources.

    A layer's matrix is created when its size is first seen, or when a checkpoint is loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")

    def begin(self, device: torch.device) -> None:
        """Delete every matrix. New ones are created on `device`."""
        self.device = device
        self._buffers = {
            name: buffer for name, buffer in self._buffers.items() if not name.startswith("matrix_")
        }

    def signal(
        self, layer: int, units: int, *, e_BK: Tensor, o_BK: Tensor, z_BN: Tensor | None
    ) -> Tensor:
        """The signal g `[B, N]` of a hidden layer of N `units`.

        Statistics of the step are accumulated until `end_of_batch`.
        """
        raise NotImplementedError(f"{type(self).__name__} must override signal")

    def end_of_batch(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Learn from the accumulated statistics; `mean` averages a tensor over ranks."""

    def discard(self) -> None:
        """Discard the accumulated statistics of an unfinished batch."""

    def pending_bytes(self) -> int:
        """Bytes of the accumulated statistics at the end of a batch."""
        return 0

    def matrix(
        self, layer: int, shape: tuple[int, int], make: Callable[[tuple[int, int]], Tensor]
    ) -> Tensor:
        """The layer's matrix `[N, K]`, created by `make(shape)` if there is none yet.

        Raises: ValueError if the existing matrix has another shape.
        """
        name = f"matrix_{layer}"
        if name not in self._buffers:
            self.register_buffer(name, make(shape))
        matrix = self.get_buffer(name)
        require(
            matrix.shape == shape,
            f"{type(self).__name__}: a layer must keep its size; got {shape[0]} units and"
            f" {shape[1]} outputs at layer {layer}, whose matrix is {tuple(matrix.shape)}",
        )
        return matrix

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Exactly the matrices of this state: a rollback may undo the batch that created them.
        self.begin(self.device)
        for key, value in state_dict.items():
            if key.startswith(f"{prefix}matrix_"):
                name = key.removeprefix(prefix)
                self.register_buffer(name, torch.zeros_like(value, device=self.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MeanJacobian(ErrorFeedback):
    """OPZO's matrices: a running mean of the Jacobian estimates, bias-corrected as in Adam.

    The dtype is that of the noise, at least fp32, because the mean moves by a thousandth per batch.
    M starts at 0 and is divided by 1 - lam^k. Before the first update the signal is 0.

    Source: the correction is that of Kingma & Ba 2015 (arXiv 1412.6980), section 3.
    """

    updates: Tensor

    def __init__(self, *, momentum: float, scale: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.scale = scale
        # Stays on the CPU, because its value is read at every step.
        self.register_buffer("updates", torch.zeros(1, dtype=torch.int64))
        self.discard()

    def begin(self, device: torch.device) -> None:
        super().begin(device)
        self.updates.zero_()
        self.discard()

    def discard(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._samples: dict[int, int] = {}

    def pending_bytes(self) -> int:
        """One sum per matrix, of the same size."""
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
        """Accumulate z o^T / alpha of one step and some samples."""
        self.matrix(layer, (z_BN.shape[1], o_BK.shape[1]), z_BN.new_zeros)
        with op_scope("feedback"):
            estimate = z_BN.T @ o_BK / self.scale
        self._sums[layer] = self._sums[layer] + estimate if layer in self._sums else estimate
        self._samples[layer] = self._samples.get(layer, 0) + len(z_BN)

    def jacobian(self, layer: int) -> Tensor:
        """M / (1 - lam^k) `[N, K]`: the estimate of the mean Jacobian (do/dx)^T of a layer."""
        matrix, moves = self.get_buffer(f"matrix_{layer}"), int(self.updates)
        return matrix / (1 - self.momentum**moves) if moves else matrix

    @torch.no_grad()
    def end_of_batch(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Update every matrix by the mean over all samples and steps of the global batch.

        It takes one collective.
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
        self.discard()


class FixedRandom(ErrorFeedback):
    """DFA: a fixed random matrix per layer.

    `key_of(layer)` gives the 64-bit key of the layer's matrix, so all ranks draw the same one. With
    the variance 1/K each unit receives the root mean square of the K errors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key_of: Callable[[int], int] = int

    def signal(
        self, layer: int, units: int, *, e_BK: Tensor, o_BK: Tensor, z_BN: Tensor | None
    ) -> Tensor:
        def drawn(shape: tuple[int, int]) -> Tensor:
            entries = noise(
                [self.key_of(layer)],
                math.prod(shape),
                distribution="gaussian",
                device=e_BK.device,
            )
            return entries.view(shape).to(e_BK.dtype) / math.sqrt(shape[1])

        with op_scope("feedback"):
            return e_BK @ self.matrix(layer, (units, e_BK.shape[1]), drawn).T


class SinglePoint(ErrorFeedback):
    """Zeroth-order signal: each sample's own product of noise and outputs.

    Its variance grows with N.
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
    """A random backward weight in the shape of the weight, drawn from `key` alone.

    It is uniform in +-1 / sqrt(fan_in).
    """

    def __init__(self, weight: Tensor, *, key: int) -> None:
        generator = torch.Generator().manual_seed(key & 0x7FFF_FFFF_FFFF_FFFF)
        drawn = 2 * torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 1
        self.matrix = (drawn / math.sqrt(weight[0].numel())).to(weight.device, weight.dtype)

    def __call__(self, weight: Tensor) -> Tensor:
        return self.matrix
