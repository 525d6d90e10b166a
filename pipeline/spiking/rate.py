"""Rate-coded neurons with a learnable spike height. Their rate is a clamped map of the mean input.

    IF:    u[t] = v[t-1] + x[t]
    LIF:   u[t] = b v[t-1] + (1 - b) x[t],   b = exp(-dt / tau)
    s[t] = 1 if u[t] >= alpha threshold else 0
    v[t] = u[t] - threshold s[t],   v[0] = 0
    out[t] = height s[t]

Let w[t] be weights that sum to 1, r = sum_t w[t] out[t] the rate and I = sum_t w[t] x[t] the mean
input. The weighted sum of these equations over t = 1..T gives

    r = gain I - v[T] / (dt sum_t b^(T-t)),   so   r is close to clamp(gain I, 0, height)

           w[t]            gain           height           bound of |r - clamp|, constant input
    IF     1 / T           1              threshold        max(alpha, 1 - alpha) height / T
    LIF    b^(T-t) / sum   (1 - b) / dt   threshold / dt   max(alpha, 1 - alpha) height
                                                           (1 - b) / (1 - b^T)

For IF, b = 1 and dt = 1. The error of IF falls as T grows. The error of LIF falls with a smaller
dt. It falls as T grows only while T dt < tau. The bounds hold for a constant input only.

Source: Meng et al. 2022 (DSR, arXiv 2205.00459), sections 3 and 4. There the gain of LIF is 1 /
tau, the limit of (1 - b) / dt for dt -> 0.
"""

# T time, B batch, K classes

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.spiking.kernels import neuron as fused
from pipeline.spiking.kernels.operators import has_kernels, membrane_dtype
from pipeline.spiking.neuron import LIF, Kernel
from pipeline.spiking.state import State
from pipeline.spiking.surrogate import Surrogate, Triangle, spike


class RateNeuron(LIF):
    """The neuron of `RateIF` and `RateLIF`: a LIF whose spikes have the height `threshold / dt`.

    `threshold` is a parameter of shape (1,) in units of the membrane. The neuron fires at `alpha`
    times the threshold; an `alpha` below 1 reduces the bias of the rate. The forward uses
    max(threshold, bound). The parameter itself is never clamped, because ZeRO trains a copy of it.
    The gradient of the parameter ignores the bound. It is a sum over the batch, so it is the same
    for any number of ranks. Under every rule it is multiplied by `threshold_gradient`.

    The seams are those of LIF. Unless `custom_forward` is set, the surrogate's derivative is taken
    at u / threshold - alpha, and the reset is detached.

    Raises: ValueError for arguments out of range.
    """

    threshold: nn.Parameter  # type: ignore[assignment]  # in LIF it is a number

    def __init__(
        self,
        *,
        threshold: float,
        decay: float,
        dt: float,
        alpha: float,
        bound: float,
        threshold_gradient: float,
        surrogate: Surrogate,
        kernel: Kernel,
    ) -> None:
        name = "RateIF" if decay == 1 else "RateLIF"
        require(0 < alpha <= 1, f"{name}: alpha must be above 0 and at most 1; got alpha={alpha}")
        require(
            0 < bound <= threshold,
            f"{name}: bound must be above 0 and at most the threshold; got bound={bound},"
            f" threshold={threshold}",
        )
        require(
            threshold_gradient >= 0,
            f"{name}: threshold_gradient must be >= 0; got threshold_gradient={threshold_gradient}",
        )
        super().__init__(decay, scale_input=decay < 1, surrogate=surrogate, kernel=kernel)
        del self.threshold, self.subtract  # numbers of LIF; one parameter replaces both
        self.threshold = nn.Parameter(torch.tensor([float(threshold)]))
        self.dt = dt
        self.alpha = alpha
        self.bound = bound
        self.threshold_gradient = threshold_gradient
        self.gain = 1.0 if decay == 1 else (1 - decay) / dt

    def clamped_threshold(self) -> Tensor:
        """max(threshold, bound). Its gradient is multiplied by `threshold_gradient`."""
        return _ClampedThreshold.apply(  # type: ignore[return-value]
            self.threshold, self.bound, self.threshold_gradient
        )

    def step(self, x_B: Tensor, v_B: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: (x[t], v[t-1]) -> (out[t], v[t])."""
        threshold = self.clamped_threshold().to(v_B.dtype)
        u_B = self.charge(x_B, v_B)
        s_B = spike((u_B - self.alpha * threshold) / threshold, surrogate=self.surrogate)
        return s_B * (threshold / self.dt), u_B - threshold * s_B.detach()

    @torch.no_grad()
    def run_without_gradient(self, x_TB: Tensor) -> Tensor:
        """The output of all steps of `x_TB`, for a rule with its own backward."""
        if self.kernel == "auto" and has_kernels(x_TB):
            dtype = membrane_dtype(x_TB)
            threshold = self.clamped_threshold().to(dtype)
            out_TB, v_B = fused.run_rates(
                x_TB,
                self.last_membrane(x_TB),
                torch.cat([self.alpha * threshold, threshold, threshold / self.dt]),
                fused.SCALED if self.scale_input else fused.ADDED,
                self.decay,
            )
        else:
            v_B = self.membrane(x_TB)
            out_TB = torch.empty_like(x_TB, memory_format=torch.contiguous_format)
            for t, x_B in enumerate(x_TB.unbind(0)):
                out_TB[t], v_B = self.step(x_B.to(v_B.dtype), v_B)
        self.state.write("v", v_B)
        return out_TB

    def extra_repr(self) -> str:
        return (
            f"decay={self.decay}, dt={self.dt}, alpha={self.alpha}, bound={self.bound}, "
            f"threshold_gradient={self.threshold_gradient}, surrogate={self.surrogate}"
        )


def RateIF(
    *,
    threshold: float = 6.0,
    alpha: float = 0.5,
    bound: float = 0.01,
    threshold_gradient: float = 1.0,
    surrogate: Surrogate = Triangle(),
    kernel: Kernel = "auto",
) -> RateNeuron:
    """DSR's integrate-and-fire neuron. The defaults are the values published for CIFAR.

    `threshold` is in units of the current. The `threshold_gradient` published for ImageNet is
    0.001.
    """
    return RateNeuron(
        threshold=threshold,
        decay=1.0,
        dt=1.0,
        alpha=alpha,
        bound=bound,
        threshold_gradient=threshold_gradient,
        surrogate=surrogate,
        kernel=kernel,
    )


def RateLIF(
    *,
    threshold: float = 0.3,
    tau: float = 1.0,
    dt: float = 0.05,
    alpha: float = 0.3,
    bound: float = 5e-4,
    threshold_gradient: float | None = None,
    surrogate: Surrogate = Triangle(),
    kernel: Kernel = "auto",
) -> RateNeuron:
    """DSR's leaky neuron. The defaults are the values published for CIFAR.

    `tau`, the time constant, and `dt`, the time step, have one unit. `threshold` is in units of the
    current.

    `threshold_gradient=None` means dt^2, as in the published code, whose gradient has the factor dt
    instead of 1 / dt. The spikes have the height threshold / dt. With the exact gradient
    (`threshold_gradient=1.0`), a step of SGD changes the height 1 / dt^2 times as much as if the
    height were the parameter (400 times for dt = 0.05). The factor dt^2 cancels this.

    Raises: ValueError unless tau and dt are positive, and for other arguments out of range.
    """
    require(tau > 0 and dt > 0, f"RateLIF: tau and dt must be > 0; got tau={tau}, dt={dt}")
    return RateNeuron(
        threshold=threshold,
        decay=math.exp(-dt / tau),
        dt=dt,
        alpha=alpha,
        bound=bound,
        threshold_gradient=dt**2 if threshold_gradient is None else threshold_gradient,
        surrogate=surrogate,
        kernel=kernel,
    )


class WeightedRates(nn.Module):
    """Readout of the rates of LIF with `decay`: multiplies step t by T w[t].

        y[t] = T w[t] x[t],   mean_t y[t] = sum_t w[t] x[t]

    The weights depend on T, so one call must have all T steps.

    Raises: ValueError for a second slice within one fresh_state.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.state = State("WeightedRates")

    def forward(self, x_TBK: Tensor) -> Tensor:
        require(
            self.state.read("seen") is None,
            "WeightedRates: one call must have all T steps, because the weights depend on T; got a"
            " second slice",
        )
        self.state.write("seen", x_TBK.new_empty(0))
        factors_T = len(x_TBK) * rate_weights(self.decay, x_TBK)
        return x_TBK * factors_T.view(-1, *[1] * (x_TBK.dim() - 1)).to(x_TBK.dtype)

    def extra_repr(self) -> str:
        return f"decay={self.decay}"


def rate_readout(neuron: nn.Module) -> nn.Module:
    """The readout of a network of neurons like `neuron`.

    It is `WeightedRates` for leaky rate neurons, and the identity for all others.
    """
    return (
        WeightedRates(neuron.decay)
        if isinstance(neuron, RateNeuron) and neuron.decay < 1
        else nn.Identity()
    )


def rate_weights(decay: float, x_TB: Tensor) -> Tensor:
    """decay^(T-t) / sum over the T steps of `x_TB`, `[T]`; for decay 1 each weight is 1 / T."""
    exponents_T = torch.arange(len(x_TB) - 1, -1, -1, dtype=torch.float64, device=x_TB.device)
    powers_T = decay**exponents_T
    return (powers_T / powers_T.sum()).to(membrane_dtype(x_TB))


class _ClampedThreshold(torch.autograd.Function):
    """max(threshold, bound); the backward scales the gradient and ignores the bound."""

    @staticmethod
    def forward(ctx: Any, threshold: Tensor, bound: float, scale: float) -> Tensor:
        ctx.scale = scale
        return threshold.clamp_min(bound)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return ctx.scale * grad_outputs[0], None, None
