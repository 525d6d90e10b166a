"""The LIF that is equal to a neuron of SpikingJelly, snnTorch or norse.

SpikingJelly 2.0 (`IFNode`, `LIFNode`, `ParametricLIFNode` with tau = 1 / sigmoid(w)):

    u = v + x,   v + (x - (v - v_reset)) / tau   or   v - (v - v_reset) / tau + x
    s = 1 if u >= v_threshold
    v = u - v_threshold s (v_reset=None)   or   u (1 - s) + v_reset s

snnTorch 1.0 (`Leaky`). A delayed reset is not differentiated:

    mem[t] = beta mem[t-1] + x[t] - threshold s[t-1]    "subtract", reset_delay=True
    mem[t] = beta mem[t-1] (1 - s[t-1]) + x[t]          "zero", reset_delay=True
    mem[t] = (beta mem[t-1] + x[t]) (1 - s[t])          "zero", reset_delay=False
    s[t] = 1 if mem[t], before a reset without delay, > threshold

norse 1.1 (`LIFBoxCell`, `LIFCell` with dt tau_syn_inv = 1, which leaves no synaptic current for the
next step, and `IAFCell`). The reset is differentiated:

    u = v + dt tau_mem_inv (v_leak - v + x)   or   v + x
    s = 1 if u > v_th
    v = u (1 - s) + v_reset s   or   u - v_th s (reset_subtract)

The membrane of the LIF is 0 where that of the neuron is at rest: at v_reset, or norse's v_leak.
snnTorch's delayed subtraction is not multiplied by beta. So the LIF subtracts threshold / beta at
the time of the spike.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.models.foreign.surrogate import surrogate_of
from pipeline.spiking.neuron import LIF, PLIF, fire


class Equal(NamedTuple):
    """A LIF, and what its package returns.

    rest: the package's membrane where that of the LIF is 0.
    returns_u: whether the package's membrane is u[t], not v[t].
    returns_state: whether a call returns the spikes and the state.
    """

    lif: LIF
    rest: float = 0.0
    returns_u: bool = False
    returns_state: bool = False


class LearntDecay(PLIF):
    """As `PLIF`, with the parameter of another package, from which `decay_of` computes the decay.

    A parameter without dimensions, which DeepSpeed refuses, becomes one of shape (1,) in the same
    memory.
    """

    def __init__(
        self, parameter: Tensor, decay_of: Callable[[Tensor], Tensor], **constants: Any
    ) -> None:
        super().__init__(**constants)
        del self.decay_logit
        self.decay_of = decay_of
        if parameter.dim() == 0:
            parameter = nn.Parameter(parameter.detach().view(1), parameter.requires_grad)
        self.parameter = parameter

    def learnt_decay(self) -> Tensor:
        return self.decay_of(self.parameter)


class SubtractsLater(LearntDecay):
    """A LIF whose reset subtracts the threshold from the next u: v[t] = u[t].

    u[t] = decay v[t-1] + x[t] - threshold s[t-1]
    """

    def charge(self, x_B: Tensor, v_B: Tensor) -> Tensor:
        fired_B = v_B.detach() - self.threshold >= self.margin
        return super().charge(x_B, v_B) - self.threshold * fired_B

    def step(self, x_B: Tensor, v_B: Tensor) -> tuple[Tensor, Tensor]:
        return fire(
            self.charge(x_B, v_B),
            threshold=self.threshold,
            margin=self.margin,
            subtract=0.0,
            has_reset_gradient=False,
            surrogate=self.surrogate,
        )


def of_spikingjelly(node: Any) -> Equal:
    """The equal of an `IFNode`, `LIFNode` or `ParametricLIFNode`.

    Raises: ValueError for a node without an equal LIF.
    """
    surrogate, comparison = surrogate_of(node.surrogate_function)
    rest = node.v_reset or 0.0
    require(
        node.v_threshold > rest,
        f"v_threshold must be above v_reset; got {node.v_threshold} and {node.v_reset}",
    )
    build = {
        "IFNode": lambda: partial(LIF, 1.0),
        "LIFNode": lambda: partial(LIF, 1 - 1 / node.tau, scale_input=node.decay_input),
        "ParametricLIFNode": lambda: partial(
            LearntDecay, node.w, lambda w: (-w).sigmoid(), scale_input=node.decay_input
        ),
    }[type(node).__name__]()
    lif = build(
        threshold=node.v_threshold - rest,
        comparison=comparison,
        reset="subtract" if node.v_reset is None else "zero",
        reset_gradient="detached" if node.detach_reset else "kept",
        surrogate=surrogate,
    )
    return Equal(lif, rest)


def of_snntorch(leaky: Any) -> Equal:
    """The equal of a `Leaky`.

    Raises: ValueError for a neuron without an equal LIF.
    """
    require(not leaky.inhibition, "inhibition must be False, because neurons do not inhibit others")
    require(not leaky.state_quant, "state_quant must be False, because membranes are not quantised")
    factor = _number("graded_spikes_factor", leaky.graded_spikes_factor)
    require(factor == 1, f"graded_spikes_factor must be 1, so that spikes are 0 or 1; got {factor}")
    reset, is_delayed = leaky.reset_mechanism, leaky.reset_delay
    require(
        reset == "zero" or (reset == "subtract" and is_delayed),
        "reset_mechanism must be 'zero', or 'subtract' with reset_delay=True; got"
        f" reset_mechanism={reset!r}, reset_delay={is_delayed}",
    )
    is_learnt = isinstance(leaky.beta, nn.Parameter)
    decay = min(max(_number("beta", leaky.beta.detach()), 0.0), 1.0)
    threshold = _number("threshold", leaky.threshold)
    if is_learnt:
        kind = SubtractsLater if reset == "subtract" else LearntDecay
        build = partial(kind, leaky.beta, partial(torch.clamp, min=0.0, max=1.0))
    else:
        require(
            decay > 0 or reset == "zero", "beta must be above 0 where the reset subtracts; got 0"
        )
        build = partial(LIF, decay, subtract=threshold / decay if reset == "subtract" else None)
    surrogate, comparison = surrogate_of(leaky.spike_grad)
    lif = build(
        threshold=threshold,
        comparison=comparison,
        reset=reset,
        reset_gradient="detached" if is_delayed else "kept",
        surrogate=surrogate,
    )
    return Equal(lif, 0.0, is_delayed, leaky.output or not leaky.init_hidden)


def of_norse(cell: Any) -> Equal:
    """The equal of a `LIFBoxCell`, `LIFCell` or `IAFCell`.

    Raises: ValueError for a cell without an equal LIF.
    """
    p, kind = cell.p, type(cell).__name__
    has_leak = kind != "IAFCell"
    # The first run of an IAFCell lets its v_reset require a gradient, but nothing learns it.
    v_reset = _number("v_reset", p.v_reset if has_leak else p.v_reset.detach())
    rest = _number("v_leak", p.v_leak) if has_leak else v_reset
    v_th = _number("v_th", p.v_th)
    if kind == "LIFCell":
        rate = _number("dt tau_syn_inv", cell.dt * p.tau_syn_inv)
        require(
            rate == 1,
            f"dt tau_syn_inv must be 1, because a LIF has no synaptic current; got {rate:g}; use"
            " LIFBoxCell",
        )
    subtracts = kind == "LIFBoxCell" and p.reset_method.__name__ == "reset_subtract"
    require(
        subtracts or v_reset == rest,
        f"v_reset must be v_leak; got v_reset={v_reset:g}, v_leak={rest:g}",
    )
    threshold = sys.modules["norse.torch.functional.threshold"].threshold
    alpha = _number("alpha", p.alpha)
    surrogate, comparison = surrogate_of(partial(threshold, method=p.method, alpha=alpha))
    lif = LIF(
        1 - _number("dt tau_mem_inv", cell.dt * p.tau_mem_inv) if has_leak else 1.0,
        threshold=v_th - rest,
        comparison=comparison,
        reset="subtract" if subtracts else "zero",
        subtract=v_th if subtracts else None,
        reset_gradient="kept",
        scale_input=has_leak,
        surrogate=surrogate,
    )
    return Equal(lif, rest, returns_state=True)


def _number(name: str, value: Any) -> float:
    """A constant of a neuron.

    Raises: ValueError for more than one number, or a value that is learnt.
    """
    tensor = torch.as_tensor(value)
    require(not tensor.requires_grad, f"{name} must not be learnt; make it a constant")
    require(
        tensor.numel() == 1,
        f"{name} must be one number for the whole layer; got shape {tuple(tensor.shape)}",
    )
    return float(value)
