"""Surrogate gradients: a step function in the forward, and a substitute derivative in the backward.

A surrogate is a frozen value without learnable parameters. It has only the derivative psi. The
forward is the step function for all surrogates.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.core.checks import require


class Surrogate(Protocol):
    def derivative(self, u_minus_threshold: Tensor) -> Tensor:
        """psi, elementwise, in a new tensor, which the caller may overwrite."""
        ...


@dataclass(frozen=True)
class _Scaled:
    """Base class of the surrogates with a parameter `alpha` > 0.

    Raises: ValueError unless `alpha` > 0.
    """

    alpha: float

    def __post_init__(self) -> None:
        require(self.alpha > 0, f"{type(self).__name__}: alpha must be > 0; got alpha={self.alpha}")


@dataclass(frozen=True)
class Triangle(_Scaled):
    """psi(x) = max(0, a - a^2 |x|), a = `alpha`.

    Source: the default of SLTT (Meng et al. 2023, arXiv 2302.14311). With a = 1 it is also half the
    derivative of Bi-Real Net's polynomial for the sign (Liu et al. 2018, arXiv 1808.00278).
    """

    alpha: float = 1.0

    def derivative(self, u_minus_threshold: Tensor) -> Tensor:
        return u_minus_threshold.abs().mul_(-(self.alpha**2)).add_(self.alpha).clamp_min_(0)


@dataclass(frozen=True)
class Sigmoid(_Scaled):
    """psi(x) = a sig(a x) (1 - sig(a x)), a = `alpha`.

    Source: OTTT uses a = 4 (Xiao et al. 2022, arXiv 2210.04195).
    """

    alpha: float = 4.0

    def derivative(self, u_minus_threshold: Tensor) -> Tensor:
        sigma = (self.alpha * u_minus_threshold).sigmoid_()
        return (1 - sigma).mul_(sigma).mul_(self.alpha)


@dataclass(frozen=True)
class Rectangle(_Scaled):
    """psi(x) = 1/a for |x| <= a/2, else 0, a = `alpha`.

    Source: Wu et al. 2018 (STBP, arXiv 1706.02609), eq. 24.
    """

    alpha: float = 1.0

    def derivative(self, u_minus_threshold: Tensor) -> Tensor:
        return u_minus_threshold.abs().le_(self.alpha / 2).div_(self.alpha)


@dataclass(frozen=True)
class ATan(_Scaled):
    """psi(x) = (a/2) / (1 + (pi a x / 2)^2), a = `alpha`.

    Source: Fang et al. 2021 (PLIF, arXiv 2007.05785); SpikingJelly's ImageNet examples use a = 2.
    """

    alpha: float = 2.0

    def derivative(self, u_minus_threshold: Tensor) -> Tensor:
        return (
            (math.pi / 2 * self.alpha * u_minus_threshold)
            .square_()
            .add_(1)
            .reciprocal_()
            .mul_(self.alpha / 2)
        )


@dataclass(frozen=True)
class FastSigmoid:
    """psi(x) = 1 / (1 + k |x|)^2, k = `slope` > 0.

    Raises: ValueError unless `slope` > 0.
    Source: Zenke & Ganguli 2018 (arXiv 1705.11146); snnTorch's `fast_sigmoid`, whose default is 25.
    """

    slope: float = 25.0

    def __post_init__(self) -> None:
        require(self.slope > 0, f"FastSigmoid: slope must be > 0; got slope={self.slope}")

    def derivative(self, u_minus_threshold: Tensor) -> Tensor:
        return (self.slope * u_minus_threshold).abs_().add_(1).square_().reciprocal_()


def SuperSpike(slope: float = 100.0) -> FastSigmoid:
    """The FastSigmoid of SuperSpike (Zenke & Ganguli 2018), with the slope that SpyTorch uses.

    The slope is norse's `alpha`. norse 1.1 does not use its `alpha`: its gradients are those of
    slope 1.

    Raises: ValueError unless `slope` > 0.

    Source: Zenke & Ganguli 2018 (arXiv 1705.11146).
    """
    return FastSigmoid(slope)


def spike(u_minus_threshold: Tensor, *, surrogate: Surrogate) -> Tensor:
    """1 where the argument is >= 0, else 0, in the argument's dtype. The backward uses `surrogate`.

    The argument can also be in units of the threshold: (u - threshold) / threshold.
    """
    # apply is untyped in torch 2.13
    return _Spike.apply(u_minus_threshold, surrogate)  # type: ignore[return-value]


def heaviside(u_minus_threshold: Tensor, margin: float = 0.0) -> Tensor:
    """1 where the argument is >= `margin`, else 0, in the argument's dtype. It has no backward."""
    # With `out` there is no intermediate tensor of booleans.
    return torch.ge(u_minus_threshold, margin, out=torch.empty_like(u_minus_threshold))


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u_minus_threshold: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(u_minus_threshold)
        ctx.surrogate = surrogate
        return heaviside(u_minus_threshold)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (u_minus_threshold,) = ctx.saved_tensors
        return ctx.surrogate.derivative(u_minus_threshold).mul_(grad_outputs[0]), None
