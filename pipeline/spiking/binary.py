"""1-bit weights: a synapse uses the scaled signs of its latent weight W.

    W_b = a sign(V),   sign(0) = +1,   one scale a per output channel (filter),   g = dL/dW_b

    "scaled"     V = W                                   a = mean |W|, a constant
                 dL/dV = g where |V| <= 1, else 0
    "centred"    V = W - mean W                          a = mean |V|, a constant
                 dL/dV = g where |V| <= 1, else 0
    "ir"         V = (W - mean W) / sqrt(var W + 1e-8)   a = 1
                 dL/dV = g
    "learnable"  V = W                                   a >= 1e-5 is learnt, at first 2 mean |W|
                 dL/dV = g where |V| <= a, else 0;   dL/da = sum g sign(V) / sqrt(fan_in)

Each filter has its own mean and (unbiased) variance, and the gradient passes through both. The
straight-through gradient is dL/dV = g without the factor a, so the step of a latent weight is as
large as the step of a full-precision weight. "ir" does not scale the weights, so it requires a
batch norm after the synapse.

W stays the full-precision parameter under its own name. A network has the same `state_dict` with
and without 1-bit weights (except a learnable scale), and can start from the weights of the same
network with full precision. torch.nn.utils.parametrize was not used because it renames the
parameter, replaces the synapse's class and cannot be pickled (torch 2.13). The seams of a synapse
(`synapse.py`) use W_b like any other weight.

W_b is computed once per batch (`slice_cache.py`), or in each forward of the synapse under a rule
without this cache (OPZO; OTTT with an update at every step). At 768 to 3072 channels the
computation takes 14 ms ("scaled") to 48 ms ("ir"). The synapse itself takes 222 ms for 8 images of
196 tokens, forward and backward (one core, torch 2.13). For the backward, "scaled" and "learnable"
keep no tensor of W's size except the parameter. "centred" keeps V, and "ir" keeps V and W - mean W.

Source: Rastegari et al. 2016 (XNOR-Net, arXiv 1603.05279) and Liu et al. 2020 (ReActNet, arXiv
2003.03488) for "scaled"; Le & Li 2023 (BinaryViT, arXiv 2306.16678) for "centred"; Qin et al. 2020
(IR-Net, arXiv 1909.10788), with the straight-through gradient of Cao et al. 2025 (BESTformer, arXiv
2501.05904), for "ir"; Liu et al. 2022 (BiT, arXiv 2205.13016), after Esser et al. 2020 (LSQ, arXiv
1902.08153), for "learnable".
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of, require
from pipeline.spiking.synapse import Conv2d, Linear

Binarization = Literal["scaled", "centred", "ir", "learnable"]

# The largest |V| at which the straight-through gradient is not 0. None: the scale a.
WINDOWS: dict[Binarization, float | None] = {
    "scaled": 1.0,
    "centred": 1.0,
    "ir": math.inf,
    "learnable": None,
}
VARIANCE_EPS = 1e-8
MIN_SCALE = 1e-5


def binarize(synapse: Linear | Conv2d, weights: Binarization = "scaled") -> None:
    """Give a plain synapse 1-bit weights. Its current weight becomes the latent weight.

    Standardised weights are refused. Their mean 0 and variance 1 / fan_in per filter replace batch
    norm, but their signs have another mean and variance.

    Raises: ValueError for an unknown `weights`, a module that is not a synapse, a synapse whose
    weights are not plain, or a fan-in of 1 with "centred" or "ir".
    """
    refuse_unless_one_of("binarize", WINDOWS, weights=weights)
    require(
        isinstance(synapse, (Linear, Conv2d)),
        "binarize: the synapse must be a Linear or Conv2d of pipeline.spiking.synapse; got"
        f" {type(synapse).__name__}",
    )
    require(
        synapse.weights == "plain",
        f"binarize: the weights must be plain before they are 1-bit; got {synapse.weights} weights",
    )
    synapse.binarizer = Binarizer(synapse.weight, weights)
    synapse.weights = "1-bit"


class Binarizer(nn.Module):
    """Maps W to W_b for one synapse. `weights` is the formula, see the head of the file.

    Raises: ValueError for "centred" or "ir" with a fan-in of 1: the only weight of a filter equals
    the mean, so V would be 0.
    """

    def __init__(self, weight: Tensor, weights: Binarization) -> None:
        super().__init__()
        require(
            weights not in ("centred", "ir") or weight[0].numel() >= 2,
            f"binarize: weights={weights!r} need a fan-in of at least 2; got {weight[0].numel()}",
        )
        self.weights: Binarization = weights
        self.scale = nn.Parameter(weight.new_empty(len(weight))) if weights == "learnable" else None
        self.reset(weight)

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Set a learnable scale to its initial value for the latent weight."""
        if self.scale is not None:
            self.scale.copy_(2 * _mean_abs_per_filter(weight))

    def forward(self, weight: Tensor) -> Tensor:
        V = self._latent(weight)
        return _ScaledSign.apply(  # type: ignore[return-value]
            V, self._scale(V), WINDOWS[self.weights]
        )

    @torch.no_grad()
    def split(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The two factors of W_b: the mask `V >= 0`, and the scale a `[out]` (None if a = 1)."""
        V = self._latent(weight)
        return V >= 0, None if self.weights == "ir" else self._scale(V)

    def _latent(self, weight: Tensor) -> Tensor:
        """V of the equations, in the shape of W."""
        if self.weights in ("scaled", "learnable"):
            return weight
        W_ON = weight.flatten(1)
        var_O1, mean_O1 = torch.var_mean(W_ON, 1, keepdim=True)
        V_ON = W_ON - mean_O1
        if self.weights == "ir":
            V_ON = V_ON * torch.rsqrt(var_O1 + VARIANCE_EPS)
        return V_ON.view_as(weight)

    def _scale(self, V: Tensor) -> Tensor:
        """a of the equations, `[out]`."""
        if self.scale is not None:
            # The gradient also passes below the minimum, so that the scale can rise above it again.
            return self.scale + (self.scale.clamp_min(MIN_SCALE) - self.scale).detach()
        return V.new_ones(len(V)) if self.weights == "ir" else _mean_abs_per_filter(V.detach())

    def extra_repr(self) -> str:
        return repr(self.weights)


def unbinarize(synapse: Linear | Conv2d) -> None:
    """Make a 1-bit synapse plain again. Its latent weight becomes its weight."""
    synapse.binarizer = None
    synapse.weights = "plain"


def binary_synapses(model: nn.Module) -> dict[str, Linear | Conv2d]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (Linear, Conv2d)) and isinstance(module.binarizer, Binarizer)
    }


def latent_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The latent weights and learnable scales of `model`, which must not have weight decay.

    Weight decay would move latent weights to 0, where their signs flip.
    """
    for synapse in binary_synapses(model).values():
        yield synapse.weight
        yield from synapse.binarizer.parameters()  # type: ignore[union-attr]


class _ScaledSign(torch.autograd.Function):
    """(V, a [out]) -> a sign(V), with a straight-through gradient.

    dL/dV is g where |V| <= window (None: |V| <= a), else 0. dL/da is divided by sqrt(fan_in).
    """

    @staticmethod
    def forward(ctx: Any, V: Tensor, a_O: Tensor, window: float | None) -> Tensor:
        ctx.save_for_backward(V, a_O)
        ctx.window = window
        a = _broadcast_to_filters(a_O, V)
        return torch.where(V >= 0, a, -a)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        V, a_O = ctx.saved_tensors
        needs_V, needs_a, _ = ctx.needs_input_grad
        window = _broadcast_to_filters(a_O, V) if ctx.window is None else ctx.window
        g_V = g.masked_fill(V.abs() > window, 0) if needs_V else None
        g_a_O = None
        if needs_a:
            g_a_O = torch.where(V >= 0, g, -g).flatten(1).sum(1) / math.sqrt(V[0].numel())
        return g_V, g_a_O, None


def _mean_abs_per_filter(V: Tensor) -> Tensor:
    # The norm needs no intermediate tensor of V's size.
    return torch.linalg.vector_norm(V.flatten(1), ord=1, dim=1) / V[0].numel()


def _broadcast_to_filters(values_O: Tensor, V: Tensor) -> Tensor:
    return values_O.view(-1, *[1] * (V.dim() - 1))
