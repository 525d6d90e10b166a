"""The surrogate of another package: one of ours if it is equal, otherwise its own derivative.

A surrogate of SpikingJelly, snnTorch or norse is a function of u - threshold, whose backward is the
substitute derivative psi. What it is, is measured on 801 points: spikes and psi in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.checks import require
from pipeline.spiking.neuron import Comparison
from pipeline.spiking.surrogate import ATan, FastSigmoid, Sigmoid, Surrogate, Triangle

SpikeFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ForeignSurrogate:
    """psi is the derivative of `function`, which maps u - threshold to spikes, by autograd."""

    function: SpikeFunction

    def derivative(self, u_minus_threshold: Tensor) -> Tensor:
        return _spikes_and_derivative(self.function, u_minus_threshold)[1]


def surrogate_of(function: SpikeFunction) -> tuple[Surrogate, Comparison]:
    """The surrogate of a function from u - threshold to spikes, and how u and threshold compare.

    Raises: ValueError for spikes other than 0 and 1 at the threshold, for a function without a
    derivative, with random numbers, or with a parameter.
    """
    x = torch.arange(-400, 401, dtype=torch.float64) / 100
    try:
        with torch.random.fork_rng(devices=[]):
            (s, psi), (s_again, psi_again) = (_spikes_and_derivative(function, x) for _ in range(2))
            is_learnt = function(x).requires_grad  # although x requires no gradient
    except RuntimeError as error:
        raise ValueError(
            "the surrogate must map any u - threshold to spikes, and have a derivative; got"
            f" {_name(function)}: {str(error).splitlines()[0]}"
        ) from None
    require(not is_learnt, f"the surrogate must have no learnt parameter; got {_name(function)}")
    require(
        torch.equal(s, s_again) and torch.equal(psi, psi_again),
        f"the surrogate must be deterministic; got {_name(function)}, whose values change",
    )
    fires_at_threshold = bool(s[400])
    require(
        torch.equal(s, (x >= 0 if fires_at_threshold else x > 0).to(s.dtype)),
        "spikes must be 1 above the threshold and 0 below it, so graded spikes cannot be mapped;"
        f" got {_name(function)}",
    )
    comparison: Comparison = ">=" if fires_at_threshold else ">"
    peak, at_1 = psi[400].item(), psi[500].item()
    # Each candidate has the parameter with which it would have these two values.
    parameters = {Triangle: peak, Sigmoid: 4 * peak, ATan: 2 * peak}
    if peak == 1 and 0 < at_1 < 1:
        parameters[FastSigmoid] = at_1**-0.5 - 1
    for kind, parameter in parameters.items():
        # Without the error of rounding: 25, not 25.000000000000004.
        if parameter > 0:
            surrogate = kind(float(f"{parameter:.12g}"))
            if torch.allclose(surrogate.derivative(x), psi, rtol=1e-11, atol=1e-13):
                return surrogate, comparison
    return ForeignSurrogate(function), comparison


def _spikes_and_derivative(function: SpikeFunction, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        s = function(x)
        (psi,) = torch.autograd.grad(s, x, torch.ones_like(s))
    return s.detach(), psi


def _name(function: SpikeFunction) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
